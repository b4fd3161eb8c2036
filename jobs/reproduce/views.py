"""What views are worth on real images: `python -m jobs.reproduce.views`.

PatchCore with one setting is fitted and evaluated on three data sets with every view listed here, in one process, by
the code of `kind: evaluate`. The views were listed before the first run, and each of them is in the table.

Images come from the folder in RAYDETECT_DATA and weights from RAYDETECT_WEIGHTS. The results are written to
`results/views/`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from jobs.bench.record import machine
from jobs.reproduce.run import WEIGHTS, listed
from jobs.reproduce.view_data import Counts, Make, copied, strips
from raydetect.artifacts.store import load_artifact
from raydetect.config import EvaluateSpec, parse_job
from raydetect.evaluation.cells import plan_evaluation
from raydetect.evaluation.run import run_cell
from raydetect.storage import Storage

RESULTS = Path(__file__).parent / "results" / "views"
INPUT_PX = 192
PARAMS = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "projected_dims": 128, "max_bank_vectors": 1000}
HEADINGS = ("Data", "View", "Inputs per image", "Image AUROC", "95 %", "Pixel AUROC", "AUPRO 0.3", "AUPRO 0.05",
            "Fit, s", "Evaluation, s")  # fmt: skip
METRICS = ("image_auroc", "pixel_auroc", "aupro_0.3", "aupro_0.05")
SQUARE = (INPUT_PX, INPUT_PX)


@dataclass(frozen=True)
class Look:
    """A view with its name in the table and the (height, width) of the detector's input."""

    name: str
    view: Mapping[str, Any]
    image_size: tuple[int, int] = SQUARE


def tiles(scale: float) -> Look:
    """Tiles of the input's size on the picture resized by a factor; neighbours share 32 px."""
    return Look(f"tiles at scale {scale:g}", {"tile": {"overlap": 32}, "scale": scale})


@dataclass(frozen=True)
class DataSet:
    """A data set with the views that are compared on it."""

    name: str
    source: str
    make: Make
    counts: Counts
    looks: tuple[Look, ...]


STRETCH, PAD = Look("stretch", {}), Look("pad", {"resize": "pad"})
DATA = (
    DataSet("deeppcb_92000", "deeppcb_92000", copied, Counts(30, 30, 30), (STRETCH, PAD, tiles(0.5), tiles(1))),
    DataSet(
        "cookie_aws_half",
        "cookie_aws_half",
        copied,
        Counts(31, 14, 40),
        (STRETCH, PAD, Look("stretch to 224 x 168", {}, (224, 168)), tiles(0.75), tiles(1)),
    ),
    DataSet(
        "bottle strips",
        "mvtec_bottle_256",
        strips,
        Counts(22, 20, 20),
        (STRETCH, PAD, Look("stretch to 96 x 384", {}, (96, 384)), tiles(0.375), tiles(0.75)),
    ),
)


def evaluated(look: Look, data: Path, output: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """Fits and evaluates one view on a folder with a manifest, and returns a line of the table."""
    values = {
        "kind": "evaluate",
        "data": {"uri": str(data), "layout": "manifest"},
        "detectors": [{"name": "patchcore", "params": {**params, "image_size": list(look.image_size)}}],
        "output": str(output),
        "view": dict(look.view),
        "resources": {"cpus_per_worker": os.cpu_count() or 1},
    }
    spec = parse_job(values, "views")
    assert isinstance(spec, EvaluateSpec)
    evaluation = plan_evaluation(spec)
    (cell,) = evaluation.cells
    body = run_cell(evaluation, cell, lambda *_: None)
    (found,) = body["categories"].values()
    preprocess = load_artifact(body["artifact"]["uri"], Storage()).record.preprocess
    size = Image.open(listed(data, "test")[0].path).size
    image_auroc = found["figures"]["image_auroc"]
    return {
        "view": look.name,
        "settings": {"view": dict(look.view), "image_size": list(look.image_size)},
        "inputs_per_image": len(preprocess.layout(size).windows),
        **{name: round(found["figures"][name]["value"], 4) for name in METRICS},
        "image_auroc_95": [round(image_auroc[end], 3) for end in ("ci_low", "ci_high")],
        "images": found["images"],
        "fitted": body["fitted_images"],
        "fit_seconds": round(body["fit_seconds"], 1),
        "evaluation_seconds": round(body["judge_seconds"], 1),
    }


def compared(data: DataSet, root: Path, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of one data set."""
    lines = []
    with tempfile.TemporaryDirectory(prefix="raydetect-views-") as temporary:
        made = Path(temporary, "data")
        made.mkdir()
        data.make(root / data.source, made, data.counts)
        for number, look in enumerate(data.looks):
            line = evaluated(look, made, Path(temporary, str(number)), params)
            lines.append({"data": data.name, **line})
            print(cells(lines[-1]), flush=True)
    return lines


def cells(line: Mapping[str, Any]) -> str:
    """A line of the table."""
    low, high = line["image_auroc_95"]
    image, *others = (f"{line[name]:.3f}" for name in METRICS)
    shown = [line["data"], line["view"], line["inputs_per_image"], image, f"{low:.2f} to {high:.2f}", *others]
    seconds = [f"{line[name]:.0f}" for name in ("fit_seconds", "evaluation_seconds")]
    return "| " + " | ".join(map(str, [*shown, *seconds])) + " |"


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a Markdown table."""
    return "\n".join(["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|", *map(cells, lines)])


def replaced(text: str, name: str, table: str) -> str:
    """A document with another table between its comments `<!-- NAME -->` and `<!-- end of NAME -->`."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return head + begin + table + end + tail


def write(name: str, command: str, figures: Mapping[str, Any], table: str) -> None:
    """Writes `results/views/<name>.json` and the table of that name in the document beside it."""
    RESULTS.mkdir(exist_ok=True)
    body = {"command": command, **machine(), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")
    document = RESULTS / "README.md"
    document.write_text(replaced(document.read_text(), name, table))
    print(f"Written: {RESULTS / name}.json")


def weights() -> str:
    """The weights file.

    Raises:
        SystemExit: the environment does not name its folder.
    """
    folder = os.environ.get("RAYDETECT_WEIGHTS")
    if not folder:
        sys.exit(f"Set RAYDETECT_WEIGHTS to the folder that contains {WEIGHTS}.")
    return str(Path(folder) / WEIGHTS)


def main() -> None:
    """Runs the comparison and writes its results."""
    root = os.environ.get("RAYDETECT_DATA")
    if not root:
        sys.exit(f"Set RAYDETECT_DATA to the folder that contains {', '.join(data.source for data in DATA)}.")
    torch.set_num_threads(os.cpu_count() or 1)
    lines = [line for data in DATA for line in compared(data, Path(root), {**PARAMS, "weights": weights()})]
    write("views", "python -m jobs.reproduce.views", {"params": PARAMS, "seed": 0, "lines": lines}, table(lines))


if __name__ == "__main__":
    main()
