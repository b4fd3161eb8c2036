"""Scores decoded images in batches of one size. The result of a batch is fetched after the next one has started."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raydetect.detectors._base import Detector
from raydetect.images.decode import Pixels
from raydetect.scoring.device_queue import Submit, run_now

BATCHES_AHEAD = 1


@dataclass(frozen=True, slots=True)
class Scored:
    """A scored image.

    Attributes:
        position: position of the image in what was scored.
        image_score: raw score.
        is_finite: whether the score and all pixels of the map are finite.
        map_on_device_HW: the map on the detector's device.
    """

    position: int
    image_score: float
    is_finite: bool
    map_on_device_HW: Tensor

    def anomaly_map(self) -> np.ndarray:
        """Copies the map from the device: float32 of shape (H, W)."""
        map_HW: np.ndarray = self.map_on_device_HW.float().cpu().numpy()
        return map_HW


@dataclass(frozen=True, slots=True)
class _Result:
    """Result of a batch of size B: image score, lowest and highest pixel on the host, and maps on the device.

    On a CUDA device the host values are valid once `copied` has happened.
    """

    scores_B3: Tensor
    anomaly_map_BHW: Tensor
    copied: torch.cuda.Event | None


def score_batches(
    detector: Detector, pixels: Iterable[Pixels], batch_size: int, submit: Submit = run_now
) -> Iterator[Scored]:
    """Yields scores of the ok pixels in order; every forward pass has exactly `batch_size` images, padded with zeros.

    Args:
        detector: fitted detector.
        pixels: decoded members; those that are not ok are skipped.
        batch_size: images in one forward pass.
        submit: runs forward passes, which may share a device with others.
    """
    running: deque[tuple[list[int], Future[_Result]]] = deque()
    for positions, images_BHWC in _batches(pixels, batch_size):
        running.append((positions, submit(partial(_forward, detector, images_BHWC))))
        if len(running) > BATCHES_AHEAD:
            yield from _fetched(*running.popleft())
    while running:
        yield from _fetched(*running.popleft())


def _batches(pixels: Iterable[Pixels], batch_size: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields the positions of ok pixels and their padded batch, uint8 of shape (batch_size, H, W, 3)."""
    positions, images = list[int](), list[np.ndarray]()
    for position, item in enumerate(pixels):
        if item.image_HWC is not None:
            positions.append(position)
            images.append(item.image_HWC)
        if len(images) == batch_size:
            yield positions, np.stack(images)
            positions, images = [], []
    if images:
        padding = np.zeros((batch_size - len(images), *images[0].shape), dtype=np.uint8)
        yield positions, np.concatenate([np.stack(images), padding])


def _forward(detector: Detector, batch_BHWC: np.ndarray) -> _Result:
    """Scores a batch without waiting for a CUDA device: copies in both directions use pinned memory."""
    is_cuda = detector.device.type == "cuda"
    host_BHWC = torch.from_numpy(batch_BHWC)
    if is_cuda:
        host_BHWC = host_BHWC.pin_memory()
    with torch.inference_mode():
        scores = detector.score(host_BHWC.permute(0, 3, 1, 2).to(detector.device, non_blocking=True))
        low_B, high_B = scores.anomaly_map_BHW.flatten(1).aminmax(dim=1)  # NaN if a pixel is
        scores_B3 = torch.stack([scores.image_score_B.float(), low_B.float(), high_B.float()], dim=1)
        if not is_cuda:
            return _Result(scores_B3, scores.anomaly_map_BHW, None)
        host_B3 = torch.empty(scores_B3.shape, pin_memory=True)
        host_B3.copy_(scores_B3, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(detector.device))
        return _Result(host_B3, scores.anomaly_map_BHW, copied)


def _fetched(positions: list[int], future: "Future[_Result]") -> Iterator[Scored]:
    result = future.result()
    if result.copied is not None:
        result.copied.synchronize()
    for i, (position, values) in enumerate(zip(positions, result.scores_B3.tolist(), strict=False)):
        yield Scored(position, values[0], all(map(math.isfinite, values)), result.anomaly_map_BHW[i])
