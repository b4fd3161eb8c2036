"""Mergeable histograms of float32 scores on one fixed scale: the order of the float32 numbers themselves.

The bin of a score is the number of float32 values below it, without its last `shift` bits. So no range is chosen,
nothing is clamped, and scores in a higher bin are larger, for any detector. A histogram starts exact (`shift` 0, one
bin per value) and drops one more bit of resolution whenever it would hold more than `limit` bins. Its resolution
depends only on the set of scores: merging is associative and commutative to the bit, and memory is bounded by `limit`.
"""

from dataclasses import dataclass

import numpy as np

SIGN = np.uint32(1 << 31)
WAITING_SHARE, WAITING_PARTS = 4, 512  # a builder merges beyond 4 times its limit of bins, or at 512 parts


@dataclass(frozen=True, slots=True)
class ScoreBins:
    """Integer counts by bin.

    Attributes:
        limit: maximum number of bins.
        shift: number of dropped bits; 0 = exact.
        bins_B: non-empty bins, ascending, int64.
        counts_BC: int64, one column for each kind of count.
    """

    limit: int
    shift: int
    bins_B: np.ndarray
    counts_BC: np.ndarray

    @classmethod
    def empty(cls, limit: int, num_columns: int = 1) -> "ScoreBins":
        """Creates an empty histogram.

        Raises:
            ValueError: the limit is below 2, so positive and negative scores could share a bin.
        """
        if limit < 2:
            raise ValueError(f"limit = {limit}: a histogram needs at least 2 bins.")
        return cls(limit, 0, np.zeros(0, np.int64), np.zeros((0, num_columns), np.int64))

    @classmethod
    def of(cls, scores: np.ndarray, limit: int) -> "ScoreBins":
        """Creates a histogram with one count for each score.

        Raises:
            ValueError: a score is not finite.
        """
        bins_B, counts_B = np.unique(order_of(scores), return_counts=True)
        return cls.empty(limit).merge(cls(limit, 0, bins_B, counts_B[:, None].astype(np.int64)))

    def merge(self, *others: "ScoreBins") -> "ScoreBins":
        """Merges histograms into a new one with the limit of this one.

        Raises:
            ValueError: the numbers of columns differ.
        """
        parts = [self, *others]
        if len({part.counts_BC.shape[1] for part in parts}) > 1:
            raise ValueError("histograms with different numbers of columns do not merge.")
        shift = max(part.shift for part in parts)
        coarse = [part.coarsened(shift) for part in parts]
        bins_B = np.concatenate([part.bins_B for part in coarse])
        order = np.argsort(bins_B, kind="stable")
        merged = _summed(self.limit, shift, bins_B[order], np.concatenate([p.counts_BC for p in coarse])[order])
        return merged.coarsened(shift + _surplus_bits(merged.bins_B, self.limit))

    def coarsened(self, shift: int) -> "ScoreBins":
        """The same counts with at least `shift` bits dropped."""
        if shift <= self.shift:
            return self
        return _summed(self.limit, shift, self.bins_B >> (shift - self.shift), self.counts_BC)

    @property
    def total(self) -> int:
        """Sum of the first column."""
        return int(self.counts_BC[:, 0].sum())


class ScoreBinsBuilder:
    """Builds a histogram from parts. Parts are merged in groups, which is faster and gives the same result."""

    def __init__(self, limit: int, num_columns: int = 1) -> None:
        """Starts from an empty histogram."""
        self._merged = ScoreBins.empty(limit, num_columns)
        self._waiting: list[ScoreBins] = []
        self._bins = 0

    def add(self, part: ScoreBins) -> None:
        """Adds a part."""
        part = part.coarsened(self._merged.shift)
        self._waiting.append(part)
        self._bins += len(part.bins_B)
        if self._bins > WAITING_SHARE * self._merged.limit or len(self._waiting) == WAITING_PARTS:
            self.whole()

    def whole(self) -> ScoreBins:
        """The histogram of all parts so far."""
        if self._waiting:
            self._merged = self._merged.merge(*self._waiting)
            self._waiting, self._bins = [], 0
        return self._merged


def _surplus_bits(bins_B: np.ndarray, limit: int) -> int:
    """The smallest number of bits to drop that merges the bins into at most `limit`."""
    if len(bins_B) <= limit:
        return 0
    bits_B = np.frexp((bins_B[1:] ^ bins_B[:-1]).astype(np.float64))[1]
    apart = len(bins_B) - np.cumsum(np.bincount(bits_B))
    return int(np.argmax(apart <= limit))


def _summed(limit: int, shift: int, bins_B: np.ndarray, counts_BC: np.ndarray) -> ScoreBins:
    """Sums the counts of equal bins, which must be adjacent."""
    starts = np.flatnonzero(np.diff(bins_B, prepend=-1))
    sums_BC = np.add.reduceat(counts_BC, starts, axis=0) if len(starts) else counts_BC
    return ScoreBins(limit, shift, bins_B[starts], sums_BC)


def order_of(scores: np.ndarray) -> np.ndarray:
    """Position of every score among all float32 numbers, int64 in [0, 2^32), in ascending order.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    scores = np.asarray(scores, dtype=np.float32).ravel() + np.float32(0)  # -0 becomes 0
    if not np.isfinite(scores).all():
        raise ValueError("a score is NaN or infinite. Exclude failed images by their status.")
    bits = scores.view(np.uint32)
    return np.where(bits & SIGN, ~bits, bits | SIGN).astype(np.int64)


def aligned(parts: list[ScoreBins], columns: list[int]) -> np.ndarray:
    """Counts of one column of each part over the bins of all parts, highest bin first, (B, len(parts)) int64."""
    shift = max(part.shift for part in parts)
    coarse = [part.coarsened(shift) for part in parts]
    bins_B = np.unique(np.concatenate([part.bins_B for part in coarse]))
    counts_BP = np.zeros((len(bins_B), len(parts)), np.int64)
    for index, (part, column) in enumerate(zip(coarse, columns, strict=True)):
        counts_BP[np.searchsorted(bins_B, part.bins_B), index] = part.counts_BC[:, column]
    return counts_BP[::-1]
