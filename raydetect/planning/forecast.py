"""Forecasts what a scoring job will read and write: images, chunks, PUTs, hours and cost.

Loose images are counted in the listing. A sample of containers, spread over the listing, is read to estimate the
images in the others, per shard or per byte, whichever varies less in the sample: a tar of one small image is mostly
padding, so its bytes alone say little.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from raydetect.archives.formats.loose_files import loose_names
from raydetect.archives.path_patterns import Naming
from raydetect.artifacts.record import ArtifactRecord
from raydetect.errors import ArchiveError
from raydetect.images.opening import DecodeRules, header_size
from raydetect.planning.plan import ScorePlan
from raydetect.records import Shard

SAMPLED_CONTAINERS, FIRST_IMAGES, FIRST_BYTES, SECONDS = 16, 64, 32 << 20, 20.0
MEMBER_OVERHEAD = {"tar": 768}  # average bytes of a member's header and padding


@dataclass(frozen=True, slots=True)
class WorkerEstimate:
    """Hours and cost of the remaining work for a number of workers."""

    num_workers: int
    hours: float
    cost: float | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of a scoring job.

    Attributes:
        images: remaining images.
        images_from: how the number of images was determined.
        puts: upper limit of written files: parts, heatmap zips, ledger records, run.json, manifest.json.
        images_per_second: rate of one worker, measured when the artifact was fitted; 0 if unknown.
        tiles: inputs of the network, if pictures are looked at in tiles; else 0.
        tiles_from: how the number of tiles was determined.
        categories: categories of a fleet, else empty.
    """

    shards: int
    shards_left: int
    bytes_left: int
    images: int
    images_from: str
    chunks: int
    puts: int
    images_per_second: float
    estimates: tuple[WorkerEstimate, ...]
    categories: tuple[str, ...] = ()
    tiles: int = 0
    tiles_from: str = ""


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


def forecast(plan: ScorePlan, workers: Iterable[int], price_per_worker_hour: float | None) -> Forecast:
    """Forecasts the remaining work of a plan.

    Reads the first FIRST_IMAGES images, at most FIRST_BYTES, of at most SAMPLED_CONTAINERS containers, and starts no
    other after SECONDS.

    Raises:
        StorageError: a container cannot be read.
    """
    spec, todo = plan.spec, plan.todo
    images, chunks, how, sizes = _counts(plan)
    each = tiles_per_image(plan.records.values(), sizes)
    zips = 0 if spec.sink.heatmaps == "none" else chunks + len(todo)
    rate = scoring_rate(plan.records.values(), each)
    estimates = []
    for count in workers:
        hours = images / (rate * count) / 3600 if rate else float("nan")
        cost = None if price_per_worker_hour is None else hours * count * price_per_worker_hour
        estimates.append(WorkerEstimate(count, hours, cost))
    return Forecast(
        shards=len(plan.shards),
        shards_left=len(todo),
        bytes_left=sum(shard.size_bytes for shard in todo),
        images=images,
        images_from=how,
        chunks=chunks,
        puts=2 * len(todo) + zips + 2,
        images_per_second=rate,
        estimates=tuple(estimates),
        categories=tuple(plan.artifact.categories),
        tiles=0 if each is None else round(images * mean(each)),
        tiles_from="" if each is None else f"{mean(each):,.1f} for each image, from {len(sizes):,} sampled images",
    )


def tiles_per_image(records: Iterable[ArtifactRecord], sizes: Sequence[tuple[int, int]]) -> list[float] | None:
    """Mean inputs of the network for each image of these (width, height) px, by detector; None without tiles."""
    rules = [record.preprocess for record in records]
    if not sizes or not any(preprocess.view.has_tiles for preprocess in rules):
        return None
    return [mean(len(preprocess.layout(size).windows) for size in sizes) for preprocess in rules]


def scoring_rate(records: Iterable[ArtifactRecord], tiles: Sequence[float] | None = None) -> float:
    """Images per second of one worker; 0 if a detector was not measured.

    A detector that looks at tiles is as fast as its measured tiles per second divided by `tiles`, those of an image.

    For a fleet, this is the harmonic mean, the rate over the same number of images of every category. It excludes
    reloading detectors if a chunk has more categories than `detectors_in_memory`.
    """
    bodies = [record.body for record in records]
    rates = [float(body.get("images_per_second", 0.0)) for body in bodies]
    for i, (body, each) in enumerate(zip(bodies, tiles or (), strict=bool(tiles))):
        if body.get("tiles_per_second") and each:
            rates[i] = float(body["tiles_per_second"]) / each
    return len(rates) / sum(1.0 / rate for rate in rates) if all(rates) else 0.0


def _counts(plan: ScorePlan) -> tuple[int, int, str, list[tuple[int, int]]]:
    """Images, chunks, how the number of images was determined, and sizes of sampled images if their tiles count."""
    loose = [shard for shard in plan.todo if shard.format == "prefix"]
    containers = [shard for shard in plan.todo if shard.format != "prefix"]
    naming = Naming.of(plan.spec.source)
    counted = [sum(naming.read(name) is not None for name in loose_names(shard)) for shard in loose]
    images = sum(counted)
    chunks = sum(_chunks(plan, count, shard.size_bytes) for count, shard in zip(counted, loose, strict=True))
    has_tiles = any(record.preprocess.view.has_tiles for record in plan.records.values())
    sizes_px = [size for look in _sample(plan, loose) for size in look.sizes_px] if has_tiles and loose else []
    if not containers:
        return images, chunks, "counted in the listing", sizes_px
    looks = _sample(plan, containers)
    sizes_px += [size for look in looks for size in look.sizes_px]
    sizes, num_bytes = [look.size_bytes for look in looks], sum(shard.size_bytes for shard in containers)
    inside = estimate([look.images for look in looks], sizes, len(containers), num_bytes)
    each = [float(_chunks(plan, look.images, look.size_bytes)) for look in looks]
    chunks += max(len(containers), estimate(each, sizes, len(containers), num_bytes).best)
    return images + inside.best, chunks, _how(looks, len(containers), inside, images), sizes_px


def _chunks(plan: ScorePlan, images: float, size_bytes: int) -> int:
    """Chunks of a shard; at least one, which may be empty."""
    return max(1, math.ceil(max(images / plan.spec.chunk_images, size_bytes / plan.spec.chunk_bytes)))


def _how(looks: Sequence[Look], containers: int, inside: Count, loose: int) -> str:
    if len(looks) == containers and all(look.is_whole for look in looks):
        return "counted"
    known = f"{loose:,} counted in the listing, the others " if loose else ""
    low, high = inside.low + loose, inside.high + loose
    span = f"; {low:,} to {high:,} if all were like the emptiest or the fullest of these" if low < high else ""
    return f"{known}estimated from {len(looks):,} of {containers:,} containers{span}"


def _sample(plan: ScorePlan, containers: Sequence[Shard]) -> list[Look]:
    """Samples containers from the middle of up to SAMPLED_CONTAINERS equal parts of the listing."""
    number = min(SAMPLED_CONTAINERS, len(containers))
    end = time.monotonic() + SECONDS
    looks: list[Look] = []
    for part in range(number):
        if looks and time.monotonic() > end:
            break
        looks.append(_look(plan, containers[(2 * part + 1) * len(containers) // (2 * number)]))
    return looks


def _look(plan: ScorePlan, shard: Shard) -> Look:
    seen = read = 0
    sizes: list[tuple[int, int]] = []
    rules = DecodeRules.of(plan.spec.source)
    try:
        for member in plan.archive.read(shard):
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
