"""Which normal images calibrate, set a scale or are collected: a function of their keys, whoever has read them."""

import torch

from raydetect.blocks.group import Group
from raydetect.blocks.seeding import keyed_seed
from raydetect.errors import SpecError
from raydetect.worker.cache import ImageCache


def marks_of(keys: list[str], seed: int, purpose: str = "holdout") -> torch.Tensor:
    """A keyed hash of every image, int64."""
    return torch.tensor([keyed_seed(seed, purpose, key) for key in keys], dtype=torch.int64)


def normal_keys(cache: ImageCache) -> list[str]:
    """Keys of the images that are not labelled anomalous, sorted."""
    return sorted(image.key for image in cache.images.values() if image.label != 1)


def choose_images(keys: list[str], count: int, seed: int, group: Group, purpose: str = "collected") -> list[str]:
    """Those among this worker's keys that are of the `count` images of all workers with the smallest keyed hash."""
    if count == 0:
        return []
    marks_I = marks_of(keys, seed, purpose)
    smallest = torch.cat(group.gather(marks_I.sort().values[:count])).sort().values[:count]
    return [key for key, mark in zip(keys, marks_I.tolist(), strict=True) if mark <= int(smallest[-1])]


def drop_doubles(cache: ImageCache, group: Group) -> None:
    """An image that two workers have read stays with the one of smaller rank."""
    keys = sorted(cache.images)
    marks_I = marks_of(keys, 0)
    before = group.gather(marks_I)[: group.rank]
    if before:
        doubled = torch.isin(marks_I, torch.cat(before))
        cache.forget([key for key, twice in zip(keys, doubled.tolist(), strict=True) if twice])


def choose_holdout(keys: list[str], ratio: float, seed: int, group: Group, where: str) -> frozenset[str]:
    """The share of all workers' normal images that calibrates: those with the smallest keyed hash; at least one.

    Args:
        keys: this worker's normal images.
        ratio: share of all.
        seed: of the job.
        group: the workers.
        where: the source, for the message.

    Returns:
        Those among `keys`.

    Raises:
        SpecError: fewer than two normal images in all.
    """
    marks_I = marks_of(keys, seed)
    everyone = torch.cat(group.gather(marks_I)).sort().values
    if len(everyone) < 2:
        raise SpecError(
            f"{where}: has {len(everyone)} usable normal image(s); one to fit and one to calibrate are needed. "
            "Add images or state calibration.source."
        )
    count = min(max(1, round(ratio * len(everyone))), len(everyone) - 1)
    limit = int(everyone[count - 1])
    return frozenset(key for key, mark in zip(keys, marks_I.tolist(), strict=True) if mark <= limit)
