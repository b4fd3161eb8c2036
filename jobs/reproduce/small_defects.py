"""A defect of 12 px in a picture of 4,096 px, with tiles and without: `python -m jobs.reproduce.small_defects`.

The pictures are textures with structure of every size from 4 px to 256 px, made from seeds. PatchCore is fitted and
calibrated on normal ones and scores others, half of which have one defect: a dark disc at a random place. The seams of
the tiles are then looked for in the maps of a constant picture and of normal ones. The settings were chosen on pictures
of other seeds. The results are written to `results/views/`; weights come from the folder in RAYDETECT_WEIGHTS.
"""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import torch
from PIL import Image

from jobs.reproduce.views import weights, write
from raydetect import create_model
from raydetect.artifacts.store import load_artifact
from raydetect.config import FitSpec, ScoreSpec, parse_job
from raydetect.local import jobs
from raydetect.metrics.roc import auroc
from raydetect.planning.plan import plan_score
from raydetect.storage import Storage
from raydetect.views.view import Layout

DEFECT_PX, DARKER = 12, 120  # diameter, and levels of 256
FINEST_PX, COARSEST_PX = 4, 256
LEVELS = 8.0  # standard deviation of the structure of each size
NEAR_PX = 24  # a region's peak this near to the middle of the defect is at the right place
SEED = 3000
TILES = {"tile": {"size": [512, 512], "overlap": 64}}
VIEWS: dict[str, dict[str, Any]] = {"with tiles": TILES, "without tiles": {}}
PARAMS = {"backbone": "resnet18", "layers": ["layer2"], "image_size": [192, 192], "coreset_mode": "random",
          "max_bank_vectors": 1000}  # fmt: skip
HEADINGS = ("View", "Inputs per image", "Image AUROC", "Defects at the right place", "Fit, s", "Scoring, s")
SEAM_HEADINGS = ("Picture", "Across seams", "Elsewhere", "Ratio")


@dataclass(frozen=True)
class Amounts:
    """Size and number of the pictures; half of those for the test have a defect."""

    side: int = 4096
    fit: int = 12
    calibration: int = 6
    test: int = 40


def texture(side: int, number: int, seed: int = SEED) -> np.ndarray:
    """A normal picture, uint8 (side, side): for each size from COARSEST_PX to FINEST_PX smooth noise of that size."""
    random = np.random.default_rng([seed, number])
    whole, step = np.zeros((1, 1), np.float32), COARSEST_PX
    while step >= FINEST_PX:
        count = max(side // step, 1)
        whole = np.asarray(Image.fromarray(whole).resize((count, count), Image.Resampling.BICUBIC))
        whole = whole + random.normal(0, LEVELS, (count, count)).astype(np.float32)
        step //= 2
    full = np.asarray(Image.fromarray(whole).resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(full + 128, 0, 255).astype(np.uint8)


def place(side: int, number: int, seed: int = SEED) -> tuple[int, int]:
    """The middle (x, y) of the defect of a test picture, anywhere that has room for it."""
    x, y = np.random.default_rng([seed, number, 1]).integers(DEFECT_PX, side - DEFECT_PX, 2).tolist()
    return x, y


def with_defect(picture: np.ndarray, x: int, y: int) -> np.ndarray:
    """The picture with a disc of DEFECT_PX px across that is DARKER than the texture."""
    rows, columns = np.ogrid[: picture.shape[0], : picture.shape[1]]
    disc = (rows - y + 0.5) ** 2 + (columns - x + 0.5) ** 2 <= (DEFECT_PX / 2) ** 2
    return np.where(disc, np.maximum(picture, DARKER) - DARKER, picture).astype(np.uint8)


def make(folder: Path, amounts: Amounts, seed: int = SEED) -> None:
    """Writes the pictures of the fit, the calibration and the test: uncompressed TIFFs."""
    number = 0
    for part, count in (("fit", amounts.fit), ("calibration", amounts.calibration), ("test", amounts.test)):
        for i in range(count):
            kind = "spot" if part == "test" and i % 2 else "good"
            picture = texture(amounts.side, number, seed)
            if kind == "spot":
                picture = with_defect(picture, *place(amounts.side, number, seed))
            path = folder / part / kind / f"{number:03d}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            number += 1


def specs(folder: Path, view: Mapping[str, Any], params: Mapping[str, Any], output: Path) -> tuple[FitSpec, ScoreSpec]:
    """The two jobs."""
    shared = {"artifact": str(output / "artifact"), "resources": {"cpus_per_worker": os.cpu_count() or 1}}
    pattern = "{defect}/{name}"
    fit = {
        "kind": "fit",
        "source": {"uri": str(folder / "fit"), "pattern": pattern},
        "detector": {"name": "patchcore", "params": dict(params)},
        "calibration": {"source": {"uri": str(folder / "calibration"), "pattern": pattern}},
        "view": dict(view),
        **shared,
    }
    score = {
        "kind": "score",
        "source": {"uri": str(folder / "test"), "pattern": pattern},
        "sink": {"uri": str(output / "results"), "heatmaps": "none"},
        "flag": {"alpha": 0.5},
        **shared,
    }
    fit_spec, score_spec = parse_job(fit, "fit"), parse_job(score, "score")
    assert isinstance(fit_spec, FitSpec) and isinstance(score_spec, ScoreSpec)
    return fit_spec, score_spec


def found(row: Mapping[str, Any], side: int, seed: int) -> bool:
    """Whether the first region of a row is at the defect of its picture."""
    if not row["regions"]:
        return False
    x, y = place(side, int(Path(row["key"]).stem), seed)
    region = row["regions"][0]
    return bool(np.hypot(region["peak_x"] + 0.5 - x, region["peak_y"] + 0.5 - y) <= NEAR_PX)


def scored(
    folder: Path, view: Mapping[str, Any], params: Mapping[str, Any], output: Path, amounts: Amounts, seed: int = SEED
) -> dict[str, Any]:
    """Fits and scores with one view."""
    fit_spec, score_spec = specs(folder, view, params, output)
    started = time.perf_counter()
    jobs.fit(fit_spec, lambda *_: None)
    fitted = time.perf_counter()
    jobs.score(plan_score(score_spec), lambda *_: None)
    ended = time.perf_counter()
    rows = ds.dataset(sorted((output / "results").glob("scores/**/*.parquet"))).to_table().to_pylist()
    preprocess = load_artifact(fit_spec.artifact, Storage()).record.preprocess
    labels, scores = (np.array([row[name] for row in rows]) for name in ("label", "image_score"))
    return {
        "inputs_per_image": len(preprocess.layout((amounts.side, amounts.side)).windows),
        "image_auroc": round(auroc(labels, scores), 4),
        "at_the_right_place": sum(found(row, amounts.side, seed) for row in rows if row["label"]),
        "defects": int(labels.sum()),
        "fit_seconds": round(fitted - started, 1),
        "score_seconds": round(ended - fitted, 1),
    }


def seams(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """First columns and first rows of the tiles after the first, on a canvas that is not reduced."""
    columns, rows = ({window.cell[side] for window in layout.windows} - {0} for side in (0, 1))
    return np.array(sorted(columns)), np.array(sorted(rows))


def seam_steps(map_HW: np.ndarray, layout: Layout) -> dict[str, float]:
    """Mean absolute difference of neighbouring px of a map across seams and elsewhere."""
    columns, rows = seams(layout)
    across, down = np.abs(np.diff(map_HW, axis=1)), np.abs(np.diff(map_HW, axis=0))
    at = np.concatenate([across[:, columns - 1].ravel(), down[rows - 1].ravel()])
    other = np.concatenate([np.delete(across, columns - 1, 1).ravel(), np.delete(down, rows - 1, 0).ravel()])
    return {"seams": float(at.mean()), "elsewhere": float(other.mean())}


def seam_check(artifact: str, folder: Path, side: int) -> dict[str, dict[str, float]]:
    """Steps in the maps of a constant picture and of two normal ones of the test."""
    model = create_model.load(artifact)
    layout = load_artifact(artifact, Storage()).record.preprocess.layout((side, side))
    normal = [np.asarray(Image.open(path)) for path in sorted((folder / "test" / "good").glob("*.tif"))[:2]]
    pictures = {"constant": [np.full((side, side), 128, np.uint8)], "textured": normal}
    steps = {}
    for name, examples in pictures.items():
        colour = [np.repeat(picture[..., None], 3, 2) for picture in examples]
        maps = [np.asarray(a_map) for a_map in model.predict_anomaly_map(colour, progress=False)]
        seen = [seam_steps(map_HW, layout) for map_HW in maps]
        steps[name] = {key: float(np.mean([one[key] for one in seen])) for key in ("seams", "elsewhere")}
        steps[name]["std_of_map"] = float(np.mean([map_HW.std() for map_HW in maps]))
    return steps


def measure(folder: Path, amounts: Amounts, params: Mapping[str, Any], views: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the pictures, scores them with every view and looks for the seams of the first one."""
    make(folder, amounts)
    results = {
        name: scored(folder, view, params, folder / name, amounts) | {"view": view} for name, view in views.items()
    }
    steps = seam_check(str(folder / next(iter(views)) / "artifact"), folder, amounts.side)
    return {"pictures": asdict(amounts), "params": dict(params), "seed": SEED, "views": results, "seams": steps}


def markdown(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def tables(figures: Mapping[str, Any]) -> str:
    """The figures as two Markdown tables."""
    views = [
        (
            name,
            r["inputs_per_image"],
            f"{r['image_auroc']:.3f}",
            f"{r['at_the_right_place']} of {r['defects']}",
            f"{r['fit_seconds']:.0f}",
            f"{r['score_seconds']:.0f}",
        )
        for name, r in figures["views"].items()
    ]
    steps = [
        (name, f"{s['seams']:.2e}", f"{s['elsewhere']:.2e}", f"{s['seams'] / max(s['elsewhere'], 1e-12):.2f}")
        for name, s in figures["seams"].items()
    ]
    return markdown(HEADINGS, views) + "\n\n" + markdown(SEAM_HEADINGS, steps)


def main() -> None:
    """Runs the comparison, prints the tables and writes the results."""
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="raydetect-small-") as temporary:
        figures = measure(Path(temporary), Amounts(), {**PARAMS, "weights": weights()}, VIEWS)
    figures["params"] = PARAMS
    print(tables(figures))
    write("small_defects", "python -m jobs.reproduce.small_defects", figures, tables(figures))


if __name__ == "__main__":
    main()
