"""Selects normal images to calibrate on, to set a scale or to collect, by their keys alone on any number of workers."""

import torch

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.seeding import keyed_seed
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
    if len(all_marks) < 2:
        raise SpecError(
            f"{where}: has {len(all_marks)} usable normal image(s); at least one to fit and one to calibrate are "
            "needed. Add images or set calibration.source."
        )
    count = min(max(1, round(ratio * len(all_marks))), len(all_marks) - 1)
    limit = int(all_marks[count - 1])
    return frozenset(key for key, mark in zip(keys, hash_I.tolist(), strict=True) if mark <= limit)
