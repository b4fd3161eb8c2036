"""How many new normal images are flagged after a calibration by folds: `python -m jobs.reproduce.normal_flags`.

The normal images of a real data set are split at random, 200 times, into those that a detector is fitted and calibrated
on, as `calibration.method: cross` does, and new ones. Their p-values should be at most a level in at most that share of
cases: the last fit has seen more images than the fits that set the scale. All splits draw from the same images, so the
sampling error is that of a share of these images. Data and weights come from the folders in RAYDETECT_DATA and
RAYDETECT_WEIGHTS; the results are written to `results/calibration/`.
"""

import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.reproduce.run import listed
from jobs.reproduce.views import weights
from raydetect import create_model

SPLITS, LEVELS = 200, (0.01, 0.05, 0.1)
SIZE_PX = 64
RESULTS = Path(__file__).parent / "results" / "calibration"
FITTED = {"mvtec_bottle_256": 120, "cookie_aws_half": 30, "deeppcb_92000": 80}  # normal images
BACKBONE = {"backbone": "resnet18", "image_size": [SIZE_PX, SIZE_PX]}
DETECTORS: dict[str, dict[str, Any]] = {  # that collect and train nothing
    "patchcore": {**BACKBONE, "layers": ["layer2", "layer3"]},
    "spade": {**BACKBONE, "pooled_level": "layer3", "k_neighbors": 10},  # these weights end at layer3
    "differnet": {**BACKBONE, "head": "difference", "train_difference": False},
    "winclip": {"clip_model": "tiny", "weights": "random"},  # CLIP's weights are not among the files
}


def normal_images(data: str) -> np.ndarray:
    """All normal images of a data set, uint8 (N, SIZE_PX, SIZE_PX, 3)."""
    folder = Path(os.environ["RAYDETECT_DATA"]) / data
    pictures = [picture for split in ("train", "test") for picture in listed(folder, split) if picture.label == 0]
    size = (SIZE_PX, SIZE_PX)
    shrunk = [Image.open(p.path).convert("RGB").resize(size, Image.Resampling.BILINEAR) for p in pictures]
    return np.stack([np.asarray(image) for image in shrunk])


def p_values(name: str, images_NHWC: np.ndarray, fitted: int, split: int) -> np.ndarray:
    """P-values of the images that are not fitted on in one split."""
    order = np.random.default_rng([21, split]).permutation(len(images_NHWC))
    model = create_model(name, seed=split, **{"weights": weights(), **DETECTORS[name]})
    model.configure(threads=1)
    model.fit(list(images_NHWC[order[:fitted]]), progress=False)
    found: np.ndarray = model.p_values(list(images_NHWC[order[fitted:]]), progress=False)
    return found


def measure(name: str, data: str) -> dict[str, Any]:
    """Shares of new normal images that are flagged, at every level that the calibration allows."""
    images_NHWC, started = normal_images(data), time.perf_counter()
    found = np.concatenate([p_values(name, images_NHWC, FITTED[data], split) for split in range(SPLITS)])
    shares: dict[str, Any] = {}
    for level in LEVELS:
        if level * (FITTED[data] + 1) >= 1:
            error = math.sqrt(level * (1 - level) / len(images_NHWC))
            shares[str(level)] = {
                "flagged": round(float((found <= level).mean()), 5),
                "sampling_error": round(error, 5),
            }
    facts = {"detector": name, "data": data, "normal_images": len(images_NHWC), "fitted": FITTED[data]}
    settings = {"params": DETECTORS[name], "splits": SPLITS, "folds": 5}
    return {**facts, **settings, "seconds": round(time.perf_counter() - started), "levels": shares}


def table() -> str:
    """The document of all results."""
    lines = [
        "# New normal images that are flagged",
        "",
        "Written by `python -m jobs.reproduce.normal_flags` from the JSON files of this folder. Of each data set, as",
        "many normal images as stated are fitted and calibrated on in five folds, and the others are new, in",
        f"{SPLITS} random splits, at {SIZE_PX} px with a ResNet-18; WinCLIP with a tiny CLIP of random weights. A",
        "level is missing where so few images do not allow it. The sampling error is that of a share of all normal",
        "images of the set: all splits draw from them.",
        "",
        "| Detector | Data | Fitted | New | Level | Flagged | Sampling error |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        new = found["normal_images"] - found["fitted"]
        start = f"| {found['detector']} | {found['data']} | {found['fitted']} | {new} |"
        for level, shares in found["levels"].items():
            flagged, error = _percent(shares["flagged"]), _percent(shares["sampling_error"])
            lines.append(f"{start} {100 * float(level):g} % | {flagged} | {error} |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def main(names: list[str]) -> None:
    """Measures detectors on all data sets; writes a file for each pair."""
    warnings.simplefilter("ignore")  # the calibration of a set of 30 images allows 3.2 %, which is what is measured
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names or DETECTORS:
        for data in FITTED:
            result = measure(name, data)
            path = RESULTS / f"{name}-{data}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            (RESULTS / "README.md").write_text(table())
            print(f"{name}, {data}: {result['levels']} in {result['seconds']} s. Written: {path}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
