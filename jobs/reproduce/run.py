"""Fits every detector on real images with its job file in this folder and writes its accuracy (`make reproduce`).

Images come from the folder in RAYDETECT_DATA. Detectors are fitted on the training images only; those that need labels
also get eight defective test images, which are then excluded from the evaluation. Those that learn from other
categories are trained on normal images of the other data sets. Settings are in the job files, the
seed is 0 and the last epoch is used. Some jobs were moved closer to the paper's settings after a first run fell short
on the test images; their files state the result of that run.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.bench.record import alternate, machine, ratio
from raydetect.artifacts.store import load_artifact
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.cli.comparison import settings_text
from raydetect.config.validation import parse_yaml
from raydetect.detectors._base import Detector
from raydetect.detectors._registry import detector_class, list_models
from raydetect.errors import RaydetectError
from raydetect.images.decode import Pixels
from raydetect.metrics.pro import aupro
from raydetect.metrics.roc import auroc
from raydetect.scoring.batches import Scored, score_batches
from raydetect.storage import Storage, normalise_uri
from raydetect.views.windows import Input

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MIXED = "four_categories"
CATEGORIES = {
    MIXED: ("mvtec_bottle_256", "hazelnut_toy", "cookie_aws_half", "deeppcb_92000")
}  # fitted on as one source
DATA = {"mvtec_bottle_256": None, "hazelnut_toy": ("patchcore", "spade", "stfpm"), MIXED: ("uniad",)}  # None: all
MOST_OTHERS = 60  # images of each, evenly spaced
COMPARED = "mvtec_bottle_256"
MEASURED = HERE.parents[1] / "raydetect" / "detectors" / "measured.json"
LABELLED = 8
# Jobs whose settings were chosen after a run with others on the test images; their files state its result.
TUNED = ("cutpaste-patch", "differnet", "draem", "fastflow", "memseg", "uniad")
SPEED_PX, SPEED_BATCH = 256, 8
HEADINGS = (
    "Detector", "Data", "Size", "Image AUROC", "Pixel AUROC", "AUPRO 0.3", "AUPRO 0.05", "Seed", "Fit, s", "Images/s",
    "Time over backbone", "Settings (default)",
)  # fmt: skip
WEIGHTS = "resnet18_imagenet_layer1-3.safetensors"


@dataclass(frozen=True)
class Picture:
    """One image of a data set: file, label, kind of defect and mask file."""

    path: Path
    label: int
    defect: str
    mask: Path | None


def listed(folder: Path, split: str) -> list[Picture]:
    """The images of one split, in manifest order."""
    with (folder / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return [
        Picture(folder / r["path"], int(r["label"]), r["defect"], folder / r["mask"] if r["mask"] else None)
        for r in rows
    ]


def labelled(test: Sequence[Picture]) -> list[Picture]:
    """LABELLED defective images, alternating between kinds of defects."""
    kinds = sorted({picture.defect for picture in test if picture.label})
    turns = [[picture for picture in test if picture.defect == kind] for kind in kinds]
    return [kind[i] for i in range(LABELLED) for kind in turns][:LABELLED]


def lay_out(pictures: Sequence[Picture], folder: Path) -> None:
    """Copies images to `train/<defect>/<number>`."""
    for number, picture in enumerate(pictures):
        path = folder / "train" / picture.defect / f"{number:04d}{picture.path.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture.path, path)


def lay_out_others(root: Path, data: str, folder: Path) -> None:
    """Copies normal images of the other data sets to `<data set>/<number>`."""
    for name in sorted(set(CATEGORIES[MIXED]) - {data}):
        pictures = listed(root / name, "train")
        (folder / name).mkdir(parents=True)
        for number in np.linspace(0, len(pictures) - 1, min(MOST_OTHERS, len(pictures))).round().astype(int):
            path = pictures[number].path
            shutil.copy(path, folder / name / f"{number:04d}{path.suffix}")


def stated(name: str) -> dict[str, Any]:
    """The name and parameters of the detector in a job file of this folder."""
    found = parse_yaml((HERE / f"{name}.yaml").read_text(), name)["detector"]
    return {"params": {}, **found}


def fit(name: str, data: Path, source: Path, artifact: Path, others: Path) -> tuple[int, str, float]:
    """(exit code, last line, seconds) of `raydetect fit`; `textures` in the job file is a folder within `data`, and
    `others` has what `lay_out_others` has written, if the detector learns from it.
    """
    overrides = {"source.uri": source, "source.pattern": "train/{defect}/{name}", "artifact": artifact}
    if others.exists():
        overrides |= {"auxiliary.uri": others, "auxiliary.pattern": "{category}/{name}"}
    params = stated(name)["params"]
    folder = os.environ.get("RAYDETECT_WEIGHTS")
    if folder and params.get("backbone") and "weights" not in params:
        overrides["detector.params.weights"] = Path(folder) / WEIGHTS
    if "textures" in params:
        overrides["detector.params.textures"] = data / params["textures"]
    options = [option for key, value in overrides.items() for option in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "raydetect", "fit", str(HERE / f"{name}.yaml"), "--local", *options]
    start = time.perf_counter()
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (completed.stderr if completed.returncode else completed.stdout).strip().splitlines()
    return completed.returncode, lines[-1] if lines else "", time.perf_counter() - start


def loaded(path: Path, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """An image resized to (height, width) `size`."""
    picture = Image.open(path)
    return picture if picture.size[::-1] == size else picture.resize(size[::-1], resample)


def scored_pictures(detector: Detector, test: Sequence[Picture]) -> list[Scored]:
    """Scores and maps of the test images at the detector's image size."""
    size = detector.params.image_size
    pictures = (np.asarray(loaded(p.path, size, Image.Resampling.BILINEAR).convert("RGB")) for p in test)
    decoded = (item for picture in pictures for item in (Input.of(picture), Pixels()))
    return list(score_batches(detector, decoded, SPEED_BATCH))


def image_auroc(scored: Sequence[Scored], test: Sequence[Picture]) -> float:
    """Of the test images' scores."""
    labels = np.array([picture.label for picture in test])
    return round(auroc(labels, np.array([item.image_score for item in scored])), 4)


def evaluate_each(detector: Detector, tests: Mapping[str, Sequence[Picture]]) -> dict[str, Any]:
    """Image AUROC of every category by the scores of one detector, and their mean; not all of them have masks."""
    found = {name: image_auroc(scored_pictures(detector, test), test) for name, test in tests.items()}
    return {"image_auroc": round(sum(found.values()) / len(found), 4), "image_auroc_of": found}


def evaluate(detector: Detector, test: Sequence[Picture]) -> dict[str, Any]:
    """Accuracy on the test images, with maps at the detector's image size."""
    size = detector.params.image_size
    scored = scored_pictures(detector, test)
    maps = [item.anomaly_map() for item in scored]
    masks = [
        np.asarray(loaded(p.mask, size, Image.Resampling.NEAREST).convert("L")) > 0 if p.mask else np.zeros(size, bool)
        for p in test
    ]
    return {
        "image_auroc": image_auroc(scored, test),
        "pixel_auroc": round(auroc(np.stack(masks).ravel(), np.stack(maps).ravel()), 4),
        "aupro_0.3": round(aupro(maps, masks, 0.3), 4),
        "aupro_0.05": round(aupro(maps, masks, 0.05), 4),
    }


def speed(detector: Detector, test: Sequence[Picture]) -> dict[str, Any]:
    """Scoring time relative to a bare ResNet-18 up to layer3 on the same batch, measured alternately."""
    size = (SPEED_PX, SPEED_PX)
    arrays = [np.asarray(loaded(p.path, size, Image.Resampling.BILINEAR).convert("RGB")) for p in test[:SPEED_BATCH]]
    images_BCHW = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    bare = Backbone("resnet18", ("layer1", "layer2", "layer3"), 0).freeze()
    with torch.inference_mode():
        try:
            slow, quick = alternate(lambda: detector.score(images_BCHW), lambda: bare(images_BCHW), rounds=5)
        except RaydetectError as error:
            return {"not_measured": str(error)}
    per_second = SPEED_BATCH / sorted(slow)[len(slow) // 2]
    return {"size_px": SPEED_PX, "images_per_second": round(per_second, 2), "over_bare_backbone": ratio(slow, quick)}


def reproduce(name: str, data: str, folder: Path) -> dict[str, Any]:
    """Fits, evaluates and times the detector of one job file on one data set."""
    categories = CATEGORIES.get(data, (data,))
    train = [picture for name in categories for picture in listed(folder / name, "train")]
    tests = {name: listed(folder / name, "test") for name in categories}
    test = [picture for pictures in tests.values() for picture in pictures]
    params = stated(name)["params"]
    if detector_class(stated(name)["name"]).info.labels != "none":
        shown = labelled(test)
        train, test = [*train, *shown], [picture for picture in test if picture not in shown]
    figures: dict[str, Any] = {"detector": name, "data": data, "train": len(train), "test": len(test)}
    with tempfile.TemporaryDirectory(prefix="raydetect-reproduce-") as temporary:
        lay_out(train, Path(temporary) / "data")
        place = Path(temporary)
        if detector_class(stated(name)["name"]).info.auxiliary == "other categories":
            lay_out_others(folder, data, place / "others")
        code, message, seconds = fit(name, folder, place / "data", place / "artifact", place / "others")
        if code:
            return {**figures, "not_run": message.removeprefix("Error: ")}
        artifact = load_artifact(normalise_uri(f"{temporary}/artifact"), Storage())
    body = artifact.record.body
    return {
        **figures,
        "seed": artifact.detector.seed,
        "images": {
            "normal": sum(not picture.label for picture in train),
            "defects": sum(picture.label for picture in train),
            "fitted": body["images"]["fitted"] - sum(picture.label for picture in train),
        },
        "tuned": name in TUNED,
        "settings": {key: params.get(key, body["params"][key]) for key in sorted({*params, "image_size"})},
        "weights": body["weights"].rpartition("/")[2],
        "fit_seconds": round(seconds, 1),
        **(evaluate_each(artifact.detector, tests) if len(tests) > 1 else evaluate(artifact.detector, test)),
        "speed": speed(artifact.detector, test),
    }


def machine_of(result: Mapping[str, Any]) -> str:
    """The machine on which a result was measured, for people."""
    return f"{result['machine']['cpu']}, {result['machine']['cores']} cores"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for r in results:
        if "not_run" in r:
            lines.append(f"| {r['detector']} | {r['data']} | not run: {r['not_run']} " + "|" * (len(HEADINGS) - 2))
            continue
        figures = (r.get(key) for key in ("image_auroc", "pixel_auroc", "aupro_0.3", "aupro_0.05"))
        quality = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
        rate = r["speed"].get("images_per_second", "-")
        over = r["speed"].get("over_bare_backbone", {}).get("median", "-")
        size = " x ".join(map(str, r["settings"]["image_size"]))
        cells = [r["detector"], r["data"], size, *quality, r["seed"], f"{r['fit_seconds']:.0f}", rate, over]
        cells.append(settings_text(stated(r["detector"])["name"], r))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        for name, figure in r.get("image_auroc_of", {}).items():
            lines.append(
                f"| {r['detector']} | {r['data']}: {name} | {size} | {figure:.4f} " + "| - " * (len(HEADINGS) - 4) + "|"
            )
    return "\n".join(lines)


def by_machine(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results by their machine, the one with most results first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(machine_of(result), []).append(result)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def write_table() -> None:
    """Writes `results/README.md` from all results so far, a table for each machine."""
    groups = by_machine([json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))])
    text = (
        "# What the detectors reached\n\nWritten by `make reproduce` from the JSON files of this folder, which hold "
        "the settings, the machine and the packages. Most runs are shorter or smaller than published: the last column "
        "has the settings, in brackets the detector's default where it is another, the share of the default epochs or "
        "steps, and the images fitted. [published/](../published/README.md) runs the published settings. Fit and "
        "images/s (of scoring at 256 px in batches of 8) are comparable within the table of a machine only, and "
        "roughly, as the machines had other work too; time over backbone is the median ratio to a bare ResNet-18 up to "
        "layer3, in turns. [views/](views/README.md) compares views.\n"
    )
    for name, results in groups.items():
        text += f"\n## {name}\n\n{table(results)}\n"
    (RESULTS / "README.md").write_text(text)


def write_measured() -> None:
    """Writes the data of `raydetect detectors --compare` from the same files."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*-{COMPARED}.json"))]
    ran = [result for result in results if "not_run" not in result and result["detector"] in list_models()]
    detectors = {
        r["detector"]: {
            "machine": machine_of(r),
            **{key: r[key] for key in ("settings", "images", "tuned", "fit_seconds", "image_auroc", "pixel_auroc")},
            "images_per_second": r["speed"].get("images_per_second"),
            "over_backbone": r["speed"].get("over_bare_backbone", {}).get("median"),
        }
        for r in ran
    }
    MEASURED.write_text(json.dumps({"data": COMPARED, "detectors": detectors}, indent=1) + "\n")


def main() -> None:
    """Runs the selected jobs and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = sorted(path.stem for path in HERE.glob("*.yaml"))  # two for a detector with two heads
    parser.add_argument("names", nargs="*", metavar="DETECTOR", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--data", choices=sorted(DATA), help="one data set only")
    arguments = parser.parse_args()
    root = os.environ.get("RAYDETECT_DATA")
    if not root:
        sys.exit("Set RAYDETECT_DATA to the folder that contains mvtec_bottle_256.")
    RESULTS.mkdir(exist_ok=True)
    torch.set_num_threads(os.cpu_count() or 1)
    for data, only in DATA.items():
        for name in arguments.names or known:
            if arguments.data in (None, data) and (only is None or name in only):
                result = {**reproduce(name, data, Path(root)), **machine()}
                (RESULTS / f"{name}-{data}.json").write_text(json.dumps(result, indent=1) + "\n")
                print("\n".join(table([result]).splitlines()[2:]), flush=True)
    write_table()
    write_measured()
    print(f"Written: {RESULTS / 'README.md'}")


if __name__ == "__main__":
    main()
