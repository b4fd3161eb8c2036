"""Evaluates a fitted detector on labelled images, for one cell of an evaluation.

Maps are not stored or sent: every image goes straight into mergeable summaries (`metrics/quality.py`). Maps and masks
are compared at the size of the map, in the part of the image that the view shows; masks are read by the rules of
`images/masks` and sampled by nearest neighbour. Pixels outside of a region do not count.
An anomalous image without a mask, or whose mask has no pixel left at that size, counts in the image metrics and not in
the pixel metrics.
"""

import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from raydetect.artifacts.store import Artifact
from raydetect.config import SourceSpec
from raydetect.detectors._base import Detector
from raydetect.images.decode import DecodePool, Pixels, decode_stream
from raydetect.images.masks.reading import Masks, read_mask
from raydetect.images.opening import DecodeRules
from raydetect.metrics.quality import ImageGroup, Quality
from raydetect.records import OK, Chunk, Member
from raydetect.scoring.batches import score_batches
from raydetect.scoring.device_queue import Submit, run_now
from raydetect.storage import Storage
from raydetect.views.windows import Input

T = TypeVar("T")


@dataclass(slots=True)
class EvaluationOutcome:
    """The result of evaluating a detector on an archive.

    Attributes:
        quality: summaries of all labelled images.
        images: number of images with a score.
        bad: number of images without one.
        unlabelled: number of images without a label; they are scored but not evaluated.
        seconds: time to read, decode, score and summarise.
        score_seconds: the part of `seconds` spent on scoring, without decoding.
    """

    quality: Quality
    images: int = 0
    bad: int = 0
    unlabelled: int = 0
    seconds: float = 0.0
    score_seconds: float = 0.0


def evaluate_images(
    artifact: Artifact, chunks: Iterable[Chunk], source: SourceSpec, storage: Storage, batch_size: int, threads: int
) -> EvaluationOutcome:
    """Scores labelled images and summarises their scores and maps.

    Args:
        artifact: the fitted detector, on its device, with its rules of decoding.
        chunks: encoded images.
        source: the job file's settings for them.
        storage: gives access to the masks.
        batch_size: images in one forward pass.
        threads: number of decoding threads.

    Raises:
        MaskError: a mask cannot be used.
        ValueError: a score or map is not finite.
    """
    found, started = EvaluationOutcome(Quality()), time.perf_counter()
    rules = DecodeRules.of(source)
    masks = Masks(storage, rules, source.max_image_bytes)
    with DecodePool(threads) as pool:
        for chunk in chunks:
            decoded = decode_stream(chunk.members, rules, artifact.record.preprocess, pool)
            evaluate_decoded(artifact.detector, chunk.members, decoded, found, masks, batch_size)
    found.seconds = time.perf_counter() - started
    return found


def evaluate_decoded(
    detector: Detector,
    members: Sequence[Member],
    decoded: Iterable[Input | Pixels],
    found: EvaluationOutcome,
    masks: Masks | None,
    batch_size: int,
) -> None:
    """Scores decoded images and adds them to the summaries.

    Args:
        detector: fitted detector.
        members: the images; their labels, masks, categories and defects count.
        decoded: what was decoded of each, in order.
        found: what is added to.
        masks: reads masks; None = pixels are not evaluated.
        batch_size: images in one forward pass.

    Raises:
        MaskError: a mask cannot be used.
        ValueError: a score or map is not finite.
    """
    pixels: list[Pixels] = []
    for item in score_batches(detector, _noted(decoded, pixels, found), batch_size, _timed(found)):
        member = members[item.position]
        found.images += 1
        if member.label is None:
            found.unlabelled += 1
            continue
        group = ImageGroup(member.category or "", member.label, member.defect or "")
        map_HW = mask_HW = None
        if masks is not None and detector.info.localises:
            map_HW = item.anomaly_map()
            mask_HW = read_mask(member, item.layout, pixels[item.position], masks)
        found.quality.add(group, member.key, item.image_score, map_HW, mask_HW, item.layout.looked)


def _noted(
    decoded: Iterable[Input | Pixels], pixels: list[Pixels], found: EvaluationOutcome
) -> Iterator[Input | Pixels]:
    """Yields what is decoded unchanged, appends the `Pixels` of every image and counts bad ones."""
    for item in decoded:
        if isinstance(item, Pixels):
            pixels.append(item)
            found.bad += item.status != OK
        yield item


def _timed(found: EvaluationOutcome) -> Submit:
    """Runs work in this thread and adds its time to `score_seconds`."""

    def submit(work: Callable[[], T], /) -> "Future[T]":
        started = time.perf_counter()
        future = run_now(work)
        found.score_seconds += time.perf_counter() - started
        return future

    return submit


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """Peak memory of this process, and of its GPU, so far."""
    found = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}
    if device.type == "cuda":
        found["peak_gpu_bytes"] = int(torch.cuda.max_memory_allocated(device))
    return found


def member_chunks(members: Iterable[Member], chunk_images: int) -> Iterator[Chunk]:
    """Groups loose members into chunks of one shard."""
    waiting: list[Member] = []
    number = 0
    for member in members:
        waiting.append(member)
        if len(waiting) == chunk_images:
            yield Chunk(0, number, False, tuple(waiting))
            waiting, number = [], number + 1
    yield Chunk(0, number, True, tuple(waiting))
