"""Nights of a small production line: normal, dirty lens, bad parts, broken files or dim light."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from raydetect.config import FitSpec, parse_job
from raydetect.local import jobs
from tests.builders.archives import normal_files, pack, tar_bytes
from tests.builders.images import DEFECTS, defect_image, encode, normal_image

PARAMS = {"backbone": "resnet18", "weights": "random", "image_size": [64, 64], "coreset_sampling_ratio": 0.05}
EACH = 60
CATEGORY = "{category}/{name}.png"
RULES = (
    "bad parts: flagged_rate_low > 0.08 and sharpness_change > -0.1 and brightness_ks_low < 0.2",
    "dirty lens: sharpness_ks_low > 0.2 and sharpness_change < -0.1",
    "broken files: bad_rate > 0.05",
    "other light: brightness_ks_low > 0.2 and sharpness_change > -0.1",
    "no images: images < 1",
)


def fit_line(folder: Path) -> None:
    """Fits an artifact on normal images at `folder/artifact`."""
    pack(f"file://{folder}/normal", ".tar", normal_files(90), 2)
    _fit(folder, {"uri": f"{folder}/normal"})


def fit_lines(folder: Path, categories: Sequence[str]) -> None:
    """Fits a fleet at `folder/artifact`, with one detector per category on that category's images."""
    files = [
        (f"{category}/{i:04d}.png", encode(normal_image(1000 * index + i)))
        for index, category in enumerate(categories)
        for i in range(80)
    ]
    pack(f"file://{folder}/normal", ".tar", files, 2)
    _fit(folder, {"uri": f"{folder}/normal", "pattern": CATEGORY}, per_category=True)


def _fit(folder: Path, source: dict[str, Any], **changes: Any) -> None:
    values = {
        "kind": "fit",
        "source": source,
        "detector": {"name": "patchcore", "params": PARAMS},
        "artifact": f"{folder}/artifact",
        "calibration": {"holdout_ratio": 0.5},
        **changes,
    }
    spec = parse_job(values, "fit")
    assert isinstance(spec, FitSpec)
    jobs.fit(spec, lambda *_: None)


def audit_job(folder: Path, **changes: Any) -> dict[str, Any]:
    """An audit job over `folder/archive`."""
    return {
        "kind": "audit",
        "source": {"uri": f"{folder}/archive"},
        "artifact": f"{folder}/artifact",
        "sink": {"uri": f"{folder}/audits"},
        "flag": {"alpha": 0.03},
        "alarm_when": list(RULES),
        "pictures": 6,
        "resources": {"cpus_per_worker": 2},
        **changes,
    }


def add_night(folder: Path, name: str, kind: str, first: int, shards: int = 2, count: int = EACH) -> None:
    """Adds the shards of one night: `normal`, `dirty` lens, `bad` parts, `broken` files or `dim` light."""
    files = [(f"{name}/{i:04d}.png", _file(kind, first + i)) for i in range(count)]
    (folder / "archive").mkdir(exist_ok=True)
    for shard in range(shards):
        (folder / "archive" / f"{name}-{shard}.tar").write_bytes(tar_bytes(files[shard::shards]))


def _file(kind: str, number: int) -> bytes:
    image = normal_image(100_000 + number)
    if kind == "dirty":
        return encode(_dirty(image, number))
    if kind == "bad" and number % 3 == 0:
        return encode(defect_image(number, DEFECTS[number // 3 % 2])[0])
    if kind == "broken" and number % 6 == 0:
        return encode(image)[:200]
    return encode(np.clip(image * 0.7, 0, 255).astype(np.uint8) if kind == "dim" else image)


def _dirty(image: np.ndarray, number: int) -> np.ndarray:
    """Simulates grease on the lens: a soft image with a static grey smear."""
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.6))).astype(np.float64)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    smear = np.exp(-(((rows - 30) / 22.0) ** 2 + ((columns - 60) / 30.0) ** 2))[..., None]
    return np.clip(soft * (1 - 0.25 * smear) + 35 * smear, 0, 255).astype(np.uint8)
