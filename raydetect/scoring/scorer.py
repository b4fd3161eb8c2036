"""Scores chunks. Local runs, Ray actors and Serve replicas all use the same Scorer, so their rows are equal.

Batches never span chunks and are padded to one size, so an image is processed by the same kernels for any number of
workers. With a fleet, the images of a chunk are grouped by category and batched per group, so an image gets the same
row as with its category's artifact alone.
"""

import heapq
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from raydetect.archives.chunks import refuse_bad_member
from raydetect.artifacts.fleet import ArtifactRef
from raydetect.artifacts.store import DetectorSource
from raydetect.config import Heatmaps, ScoreSpec
from raydetect.config.validation import nearest
from raydetect.detectors._base import Detector
from raydetect.images.decode import Pixels, decode_all, decode_image
from raydetect.images.opening import DecodeRules
from raydetect.records import OK, Chunk, Member, Row
from raydetect.scoring.decision import DetectorCache, LoadedDetector
from raydetect.sinks.heatmaps import map_png, overlay_png

OVERLAY_MAX_PX = 1024
NAMED_CATEGORIES = 8  # limits the length of `error` in every row
UNSHARED: AbstractContextManager[object] = nullcontext()


@dataclass(frozen=True, slots=True)
class Scored:
    """One scored image of a chunk: its position, score and map."""

    position: int
    image_score: float
    anomaly_map_HW: np.ndarray


@dataclass(slots=True)
class ChunkResult:
    """Results of a chunk: rows in member order, heatmap PNG bytes by position, and clipped pixels of maps."""

    rows: list[Row]
    pictures: dict[int, bytes]
    clipped_pixels: int = 0


@dataclass(slots=True)
class _Work:
    """State of a chunk while it is scored; headers and rows by position."""

    chunk: Chunk
    wanted: tuple[Heatmaps, ...]
    headers: dict[int, Pixels] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    result: ChunkResult = field(default_factory=lambda: ChunkResult([], {}))


def score_batches(
    detector: Detector, pixels: Iterable[Pixels], batch_size: int, lock: AbstractContextManager[object] = UNSHARED
) -> Iterator[Scored]:
    """Yields scores of the ok pixels in order; every forward pass has exactly `batch_size` images, padded with zeros.

    Args:
        detector: fitted detector.
        pixels: decoded members; those that are not ok are skipped.
        batch_size: images in one forward pass.
        lock: held during forward passes when several threads share the device.
    """
    waiting: deque[tuple[int, np.ndarray]] = deque()
    for position, item in enumerate(pixels):
        if item.image_HWC is not None:
            waiting.append((position, item.image_HWC))
        if len(waiting) == batch_size:
            yield from _score_batch(detector, waiting, batch_size, lock)
            waiting.clear()
    if waiting:
        yield from _score_batch(detector, waiting, batch_size, lock)


def _score_batch(
    detector: Detector,
    waiting: Iterable[tuple[int, np.ndarray]],
    batch_size: int,
    lock: AbstractContextManager[object],
) -> Iterator[Scored]:
    positions, images = zip(*waiting, strict=True)
    batch_BHWC = np.zeros((batch_size, *images[0].shape), dtype=np.uint8)
    batch_BHWC[: len(images)] = np.stack(images)
    images_BCHW = torch.from_numpy(batch_BHWC).permute(0, 3, 1, 2).to(detector.device)
    with lock, torch.inference_mode():
        scores = detector.score(images_BCHW)
        image_score_B = scores.image_score_B.float().cpu().numpy()
        anomaly_map_BHW = scores.anomaly_map_BHW.float().cpu().numpy()
    for i, position in enumerate(positions):
        yield Scored(position, float(image_score_B[i]), anomaly_map_BHW[i])


class Scorer:
    """Scores chunks with one artifact or a fleet. Threads may share it: decoding overlaps, forward passes do not."""

    def __init__(
        self,
        source: DetectorSource,
        spec: ScoreSpec,
        device: str = "cpu",
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        """Loads a single artifact at once, and the detectors of a fleet on demand.

        Args:
            source: a loaded artifact, or the stored artifacts of an index.
            spec: the job's source, sink, flag, batch size and resources.
            device: torch device name.
            lock: held during forward passes if the device is shared.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit `flag`.
        """
        self.index = source.index
        self.spec = spec
        self.detectors = DetectorCache(source, spec.flag, torch.device(device), spec.resources.detectors_in_memory)
        self.rules = DecodeRules.of(spec.source)
        self.decode_threads = spec.resources.cpus_per_worker
        self._lock = lock or threading.Lock()

    def score_chunk(self, chunk: Chunk, wanted: Sequence[Heatmaps] = ()) -> ChunkResult:
        """Scores a chunk.

        Args:
            chunk: encoded images.
            wanted: heatmap setting of each image; empty = that of the spec.

        Raises:
            ArtifactError: the detector of a category cannot be loaded.
            BadMemberError: an image is bad and the source has `on_bad_member: fail`.
        """
        work = _Work(chunk, tuple(wanted) or (self.spec.sink.heatmaps,) * len(chunk.members))
        for ref, positions in self._groups(chunk):
            self._score_group(ref, positions, work)
        for position, member in enumerate(chunk.members):
            header = work.headers.get(position) or self._undecoded(member)
            row = work.rows.get(position) or self._bad_row(member, chunk, header)
            work.result.rows.append(replace(row, **header.facts()))
        return work.result

    def _groups(self, chunk: Chunk) -> list[tuple[ArtifactRef, list[int]]]:
        """Positions of readable images by the artifact that scores them, sorted by artifact."""
        groups: dict[ArtifactRef, list[int]] = {}
        for position, member in enumerate(chunk.members):
            ref = self.index.for_category(member.category)
            if ref is not None and member.status == OK:
                groups.setdefault(ref, []).append(position)
        return sorted(groups.items())

    def _score_group(self, ref: ArtifactRef, positions: list[int], work: "_Work") -> None:
        """Scores the images of one artifact. Keeps no reference to the detector, so that it can be evicted."""
        loaded = self.detectors.get(ref)
        for scored in self._chosen(self._scored(loaded, positions, work), loaded, work):
            self._draw(scored, loaded, work)

    def _scored(self, loaded: LoadedDetector, positions: list[int], work: "_Work") -> Iterator[Scored]:
        """Scores the images at `positions`; stores their headers in `work`."""
        members = [work.chunk.members[position] for position in positions]
        decoded = decode_all(members, self.rules, loaded.preprocess, self.decode_threads)
        noted = _note(decoded, positions, work.headers)
        for item in score_batches(loaded.detector, noted, self.spec.batch_size, self._lock):
            yield replace(item, position=positions[item.position])

    def _chosen(self, scored: Iterable[Scored], loaded: LoadedDetector, work: "_Work") -> Iterator[Scored]:
        """Creates the row of every image and yields the images that get a heatmap.

        `top_k` compares images of one artifact only, since raw scores of different detectors are not comparable.
        """
        best: list[tuple[float, int, Scored]] = []
        for item in scored:
            row = self._row(item, loaded, work.chunk)
            work.rows[item.position] = row
            if row.status != OK:
                continue
            heatmaps = work.wanted[item.position]
            if heatmaps == "all" or (heatmaps == "flagged" and loaded.decision.may_flag(item.image_score)):
                yield item
            elif heatmaps == "top_k":
                heapq.heappush(best, (item.image_score, -item.position, item))
                if len(best) > self.spec.sink.top_k:
                    heapq.heappop(best)
        yield from (item for _, _, item in sorted(best, key=lambda entry: -entry[1]))

    def _row(self, item: Scored, loaded: LoadedDetector, chunk: Chunk) -> Row:
        base = self._base_row(chunk.members[item.position], chunk)
        if not (math.isfinite(item.image_score) and np.isfinite(item.anomaly_map_HW).all()):
            message = f"{base.key}: the detector returned a score or map that is not finite. Report the image."
            return replace(base, status="not_finite", error=message)
        p_value, flagged = loaded.decision.of(item.image_score)
        return replace(
            base,
            image_score=item.image_score,
            p_value=p_value,
            threshold=loaded.decision.threshold,
            flagged=flagged,
        )

    def _undecoded(self, member: Member) -> Pixels:
        """Why a member was not decoded: it could not be read, or there is no detector for its category."""
        if member.status != OK:
            return Pixels(None, status=member.status, error=member.error, notes=member.notes)
        error = f"{member.key}: {self._unknown(member.category)}"
        return Pixels(None, status="unknown_category", error=error, notes=member.notes)

    def _unknown(self, category: str | None) -> str:
        if category is None:
            return "has no category, which a fleet needs. Set it with source.pattern, a sidecar or a column."
        known = list(self.index.categories)
        near = nearest(category, known)
        if len(known) > NAMED_CATEGORIES:
            near = f"{near.partition(' Known:')[0]} It has {len(known):,} others."
        return f"the fleet has no detector for category {category!r}.{near}"

    def _bad_row(self, member: Member, chunk: Chunk, header: Pixels) -> Row:
        refuse_bad_member(header.status, header.error, self.spec.source)
        return replace(self._base_row(member, chunk), status=header.status, error=header.error)

    def _base_row(self, member: Member, chunk: Chunk) -> Row:
        ref = self.index.for_category(member.category)
        return Row(
            key=member.key,
            image_uri=member.image_uri,
            chunk=chunk.id,
            status=OK,
            artifact=ref.digest if ref is not None else self.index.digest,
            label=member.label,
            category=member.category,
            defect=member.defect,
            mask_uri=member.mask_uri,
            meta=member.meta,
        )

    def _draw(self, item: Scored, loaded: LoadedDetector, work: "_Work") -> None:
        if self.spec.sink.style == "map":
            picture, clipped = map_png(item.anomaly_map_HW, loaded.map_low, loaded.map_high)
            work.result.clipped_pixels += clipped
        else:
            image = decode_image(work.chunk.members[item.position].data, self.rules, OVERLAY_MAX_PX)
            picture = overlay_png(np.asarray(image), item.anomaly_map_HW, loaded.map_low, loaded.map_high)
        work.result.pictures[item.position] = picture


def _note(pixels: Iterable[Pixels], positions: list[int], headers: dict[int, Pixels]) -> Iterator[Pixels]:
    """Yields pixels unchanged and stores each without its image in `headers`."""
    for position, item in zip(positions, pixels, strict=True):
        headers[position] = replace(item, image_HWC=None)
        yield item
