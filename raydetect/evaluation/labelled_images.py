"""Evaluates a fitted detector on labelled images, for one cell of an evaluation.

Maps are not stored or sent: every image goes straight into mergeable summaries (`metrics/quality.py`). Maps and masks
are compared at the size of the map, in the part of the image that the view shows; masks are read by the rules of
`masks.py` and sampled by nearest neighbour. Pixels outside of a region do not count.
An anomalous image without a mask, or whose mask has no pixel left at that size, counts in the image metrics and not in
the pixel metrics.
"""

import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import numpy as np
import torch

from raydetect.artifacts.store import Artifact
from raydetect.config import SourceSpec
from raydetect.detectors._base import Detector
from raydetect.errors import MemberError, RaydetectError, StorageError
from raydetect.images.decode import DecodePool, Pixels, decode_stream
from raydetect.images.masks import sampled_mask
from raydetect.images.opening import DecodeRules
from raydetect.metrics.quality import ImageGroup, Quality
from raydetect.records import OK, Chunk, Member
from raydetect.scoring.batches import score_batches
from raydetect.scoring.device_queue import Submit, run_now
from raydetect.storage import Storage, translate
from raydetect.views.view import Layout
from raydetect.views.windows import Input

T = TypeVar("T")


class MaskError(RaydetectError):
    """A mask is missing, is not an image, or differs in shape from its image."""


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


class Masks:
    """Reads masks by URI; consecutive masks from the same archive open it only once."""

    def __init__(self, storage: Storage, rules: DecodeRules, max_bytes: int) -> None:
        """Creates a reader; nothing is opened yet.

        Args:
            storage: gives access to the masks.
            rules: decoding rules of the images, which apply to their masks too.
            max_bytes: of one encoded mask; larger ones are not read.
        """
        self.rules, self._max_bytes = rules, max_bytes
        self._storage, self._container = storage, ""
        self._archive: Any = None

    def read(self, uri: str) -> bytes:
        """The encoded mask.

        Raises:
            StorageError: it cannot be read, or is too large.
        """
        data = self._read(uri)
        if len(data) > self._max_bytes:
            raise StorageError(f"{uri}: has more than source.max_image_bytes = {self._max_bytes:,} bytes.")
        return data

    def _read(self, uri: str) -> bytes:
        """The encoded mask, or one byte more of it than is allowed."""
        member, _, container = uri.partition("::")
        if not container:
            with self._storage.open(uri) as handle:
                return handle.read(self._max_bytes + 1)
        try:
            if container != self._container:
                scheme = container.partition("://")[0]
                options = {scheme: self._storage.fsspec_options(container)}
                self._archive, _ = fsspec.core.url_to_fs(uri, **options)
                self._container = container
            with self._archive.open(member.partition("://")[2], "rb") as handle:
                return bytes(handle.read(self._max_bytes + 1))
        except Exception as error:
            raise translate(uri, "read", error) from error


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


def read_mask(member: Member, layout: Layout, pixels: Pixels, masks: Masks) -> np.ndarray | None:
    """The mask of an image where its map is, bool (H, W); all False for a normal image, None if unknown.

    `masks.py` defines which levels are a defect, and the orientation of the mask.

    Raises:
        MaskError: it cannot be read, or differs in shape from the image.
    """
    if member.label == 0:
        return np.zeros(layout.canvas, bool)
    if member.mask_uri is None:
        return None
    try:
        data = masks.read(member.mask_uri)
        mask_HW, size = sampled_mask(data, pixels, masks.rules, layout.canvas, layout.box)
    except (StorageError, MemberError) as error:
        message = f"{member.key}: its mask {member.mask_uri} cannot be read ({error}). Repair or remove it."
        raise MaskError(message) from None
    if size != (pixels.width, pixels.height):
        raise MaskError(
            f"{member.key}: is {pixels.width} x {pixels.height} px and its mask {size[0]} x {size[1]}. "
            "Provide a mask of the image's size."
        )
    if layout.looked is not None:
        mask_HW = mask_HW & layout.looked
    return mask_HW if mask_HW.any() else None


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
