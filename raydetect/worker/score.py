"""The one object that scores: the local run, Ray actors and (later) Serve replicas all use it, so rows are equal.

Batches are cut inside a chunk, never across chunks, and padded to one size: an image meets the same kernels
whatever the number of workers.
"""

import heapq
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from raydetect.artifact_record import Calibration
from raydetect.detectors._base import Detector
from raydetect.metrics.conformal import p_values, threshold_for
from raydetect.records import OK, Chunk, Member, Row
from raydetect.sinks.heatmaps import map_png, overlay_png
from raydetect.spec import FlagSpec, ScoreSpec
from raydetect.worker.artifact import Artifact
from raydetect.worker.preprocess import DecodeRules, Pixels, decode_all, decode_image
from raydetect.worker.read import refuse_bad_member

OVERLAY_MAX_PX = 1024
UNSHARED: AbstractContextManager[object] = nullcontext()


@dataclass(frozen=True, slots=True)
class Scored:
    """One scored image of a chunk: its place, score and map."""

    position: int
    image_score: float
    anomaly_map_HW: np.ndarray


@dataclass(slots=True)
class ChunkResult:
    """Everything that a chunk leaves: rows in order of members, PNG bytes by position, clipped pixels of maps."""

    rows: list[Row]
    pictures: dict[int, bytes]
    clipped_pixels: int = 0


def score_batches(
    detector: Detector, pixels: Iterable[Pixels], batch_size: int, lock: AbstractContextManager[object] = UNSHARED
) -> Iterator[Scored]:
    """Scores of the ok pixels, in order; every forward pass sees exactly `batch_size` images (zeros fill up).

    Args:
        detector: fitted.
        pixels: decoded members; those that are not ok are passed over.
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
    places, images = zip(*waiting, strict=True)
    batch_BHWC = np.zeros((batch_size, *images[0].shape), dtype=np.uint8)
    batch_BHWC[: len(images)] = np.stack(images)
    images_BCHW = torch.from_numpy(batch_BHWC).permute(0, 3, 1, 2).to(detector.device)
    with lock, torch.inference_mode():
        scores = detector.score(images_BCHW)
        image_score_B = scores.image_score_B.float().cpu().numpy()
        anomaly_map_BHW = scores.anomaly_map_BHW.float().cpu().numpy()
    for i, position in enumerate(places):
        yield Scored(position, float(image_score_B[i]), anomaly_map_BHW[i])


class Decision:
    """p-values, threshold and flags of image scores under one calibration and one flag rule."""

    def __init__(self, flag: FlagSpec, calibration: Calibration) -> None:
        """Precomputes the threshold.

        Raises:
            SpecError: the calibration is too small for `flag.alpha`.
        """
        self._scores = np.asarray(calibration.scores, dtype=np.float64)
        if flag.threshold is not None:
            self.threshold = flag.threshold
        else:
            assert flag.alpha is not None
            self.threshold = threshold_for(self._scores, flag.alpha)

    def of(self, image_score: float) -> tuple[float, bool]:
        """(p-value, flagged) of one image score."""
        p_value = float(p_values(self._scores, np.asarray([image_score]))[0])
        return p_value, image_score >= self.threshold


class Scorer:
    """Scores chunks with one artifact. Threads may share it: decoding overlaps, forward passes take turns."""

    def __init__(self, artifact: Artifact, spec: ScoreSpec, device: str = "cpu") -> None:
        """Moves the detector to the device.

        Args:
            artifact: loaded.
            spec: what the job file says of source, sink, flag and batch size.
            device: torch device name.
        """
        self.artifact = artifact
        self.spec = spec
        self.detector = artifact.detector.to(torch.device(device))
        calibration = artifact.record.calibration
        self.decision = Decision(spec.flag, calibration)
        self.map_low, self.map_high = calibration.map_scale()
        self.rules = DecodeRules.of(spec.source)
        self.decode_threads = spec.resources.cpus_per_worker
        self._lock = threading.Lock()

    def score_chunk(self, chunk: Chunk) -> ChunkResult:
        """Rows and heatmaps of a chunk.

        Raises:
            BadMemberError: an image is bad and the source says `on_bad_member: fail`.
        """
        headers: list[Pixels] = []
        decoded = decode_all(chunk.members, self.rules, self.artifact.record.image_size, self.decode_threads)
        rows: dict[int, Row] = {}
        result = ChunkResult([], {})
        for scored in self._chosen(
            score_batches(self.detector, _tee(decoded, headers), self.spec.batch_size, self._lock),
            chunk,
            rows,
        ):
            self._draw(scored, chunk, result)
        for position, (member, header) in enumerate(zip(chunk.members, headers, strict=True)):
            row = rows.get(position) or self._bad_row(member, chunk, header)
            result.rows.append(replace(row, width=header.width, height=header.height))
        return result

    def _chosen(self, scored: Iterator[Scored], chunk: Chunk, rows: dict[int, Row]) -> Iterator[Scored]:
        """Makes the row of every image and passes on those that get a heatmap."""
        heatmaps = self.spec.sink.heatmaps
        best: list[tuple[float, int, Scored]] = []
        for item in scored:
            row = self._row(item, chunk)
            rows[item.position] = row
            if row.status != OK:
                continue
            if heatmaps == "all" or (heatmaps == "flagged" and row.flagged):
                yield item
            elif heatmaps == "top_k":
                heapq.heappush(best, (item.image_score, -item.position, item))
                if len(best) > self.spec.sink.top_k:
                    heapq.heappop(best)
        yield from (item for _, _, item in sorted(best, key=lambda entry: -entry[1]))

    def _row(self, item: Scored, chunk: Chunk) -> Row:
        base = self._base_row(chunk.members[item.position], chunk)
        if not (math.isfinite(item.image_score) and np.isfinite(item.anomaly_map_HW).all()):
            message = f"{base.key}: the detector returned a score or map that is not finite. Report the image."
            return replace(base, status="not_finite", error=message)
        p_value, flagged = self.decision.of(item.image_score)
        return replace(
            base,
            image_score=item.image_score,
            p_value=p_value,
            threshold=self.decision.threshold,
            flagged=flagged,
        )

    def _bad_row(self, member: Member, chunk: Chunk, header: Pixels) -> Row:
        refuse_bad_member(header.status, header.error, self.spec.source)
        return replace(self._base_row(member, chunk), status=header.status, error=header.error)

    def _base_row(self, member: Member, chunk: Chunk) -> Row:
        return Row(
            key=member.key,
            image_uri=member.image_uri,
            chunk=chunk.id,
            status=OK,
            artifact=self.artifact.record.digest,
            label=member.label,
            category=member.category,
            defect=member.defect,
            mask_uri=member.mask_uri,
            meta=member.meta,
        )

    def _draw(self, item: Scored, chunk: Chunk, result: ChunkResult) -> None:
        if self.spec.sink.style == "map":
            picture, clipped = map_png(item.anomaly_map_HW, self.map_low, self.map_high)
            result.clipped_pixels += clipped
        else:
            image = decode_image(chunk.members[item.position].data, self.rules)
            image.thumbnail((OVERLAY_MAX_PX, OVERLAY_MAX_PX))
            picture = overlay_png(np.asarray(image), item.anomaly_map_HW, self.map_low, self.map_high)
        result.pictures[item.position] = picture


def _tee(pixels: Iterable[Pixels], headers: list[Pixels]) -> Iterator[Pixels]:
    """Passes pixels on and keeps what is known of each without its picture."""
    for item in pixels:
        headers.append(replace(item, image_HWC=None))
        yield item
