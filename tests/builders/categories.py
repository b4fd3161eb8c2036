"""Real images of several categories, from the folder of RAYDETECT_DATA."""

import csv
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = ("mvtec_bottle_256", "hazelnut_toy", "cookie_aws_half", "deeppcb_92000")


@dataclass(frozen=True, slots=True)
class Category:
    """Images of one category.

    Attributes:
        train: normal images by name, uint8 RGB (H, W, 3).
        test: uint8 RGB (N, H, W, 3).
        labels: of `test`, 0 normal, 1 anomalous.
    """

    train: dict[str, np.ndarray]
    test: np.ndarray
    labels: np.ndarray


def read_category(folder: Path, name: str, size_px: int, most: int) -> Category:
    """The first `most` images each of the training split, the normal and the anomalous test images, resized."""
    with (folder / name / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))

    def first(split: str, label: str) -> dict[str, np.ndarray]:
        paths = (row["path"] for row in rows if row["split"] == split and row["label"] == label)
        return {f"{name}/{path}": _read(folder / name / path, size_px) for path in islice(paths, most)}

    normal, anomalous = first("test", "0"), first("test", "1")
    labels = np.repeat([0, 1], [len(normal), len(anomalous)])
    return Category(first("train", "0"), np.stack([*normal.values(), *anomalous.values()]), labels)


def _read(path: Path, size_px: int) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB").resize((size_px, size_px), Image.Resampling.BILINEAR))
