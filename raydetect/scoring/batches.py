"""Scores inputs in batches of one size and puts the results of a picture's windows together.

The result of a batch is fetched after the next one has started. The thread of the device does nothing but score: on a
CPU, the threads that fetch results look for their extremes.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raydetect.detectors._base import Detector, Scores
from raydetect.images.decode import Pixels
from raydetect.records import OK
from raydetect.scoring.device_queue import Submit, run_now
from raydetect.scoring.stitching import Stitched
from raydetect.views.view import Layout
from raydetect.views.windows import Input

BATCHES_AHEAD = 1


@dataclass(frozen=True, slots=True)
class Scored:
    """A scored image.

    Attributes:
        position: position of the image in what was scored.
        image_score: raw score; of a picture in tiles, the highest of its tiles'.
        is_finite: whether the score and all pixels of the map are finite.
        map_on_device_HW: the map on the detector's device, NaN where the image is not looked at.
        layout: where the map belongs in the picture.
    """

    position: int
    image_score: float
    is_finite: bool
    map_on_device_HW: Tensor
    layout: Layout

    def anomaly_map(self) -> np.ndarray:
        """Copies the map from the device: float32 of shape (H, W), NaN where the image is not looked at."""
        map_HW: np.ndarray = self.map_on_device_HW.float().cpu().numpy()
        return map_HW

    def on_host(self) -> "Scored":
        """The same with a map that has left the device already, to read it more than once."""
        return replace(self, map_on_device_HW=self.map_on_device_HW.float().cpu())


@dataclass(frozen=True, slots=True)
class _Result:
    """Result of a batch of size B.

    Attributes:
        anomaly_map_BHW: maps on the device.
        values: waits for the device; returns image score, lowest and highest pixel of each input.
    """

    anomaly_map_BHW: Tensor
    values: Callable[[], list[list[float]]]


def score_batches(
    detector: Detector,
    decoded: Iterable[Input | Pixels],
    batch_size: int,
    submit: Submit = run_now,
    by_map: bool | None = None,
) -> Iterator[Scored]:
    """Yields the scores of ok images in order; every forward pass has exactly `batch_size` inputs, padded with zeros.

    Args:
        detector: fitted detector.
        decoded: of every image its inputs and then its `Pixels`, as from `decode_stream`; those that are not ok are
            skipped.
        batch_size: inputs in one forward pass.
        submit: runs forward passes, which may share a device with others.
        by_map: whether image scores come from maps if the view ignores pixels; None = as the detector says.
    """
    by_map = detector.scores_by_map if by_map is None else by_map
    running: deque[tuple[list[Entry], Future[_Result]]] = deque()
    pictures = _Pictures()
    for entries, images_BHWC in _batches(decoded, batch_size, pictures):
        looked_BHW = _looked(entries, images_BHWC) if by_map else None
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)
        running.append((entries, submit(partial(_forward, detector, images_BCHW, looked_BHW))))
        if len(running) > BATCHES_AHEAD:
            _fetch(*running.popleft())
            yield from pictures.complete()
    while running:
        _fetch(*running.popleft())
        yield from pictures.complete()


Entry = tuple[Stitched, Input]


class _Pictures:
    """Pictures whose inputs are being scored, in order."""

    def __init__(self) -> None:
        self._open: deque[tuple[int, Stitched]] = deque()
        self._seen = 0

    def entry(self, item: Input) -> Entry:
        """Assigns an input to its picture."""
        if not self._open or self._open[-1][0] != self._seen:
            self._open.append((self._seen, Stitched(item.layout)))
        stitched = self._open[-1][1]
        stitched.waiting += 1
        return stitched, item

    def end(self, pixels: Pixels) -> None:
        """Notes that all inputs of a picture were seen; forgets it if it is bad."""
        if self._open and self._open[-1][0] == self._seen:
            self._open[-1][1].has_all = True
            if pixels.status != OK:
                self._open.pop()
        self._seen += 1

    def complete(self) -> Iterator[Scored]:
        """Yields the pictures whose inputs are all scored."""
        while self._open and self._open[0][1].is_complete:
            position, stitched = self._open.popleft()
            yield Scored(position, stitched.score, stitched.is_finite, stitched.anomaly_map(), stitched.layout)


def _batches(
    decoded: Iterable[Input | Pixels], batch_size: int, pictures: _Pictures
) -> Iterator[tuple[list[Entry], np.ndarray]]:
    """Yields inputs and their padded batch, uint8 of shape (batch_size, H, W, 3)."""
    entries, images = list[Entry](), list[np.ndarray]()
    for item in decoded:
        if isinstance(item, Pixels):
            pictures.end(item)
            continue
        entries.append(pictures.entry(item))
        images.append(item.image_HWC)
        if len(images) == batch_size:
            yield entries, np.stack(images)
            entries, images = [], []
    if images:
        padding = np.zeros((batch_size - len(images), *images[0].shape), dtype=np.uint8)
        yield entries, np.concatenate([np.stack(images), padding])


def _looked(entries: list[Entry], batch_BHWC: np.ndarray) -> np.ndarray | None:
    """The pixels that are looked at, bool (batch_size, H, W), if the view ignores some."""
    if not entries[0][1].layout.ignores:
        return None
    looked_BHW = np.ones(batch_BHWC.shape[:3], bool)
    for i, (_, item) in enumerate(entries):
        if item.looked_HW is not None:
            looked_BHW[i] = item.looked_HW
    return looked_BHW


def _forward(detector: Detector, batch_BCHW: Tensor, looked_BHW: np.ndarray | None = None) -> _Result:
    """Scores a batch without waiting for a CUDA device: copies in both directions use pinned memory.

    Args:
        detector: fitted detector.
        batch_BCHW: uint8 RGB on the host, channels last in memory.
        looked_BHW: the pixels from whose map the image score is taken; None = the detector's own score.
    """
    with torch.inference_mode():
        if detector.device.type != "cuda":
            scores = detector.score(batch_BCHW)
            return _Result(scores.anomaly_map_BHW, partial(_values, scores, looked_BHW))
        scores = detector.score(batch_BCHW.pin_memory().to(detector.device, non_blocking=True))
        values_B3 = _values_on_device(scores, looked_BHW)
        host_B3 = torch.empty(values_B3.shape, pin_memory=True)
        host_B3.copy_(values_B3, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(detector.device))
        return _Result(scores.anomaly_map_BHW, partial(_copied, host_B3, copied))


def _values(scores: Scores, looked_BHW: np.ndarray | None) -> list[list[float]]:
    """Image score, lowest and highest pixel of each input, by NumPy: torch would start threads of its own here."""
    maps_BHW = scores.anomaly_map_BHW.float().numpy()
    score_B = scores.image_score_B.float().numpy()
    if looked_BHW is not None:
        score_B = np.where(looked_BHW, maps_BHW, -np.inf).max(axis=(1, 2))
    values_B3 = np.stack([score_B, maps_BHW.min(axis=(1, 2)), maps_BHW.max(axis=(1, 2))], axis=1)  # NaN if a pixel is
    values: list[list[float]] = values_B3.tolist()
    return values


def _values_on_device(scores: Scores, looked_BHW: np.ndarray | None) -> Tensor:
    """The same as `_values`, float32 (B, 3) on the device."""
    low_B, high_B = scores.anomaly_map_BHW.flatten(1).aminmax(dim=1)
    score_B = scores.image_score_B
    if looked_BHW is not None:
        looked = torch.from_numpy(looked_BHW).to(scores.anomaly_map_BHW.device, non_blocking=True)
        score_B = torch.where(looked, scores.anomaly_map_BHW, -math.inf).flatten(1).amax(1)
    return torch.stack([score_B.float(), low_B.float(), high_B.float()], dim=1)


def _copied(host_B3: Tensor, copied: torch.cuda.Event) -> list[list[float]]:
    copied.synchronize()
    values: list[list[float]] = host_B3.tolist()
    return values


def _fetch(entries: list[Entry], future: "Future[_Result]") -> None:
    """Waits for a batch and gives each result to its picture."""
    result = future.result()
    found = zip(entries, result.values(), result.anomaly_map_BHW.unbind(), strict=False)  # shorter without the padding
    for (stitched, item), values, map_HW in found:
        stitched.add(item.window, values[0], all(map(math.isfinite, values)), map_HW)
