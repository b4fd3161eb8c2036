"""Counts the images of an archive: loose ones in the listing, others from a sample of containers.

The sample is spread over the listing, and gives the images of the others per shard or per byte, whichever varies less
in it: a tar of one small image is mostly padding, so its bytes alone say little.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydetect.archives.base import Archive
from raydetect.archives.formats.loose_files import loose_names
from raydetect.archives.path_patterns import Naming
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError
from raydetect.images.opening import DecodeRules, header_size
from raydetect.records import Shard

SAMPLED_CONTAINERS, FIRST_IMAGES, FIRST_BYTES, SECONDS = 16, 64, 32 << 20, 20.0
LISTED = "counted in the listing"
MEMBER_OVERHEAD = {"tar": 768}  # average bytes of a member's header and padding


@dataclass(frozen=True, slots=True)
class Look:
    """The sample of one container.

    Attributes:
        images: its images; estimated from the first ones if not all were read.
        size_bytes: its size.
        is_whole: whether all of its images were counted.
        sizes_px: (width, height) of the images that were read.
    """

    images: float
    size_bytes: int
    is_whole: bool
    sizes_px: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Count:
    """An estimated count with a range.

    Attributes:
        best: the estimate.
        low, high: the count if all containers were like the sampled one with the fewest or the most.
    """

    best: int
    low: int
    high: int


def estimate(found: Sequence[float], sizes: Sequence[int], num_shards: int, num_bytes: int) -> Count:
    """Estimates a sum over shards from a sample, per shard or per byte, whichever varies less.

    Args:
        found: counts of the sampled shards; at least one.
        sizes: bytes of the sampled shards.
        num_shards: number of all shards.
        num_bytes: bytes of all shards.
    """
    per_shard, sizes_S = np.asarray(found, float), np.maximum(np.asarray(sizes, float), 1.0)
    per_byte = per_shard / sizes_S
    by_shard = _spread(per_shard) <= _spread(per_byte)
    each, total = (per_shard, float(num_shards)) if by_shard else (per_byte, float(max(num_bytes, 1)))
    mean = per_shard.mean() if by_shard else per_shard.sum() / sizes_S.sum()
    return Count(*(round(float(value) * total) for value in (mean, each.min(), each.max())))


def _spread(values: np.ndarray) -> float:
    """Coefficient of variation: standard deviation over mean."""
    return float(values.std() / values.mean()) if values.any() else 0.0


def loose_counts(source: SourceSpec, shards: Sequence[Shard]) -> list[int]:
    """The number of images of shards of loose files."""
    naming = Naming.of(source)
    return [sum(naming.read(name) is not None for name in loose_names(shard)) for shard in shards]


def count_images(archive: Archive, source: SourceSpec, shards: Sequence[Shard]) -> tuple[int, str]:
    """The images of shards, and how their number was determined.

    Raises:
        StorageError: a container cannot be read.
    """
    containers = [shard for shard in shards if shard.format != "prefix"]
    loose = sum(loose_counts(source, [shard for shard in shards if shard.format == "prefix"]))
    if not containers:
        return loose, LISTED
    looks = sample(archive, source, containers)
    sizes, num_bytes = [look.size_bytes for look in looks], sum(shard.size_bytes for shard in containers)
    inside = estimate([look.images for look in looks], sizes, len(containers), num_bytes)
    return loose + inside.best, how_text(looks, len(containers), inside, loose)


def how_text(looks: Sequence[Look], containers: int, inside: Count, loose: int) -> str:
    """How a number of images was determined."""
    if len(looks) == containers and all(look.is_whole for look in looks):
        return "counted"
    known = f"{loose:,} counted in the listing, the others " if loose else ""
    low, high = inside.low + loose, inside.high + loose
    span = f"; {low:,} to {high:,} if all were like the emptiest or the fullest of these" if low < high else ""
    return f"{known}estimated from {len(looks):,} of {containers:,} containers{span}"


def sample(archive: Archive, source: SourceSpec, containers: Sequence[Shard]) -> list[Look]:
    """Samples containers from the middle of up to SAMPLED_CONTAINERS equal parts of the listing."""
    number = min(SAMPLED_CONTAINERS, len(containers))
    end = time.monotonic() + SECONDS
    looks: list[Look] = []
    for part in range(number):
        if looks and time.monotonic() > end:
            break
        looks.append(_look(archive, source, containers[(2 * part + 1) * len(containers) // (2 * number)]))
    return looks


def _look(archive: Archive, source: SourceSpec, shard: Shard) -> Look:
    seen = read = 0
    sizes: list[tuple[int, int]] = []
    rules = DecodeRules.of(source)
    try:
        for member in archive.read(shard):
            seen, read = seen + 1, read + len(member.data)
            size = header_size(member.data, rules)
            sizes += [size] if size else []
            if seen == FIRST_IMAGES or read >= FIRST_BYTES:
                break
        else:
            return Look(seen, shard.size_bytes, True, tuple(sizes))
    except ArchiveError:  # it becomes one row
        return Look(seen + 1, shard.size_bytes, True, tuple(sizes))
    each = read / seen + MEMBER_OVERHEAD.get(shard.format, 0)
    return Look(max(float(seen), shard.size_bytes / max(each, 1.0)), shard.size_bytes, False, tuple(sizes))
