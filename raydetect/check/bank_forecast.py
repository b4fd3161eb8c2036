"""Measures how long a detector takes to build its memory bank, and extrapolates to more images."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import PAD_KEY, FitState
from raydetect.detectors._base import Detector
from raydetect.fitting.collect import padded_batches
from raydetect.fitting.image_cache import ImageCache

LONG_SECONDS = 2.0  # of one bank; banks that take less are mostly overhead
Measured = Sequence[tuple[int, float]]
"""(inputs, seconds) of banks, each of twice as many inputs as the one before."""


class BankForecast:
    """A detector's rows of a few inputs, of which banks are built.

    Attributes:
        seconds_per_input: of the forward pass that collects rows.
    """

    def __init__(self, detector: Detector, cache: ImageCache, keys: list[str], batch_size: int) -> None:
        """Collects the rows of the inputs of a cache, twice."""
        self._detector = detector
        self._batches = [batch for _, batch in padded_batches(cache, keys, batch_size, detector.device)]
        self._inputs = len(keys)
        self._collected()  # the first time is slower
        began = time.perf_counter()
        self._rows = self._collected()
        self.seconds_per_input = (time.perf_counter() - began) / self._inputs

    def measure(self, wanted: int, max_bytes: int) -> Measured:
        """Builds larger and larger banks, until one has all inputs or takes long.

        Args:
            wanted: inputs of the fit; rows are repeated where there are more than were collected.
            max_bytes: memory for the rows.
        """
        count = min(self._inputs, wanted)
        self._build(count, max_bytes)  # the first time is slower
        measured = [(count, self._build(count, max_bytes))]
        while count < wanted and (measured[-1][1] < LONG_SECONDS or len(measured) == 1):
            count = min(2 * count, wanted)
            measured.append((count, self._build(count, max_bytes)))
        return measured

    def _collected(self) -> list[dict[str, Tensor]]:
        with torch.inference_mode():
            return [self._detector.collect(batch) for batch in self._batches]

    def _build(self, count: int, max_bytes: int) -> float:
        state, left = FitState(Group(), max_bytes), count
        while left > 0:
            for batch, rows in zip(self._batches, self._rows, strict=True):
                names = [key if key == PAD_KEY else f"{key}@{left}" for key in batch.keys]
                names = [name if place < left else PAD_KEY for place, name in enumerate(names)]
                state.add(names, rows)
                left -= sum(name != PAD_KEY for name in names)
        state.agree()
        began = time.perf_counter()
        self._detector.finish(state, lambda done, total: None)
        return time.perf_counter() - began


def extrapolated(measured: Measured, wanted: float) -> float:
    """Seconds of a bank of `wanted` inputs, as a part that grows with their number and one that grows with its square.

    A bank of measured size, or smaller than the largest, is interpolated; a part that would be negative is left out.
    """
    counts, seconds = np.array([count for count, _ in measured], float), np.array([time for _, time in measured])
    if wanted <= counts[-1] or len(measured) == 1:
        return float(seconds[-1] * wanted / counts[-1])
    (few, quick), (many, slow) = measured[-2:]
    quadratic = (slow / many - quick / few) / (many - few)
    quadratic = min(max(quadratic, 0.0), slow / many**2)
    return float((slow / many - quadratic * many) * wanted + quadratic * wanted**2)
