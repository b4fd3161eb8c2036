"""A histogram on a grid that grows with the data: one pass, bounded memory, and exactly mergeable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_BINS = 1024
INDEX_BITS = 40  # maximum bits of a bin's index, which keeps it exact in a float64 and in JSON
LEAST_EXPONENT = -200


@dataclass(slots=True)
class Histogram:
    """A histogram whose bin `i` counts the numbers in [i, i + 1) * 2**exponent.

    The bin width is the smallest power of two for which at most MAX_BINS bins cover the range from the lowest number to
    the highest. Halving the number of bins loses only resolution, so the counts do not depend on the order of the
    numbers or on how they were split before merging.

    Attributes:
        exponent: of the bin width.
        first: index of the first bin.
        counts: int64, from the first bin on.
        low: lowest number added; infinite while there is none.
        high: highest number added.
    """

    exponent: int = LEAST_EXPONENT
    first: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    low: float = math.inf
    high: float = -math.inf

    @property
    def total(self) -> int:
        """Number of values added."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def add(self, values_N: np.ndarray) -> None:
        """Counts numbers.

        Raises:
            ValueError: one is not finite.
        """
        values_N = np.asarray(values_N, dtype=np.float64).ravel()
        if not len(values_N):
            return
        if not np.isfinite(values_N).all():
            raise ValueError("a histogram counts finite numbers only; exclude failed images by their status.")
        low, high = float(values_N.min()), float(values_N.max())
        self._widen(min(self.low, low), max(self.high, high))
        indices_N = _bin_indices(values_N, self.exponent)
        self._cover(int(indices_N.min()), int(indices_N.max()) + 1)
        self.counts += np.bincount(indices_N - self.first, minlength=len(self.counts))

    def merge(self, other: "Histogram") -> None:
        """Adds the counts of another histogram."""
        if not other.total:
            return
        self._widen(min(self.low, other.low), max(self.high, other.high))
        more = other.coarsened(self.exponent)
        self._cover(more.first, more.first + len(more.counts))
        start = more.first - self.first
        self.counts[start : start + len(more.counts)] += more.counts

    def coarsened(self, exponent: int) -> "Histogram":
        """The same counts in bins of width 2**exponent, at least the current width."""
        if exponent == self.exponent or not len(self.counts):
            return Histogram(exponent, self.first, self.counts.copy(), self.low, self.high)
        shift = min(exponent - self.exponent, 62)
        indices = (self.first + np.arange(len(self.counts), dtype=np.int64)) >> shift
        first = int(indices[0])
        return Histogram(exponent, first, _summed(indices - first, self.counts), self.low, self.high)

    def with_bins(self, most: int) -> "Histogram":
        """The finest coarsening with at most `most` bins, at least 2."""
        found = self
        while len(found.counts) > most:
            found = found.coarsened(found.exponent + 1)
        return found

    def quantile(self, share: float) -> float:
        """The value below which `share` of the numbers lie, within one bin width; NaN if the histogram is empty."""
        if not self.total:
            return math.nan
        reached = np.cumsum(self.counts)
        target = share * self.total
        position = int(np.searchsorted(reached, target, side="left"))
        before = float(reached[position] - self.counts[position])
        inside = (target - before) / float(self.counts[position]) if self.counts[position] else 0.0
        return float(np.clip((self.first + position + inside) * self.width, self.low, self.high))

    def plain(self) -> dict[str, Any]:
        """Converts to JSON types."""
        if not self.total:
            return {"counts": []}
        return {
            "exponent": self.exponent,
            "first": self.first,
            "counts": [int(count) for count in self.counts],
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def of_plain(cls, body: Mapping[str, Any]) -> "Histogram":
        """Restores a histogram from `plain`.

        Raises:
            ValueError, KeyError, TypeError: `body` is not such an object.
        """
        if not body["counts"]:
            return cls()
        counts = np.asarray(body["counts"], dtype=np.int64)
        return cls(int(body["exponent"]), int(body["first"]), counts, float(body["low"]), float(body["high"]))

    def _widen(self, low: float, high: float) -> None:
        exponent = _exponent(low, high)
        if exponent > self.exponent:
            wider = self.coarsened(exponent)
            self.exponent, self.first, self.counts = exponent, wider.first, wider.counts
        self.low, self.high = low, high

    def _cover(self, start: int, stop: int) -> None:
        if not len(self.counts):
            self.first, self.counts = start, np.zeros(stop - start, dtype=np.int64)
            return
        left = max(0, self.first - start)
        right = max(0, stop - self.first - len(self.counts))
        self.counts = np.pad(self.counts, (left, right))
        self.first -= left


def _bin_indices(values_N: np.ndarray, exponent: int) -> np.ndarray:
    indices_N: np.ndarray = np.floor(np.ldexp(values_N, -exponent)).astype(np.int64)
    # the quotient of a tiny negative number underflows to 0
    return np.where(values_N < 0, np.minimum(indices_N, -1), indices_N)


def _exponent(low: float, high: float) -> int:
    """The exponent of the bin width; depends only on the lowest and highest number and grows with their distance."""
    largest = max(abs(low), abs(high))
    exponent = max(LEAST_EXPONENT, math.frexp(largest)[1] - INDEX_BITS) if largest else LEAST_EXPONENT
    ends = np.asarray([low, high])
    while True:
        first, last = _bin_indices(ends, exponent)
        if last - first < MAX_BINS:
            return exponent
        exponent += max(1, math.frexp((last - first + 1) / MAX_BINS)[1] - 1)


def _summed(indices: np.ndarray, counts: np.ndarray) -> np.ndarray:
    summed = np.zeros(int(indices[-1]) + 1, dtype=np.int64)
    np.add.at(summed, indices, counts)
    return summed
