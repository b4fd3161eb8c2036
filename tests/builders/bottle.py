"""MVTec bottle from the folder of real images, and a whole fit in memory, without an archive or artifact."""

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from raydetect.blocks.coresets.group import Group
from raydetect.detectors._base import Detector
from raydetect.fitting.collect import collect
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.fitting.train import Trainer
from raydetect.images.preprocess import Preprocess


@dataclass(frozen=True, slots=True)
class Bottles:
    """Images of one split.

    Attributes:
        names: paths from the manifest.
        images_BHWC: uint8 RGB.
        labels: 0 normal, 1 anomalous.
        masks_BHW: bool.
        defects: "good" or the kind of defect.
    """

    names: list[str]
    images_BHWC: np.ndarray
    labels: np.ndarray
    masks_BHW: np.ndarray
    defects: np.ndarray

    def only(self, places: np.ndarray) -> "Bottles":
        """Selects some of the images."""
        names = [self.names[i] for i in np.arange(len(self.names))[places]]
        parts = (part[places] for part in (self.images_BHWC, self.labels, self.masks_BHW, self.defects))
        return Bottles(names, *parts)

    def joined(self, other: "Bottles") -> "Bottles":
        """These images followed by the others."""
        parts = ("images_BHWC", "labels", "masks_BHW", "defects")
        both = (np.concatenate([getattr(self, name), getattr(other, name)]) for name in parts)
        return Bottles([*self.names, *other.names], *both)


def read_bottles(folder: Path, split: str, size_px: int) -> Bottles:
    """One split at `size_px` x `size_px`, in manifest order."""
    root, size = folder / "mvtec_bottle_256", (size_px, size_px)
    rows, originals = _decoded(root, split)
    images = [np.asarray(image.resize(size, Image.Resampling.BILINEAR)) for image in originals]
    masks = np.zeros((len(rows), *size), bool)
    for i, row in enumerate(rows):
        if row["mask"]:
            picture = Image.open(root / row["mask"]).convert("L").resize(size, Image.Resampling.NEAREST)
            masks[i] = np.asarray(picture) > 0
    labels = np.array([int(row["label"]) for row in rows])
    return Bottles(
        [row["path"] for row in rows], np.stack(images), labels, masks, np.array([r["defect"] for r in rows])
    )


@lru_cache
def _decoded(root: Path, split: str) -> tuple[list[dict[str, str]], list[Image.Image]]:
    """Rows of the manifest and their images at original size."""
    with (root / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return rows, [Image.open(root / row["path"]).convert("RGB") for row in rows]


def fit_in_memory(detector: Detector, bottles: Bottles, batch_size: int = 16, trains: bool = True) -> list[float]:
    """Runs all phases of a detector whose weights are loaded; returns the training losses.

    Without `trains`, networks are made and frozen without a step, to compare with.
    """
    cache, losses = ImageCache(Preprocess(detector.params.image_size)), []
    for name, image, label in zip(bottles.names, bottles.images_BHWC, bottles.labels, strict=True):
        cache.add(CachedImage(name, int(label), None), image)
    for phase in detector.phases:
        if phase == "train" and not trains:
            detector.begin_training(len(cache.images))
            detector.end_training()
        elif phase == "train":
            losses = Trainer(detector, cache, list(cache.images), Group()).run(lambda *_: None)
        else:
            normal = [name for name, image in cache.images.items() if image.label != 1]
            state = collect(detector, cache, normal, batch_size, Group(), 1 << 30, lambda _: None)
            detector.finish(state, lambda *_: None)
    return losses


def aurocs(detector: Detector, bottles: Bottles, batch_size: int = 16) -> tuple[float, float]:
    """(image AUROC, pixel AUROC)."""
    scores, maps = [], []
    for start in range(0, len(bottles.names), batch_size):
        images_BCHW = torch.from_numpy(bottles.images_BHWC[start : start + batch_size]).permute(0, 3, 1, 2)
        with torch.inference_mode():
            found = detector.score(images_BCHW)
        scores += found.image_score_B.tolist()
        maps.append(found.anomaly_map_BHW.numpy())
    image_auroc = float(roc_auc_score(bottles.labels, scores))
    return image_auroc, float(roc_auc_score(bottles.masks_BHW.ravel(), np.concatenate(maps).ravel()))


@dataclass(frozen=True, slots=True)
class Gain:
    """What training brought.

    Attributes:
        before: (image AUROC, pixel AUROC) of the same networks without a step.
        after: the same after the fit.
        losses: of the training, one for each epoch.
    """

    before: tuple[float, float]
    after: tuple[float, float]
    losses: list[float]

    def at_least(self, image: float, pixel: float) -> bool:
        """Whether the AUROCs have grown by so much."""
        return self.after[0] >= self.before[0] + image and self.after[1] >= self.before[1] + pixel

    def reaches(self, image: float, pixel: float) -> bool:
        """Whether the AUROCs after the fit are at least these."""
        return self.after[0] >= image and self.after[1] >= pixel


def gain_by_training(detector: Detector, train: Bottles, test: Bottles) -> Gain:
    """Fits a detector whose weights are loaded, once without its steps and then with them."""
    fit_in_memory(detector, train, trains=False)
    before = aurocs(detector, test)
    losses = fit_in_memory(detector, train)
    found = Gain(before, aurocs(detector, test), losses)
    print(found)
    return found


def bottles_of(folder: Path, size_px: int, train_every: int = 1, test_every: int = 2) -> tuple[Bottles, Bottles]:
    """(training images, test images), every so many of them."""
    train, test = read_bottles(folder, "train", size_px), read_bottles(folder, "test", size_px)
    return train.only(np.arange(0, len(train.names), train_every)), test.only(np.arange(0, len(test.names), test_every))


def scores_of(detector: Detector, bottles: Bottles, batch_size: int = 16) -> np.ndarray:
    """Image scores."""
    found = []
    for start in range(0, len(bottles.names), batch_size):
        images_BCHW = torch.from_numpy(bottles.images_BHWC[start : start + batch_size]).permute(0, 3, 1, 2)
        with torch.inference_mode():
            found.append(detector.score(images_BCHW).image_score_B.numpy())
    return np.concatenate(found).astype(np.float64)
