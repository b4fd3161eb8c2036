"""Selects normal images to calibrate on, to set a scale or to collect, by their keys alone on any number of workers."""

import torch

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.seeding import keyed_seed
from raydetect.config import FEW_IMAGES, HOLDOUT_RATIO, FitSpec
from raydetect.detectors._base import Detector
from raydetect.errors import SpecError
from raydetect.fitting.image_cache import ImageCache


def keyed_hashes(keys: list[str], seed: int, purpose: str = "holdout") -> torch.Tensor:
    """A keyed hash of every image, int64."""
    return torch.tensor([keyed_seed(seed, purpose, key) for key in keys], dtype=torch.int64)


def normal_keys(cache: ImageCache) -> list[str]:
    """Keys of the images that are not labelled anomalous, sorted; each once, also with tiles."""
    return sorted({image.image_key for image in cache.images.values() if image.label != 1})


def choose_images(keys: list[str], count: int, seed: int, group: Group, purpose: str = "collected") -> list[str]:
    """This worker's keys among the `count` images of all workers with the smallest keyed hash."""
    if count == 0:
        return []
    hash_I = keyed_hashes(keys, seed, purpose)
    smallest = torch.cat(group.gather(hash_I.sort().values[:count])).sort().values[:count]
    return [key for key, mark in zip(keys, hash_I.tolist(), strict=True) if mark <= int(smallest[-1])]


def drop_duplicates(cache: ImageCache, group: Group) -> None:
    """Drops the images that a worker of smaller rank has also read."""
    keys = sorted(cache.images)
    hash_I = keyed_hashes(keys, 0)
    before = group.gather(hash_I)[: group.rank]
    if before:
        duplicates = torch.isin(hash_I, torch.cat(before))
        cache.forget([key for key, duplicate in zip(keys, duplicates.tolist(), strict=True) if duplicate])


def crosses(spec: FitSpec, detector: Detector, images: int) -> bool:
    """Whether a fit scores its normal images by folds instead of holding some out.

    Args:
        spec: the job.
        detector: of the job, before the fit.
        images: number of normal images.

    Raises:
        SpecError: the job asks for folds and the detector trains, or is extended.
    """
    wanted = spec.calibration
    is_cheap = detector.only_collects and (spec.extend is None or detector.info.auxiliary != "none")
    if wanted.method is None:
        return is_cheap and wanted.source is None and wanted.holdout_ratio is None and images < FEW_IMAGES
    if wanted.method == "cross" and not is_cheap:
        if spec.extend is not None:
            why = "a bank that is extended holds images of earlier fits, which no fit can leave out"
        elif spec.detector.ensemble:
            why = "an ensemble sets the scale of its members by images held out"
        else:
            why = f"{spec.detector.title} trains, and would be trained {wanted.folds + 1} times"
        raise SpecError(f"calibration.method: cross: {why}. Set method: holdout.")
    return wanted.method == "cross"


def choose_folds(keys: list[str], count: int, seed: int, group: Group, where: str) -> list[list[str]]:
    """Splits this worker's normal images: those of all workers are dealt to the folds in the order of a keyed hash.

    Args:
        keys: this worker's normal images.
        count: of folds; as many as there are images, if they are fewer.
        seed: of the job.
        group: the workers.
        where: the source, for the message.

    Returns:
        The images of each fold among `keys`; the same number of folds on every worker.

    Raises:
        SpecError: there are fewer than two normal images in total.
    """
    hash_I = keyed_hashes(keys, seed)
    all_marks = torch.cat(group.gather(hash_I)).sort().values
    _require_two(len(all_marks), where)
    count = min(count, len(all_marks))
    folds: list[list[str]] = [[] for _ in range(count)]
    for key, place in zip(keys, torch.searchsorted(all_marks, hash_I).tolist(), strict=True):
        folds[place % count].append(key)
    return folds


def _require_two(images: int, where: str) -> None:
    if images < 2:
        raise SpecError(
            f"{where}: has {images} usable normal image(s); at least one to fit and one to calibrate are "
            "needed. Add images or set calibration.source."
        )


def holdout_size(images: int, ratio: float) -> int:
    """Number of images held out of at least two normal images."""
    return min(max(1, round(ratio * images)), images - 1)


def calibration_size(spec: FitSpec, detector: Detector, images: int) -> int:
    """Number of images that a fit calibrates on without `calibration.source`, before those that set a common scale.

    Args:
        spec: the job.
        detector: of the job, before the fit.
        images: number of normal images, at least two.
    """
    if crosses(spec, detector, images):
        return images
    return holdout_size(images, spec.calibration.holdout_ratio or HOLDOUT_RATIO)


def choose_holdout(keys: list[str], ratio: float, seed: int, group: Group, where: str) -> frozenset[str]:
    """Selects the calibration images among the normal images of all workers: those with the smallest keyed hash.

    Args:
        keys: this worker's normal images.
        ratio: share of all normal images to select; at least one image is selected.
        seed: of the job.
        group: the workers.
        where: the source, for the message.

    Returns:
        The selected images among `keys`.

    Raises:
        SpecError: there are fewer than two normal images in total.
    """
    hash_I = keyed_hashes(keys, seed)
    all_marks = torch.cat(group.gather(hash_I)).sort().values
    _require_two(len(all_marks), where)
    limit = int(all_marks[holdout_size(len(all_marks), ratio) - 1])
    return frozenset(key for key, mark in zip(keys, hash_I.tolist(), strict=True) if mark <= limit)
