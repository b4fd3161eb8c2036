"""Three categories of small images for fleets that share one detector, and jobs on them under `memory://`."""

from typing import Any

import numpy as np

from raydetect.config import FitSpec, parse_job
from raydetect.storage import Storage
from tests.builders.archives import pack
from tests.builders.images import encode, normal_image
from tests.contracts.cases import CASES

ROOT = "memory://one"
SIZE_PX = 48
COUNTS = {"cable": 8, "Hex nut": 12, "bolt": 16}
HELD_OUT = {"cable": 2, "Hex nut": 3, "bolt": 4}  # of the fit's images, a quarter
PATTERN = "{category}/train/{defect}/{name}.png"
PARAMS = {case.name: {**case.brief(), "image_size": [SIZE_PX, SIZE_PX]} for case in CASES}


def picture(category: str, number: int) -> np.ndarray:
    """An image with the colours of its category."""
    shift = list(COUNTS).index(category)
    rolled: np.ndarray = np.roll(normal_image(1000 * shift + number, SIZE_PX), shift, axis=-1)
    return rolled


def make_images(name: str, first: int = 0, counts: dict[str, int] | None = None) -> dict[str, Any]:
    """Packs images of all categories into two mixed tars and returns their source."""
    files = []
    for category, count in (counts or COUNTS).items():
        numbers = range(first, first + count)
        files += [(f"{category}/train/good/{i:03d}.png", encode(picture(category, i))) for i in numbers]
    order = np.random.default_rng(0).permutation(len(files))
    pack(f"{ROOT}/{name}", ".tar", [files[i] for i in order], 2)
    return {"uri": f"{ROOT}/{name}", "pattern": PATTERN}


def of_category(source: dict[str, Any], category: str) -> dict[str, Any]:
    """The images of one category of a source."""
    return {**source, "pattern": source["pattern"].replace("{category}", category)}


def fit_spec(source: dict[str, Any], artifact: str, name: str = "patchcore", **changes: Any) -> FitSpec:
    """The job of a small fit."""
    values = {
        "kind": "fit",
        "source": source,
        "detector": {"name": name, "preset": "smoke", "params": PARAMS[name]},
        "artifact": f"{ROOT}/{artifact}",
        "per_category": "calibration",
        "calibration": {"holdout_ratio": 0.25},
        "batch_size": 8,
        "resources": {"cpus_per_worker": 1},
        **changes,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    return spec


def stored(artifact: str) -> dict[str, int]:
    """The files of an artifact by path in its folder, with their sizes."""
    uri = f"{ROOT}/{artifact}"
    return {file.uri.partition(f"/one/{artifact}/")[2]: file.size_bytes for file in Storage().list(uri)}
