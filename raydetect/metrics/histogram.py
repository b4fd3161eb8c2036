"""Counts of numbers on a grid that grows with them: one pass, bounded memory, and exactly mergeable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_BINS = 1024
PLACES = 40  # bits of a bin's number, at most: keeps it exact in a float64 and in JSON
LEAST_EXPONENT = -200


@dataclass(slots=True)
class Histogram:
    """Bin `i` counts the numbers in [i, i + 1) * 2**exponent.

    The width is the smallest power of two with which at most MAX_BINS bins reach from the lowest number to the
    highest. Halving the number of bins loses nothing but detail, so the counts do not depend on the order in which
    numbers come, nor on how they were divided before merging.

    Attributes:
        exponent: of the width.
        first: number of the first bin.
        counts: int64, from the first bin on.
        low: lowest number added; infinite while there is none.
        high: highest.
    """

    exponent: int = LEAST_EXPONENT
    first: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    low: float = math.inf
    high: float = -math.inf

    @property
    def total(self) -> int:
        """How many numbers were added."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Of one bin."""
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
            raise ValueError("a histogram counts finite numbers; leave failed images out by their status.")
        low, high = float(values_N.min()), float(values_N.max())
        self._widen(min(self.low, low), max(self.high, high))
        places_N = _place(values_N, self.exponent)
        self._cover(int(places_N.min()), int(places_N.max()) + 1)
        self.counts += np.bincount(places_N - self.first, minlength=len(self.counts))

    def merge(self, other: "Histogram") -> None:
        """Adds what another one counted."""
        if not other.total:
            return
        self._widen(min(self.low, other.low), max(self.high, other.high))
        more = other.coarsened(self.exponent)
        self._cover(more.first, more.first + len(more.counts))
        start = more.first - self.first
        self.counts[start : start + len(more.counts)] += more.counts

    def coarsened(self, exponent: int) -> "Histogram":
        """The same counts in bins of width 2**exponent, which is not finer."""
        if exponent == self.exponent or not len(self.counts):
            return Histogram(exponent, self.first, self.counts.copy(), self.low, self.high)
        shift = min(exponent - self.exponent, 62)
        places = (self.first + np.arange(len(self.counts), dtype=np.int64)) >> shift
        first = int(places[0])
        return Histogram(exponent, first, _summed(places - first, self.counts), self.low, self.high)

    def with_bins(self, most: int) -> "Histogram":
        """The finest coarsening with at most `most` bins, at least 2."""
        found = self
        while len(found.counts) > most:
            found = found.coarsened(found.exponent + 1)
        return found

    def quantile(self, share: float) -> float:
        """The number below which `share` of all lie, off by at most one width; NaN when there is none."""
        if not self.total:
            return math.nan
        reached = np.cumsum(self.counts)
        target = share * self.total
        place = int(np.searchsorted(reached, target, side="left"))
        before = float(reached[place] - self.counts[place])
        inside = (target - before) / float(self.counts[place]) if self.counts[place] else 0.0
        return float(np.clip((self.first + place + inside) * self.width, self.low, self.high))

    def plain(self) -> dict[str, Any]:
        """For JSON."""
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
        """From `plain`.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
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


def _place(values_N: np.ndarray, exponent: int) -> np.ndarray:
    places_N: np.ndarray = np.floor(np.ldexp(values_N, -exponent)).astype(np.int64)
    return places_N


def _exponent(low: float, high: float) -> int:
    """Depends on the lowest and the highest number alone, and grows when they move apart."""
    largest = max(abs(low), abs(high))
    exponent = max(LEAST_EXPONENT, math.frexp(largest)[1] - PLACES) if largest else LEAST_EXPONENT
    ends = np.asarray([low, high])
    while True:
        first, last = _place(ends, exponent)
        if last - first < MAX_BINS:
            return exponent
        exponent += max(1, math.frexp((last - first + 1) / MAX_BINS)[1] - 1)


def _summed(places: np.ndarray, counts: np.ndarray) -> np.ndarray:
    summed = np.zeros(int(places[-1]) + 1, dtype=np.int64)
    np.add.at(summed, places, counts)
    return summed
