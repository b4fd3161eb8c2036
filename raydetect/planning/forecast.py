"""Forecasts what a scoring job will read and write: images, chunks, PUTs, hours and cost."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from raydetect.artifacts.record import ArtifactRecord
from raydetect.planning.plan import ScorePlan
from raydetect.planning.sampling import LISTED, estimate, how_text, loose_counts, sample


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
    archive, source = plan.archive, plan.spec.source
    counted = loose_counts(source, loose)
    images = sum(counted)
    chunks = sum(_chunks(plan, count, shard.size_bytes) for count, shard in zip(counted, loose, strict=True))
    has_tiles = any(record.preprocess.view.has_tiles for record in plan.records.values())
    sizes_px = (
        [size for look in sample(archive, source, loose) for size in look.sizes_px] if has_tiles and loose else []
    )
    if not containers:
        return images, chunks, LISTED, sizes_px
    looks = sample(archive, source, containers)
    sizes_px += [size for look in looks for size in look.sizes_px]
    sizes, num_bytes = [look.size_bytes for look in looks], sum(shard.size_bytes for shard in containers)
    inside = estimate([look.images for look in looks], sizes, len(containers), num_bytes)
    each = [float(_chunks(plan, look.images, look.size_bytes)) for look in looks]
    chunks += max(len(containers), estimate(each, sizes, len(containers), num_bytes).best)
    return images + inside.best, chunks, how_text(looks, len(containers), inside, images), sizes_px


def _chunks(plan: ScorePlan, images: float, size_bytes: int) -> int:
    """Chunks of a shard; at least one, which may be empty."""
    return max(1, math.ceil(max(images / plan.spec.chunk_images, size_bytes / plan.spec.chunk_bytes)))
