"""Distances between two distributions, with intervals: Kolmogorov-Smirnov distance and population stability index.

Both are computed from histograms, so memory does not grow with the number of images, and summaries of earlier nights
suffice.

Source: Massart, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality", Annals of Probability 18 (1990).
"""

import math
from dataclasses import dataclass

import numpy as np

from raydetect.metrics.histogram import Histogram

LEVEL = 0.95
GROUPS, DRAWS = 10, 1000
PRIOR = 0.5  # pseudo-count of each group, so that an empty one does not give infinity


@dataclass(frozen=True, slots=True)
class Distance:
    """A distance with its interval at LEVEL."""

    value: float
    low: float
    high: float


def ks_distance(one: Histogram, other: Histogram) -> Distance:
    """Largest difference between two distribution functions at the bin edges.

    The interval holds for any distribution and any number of images (Massart's bound, half of the error for each of
    the two), and includes the largest difference possible inside a bin.

    Raises:
        ValueError: one of the histograms is empty.
    """
    counts_2N = _aligned(one, other)
    sums_2 = counts_2N.sum(axis=1)
    reached_2N = np.cumsum(counts_2N, axis=1) / sums_2[:, None]
    before_2N = np.concatenate([np.zeros((2, 1)), reached_2N[:, :-1]], axis=1)
    value = float(np.abs(reached_2N[0] - reached_2N[1]).max())
    inside = float(np.maximum(reached_2N[0] - before_2N[1], reached_2N[1] - before_2N[0]).max())
    if one.low == one.high == other.low == other.high:
        inside = 0.0
    reach = sum(math.sqrt(math.log(4.0 / (1.0 - LEVEL)) / (2.0 * int(total))) for total in sums_2)
    return Distance(value, max(0.0, value - reach), min(1.0, inside + reach))


def stability_index(one: Histogram, other: Histogram, seed: int = 0) -> Distance:
    """Population stability index of `one` against `other`: sum of (p - q) * ln(p / q) over groups.

    Groups are runs of bins that each hold about a tenth of `other`. The interval is a basic bootstrap with DRAWS draws
    from both; it removes most of the index's bias, which is about (groups - 1) * (1/n + 1/m).

    Args:
        one: this night.
        other: the baseline it is compared with.
        seed: of the bootstrap.

    Raises:
        ValueError: one of the histograms is empty.
    """
    counts_2N = _aligned(one, other)
    groups_2G = _grouped(counts_2N)
    value = float(_index(groups_2G[0], groups_2G[1]))
    random = np.random.default_rng([23, seed])
    drawn = [
        random.multinomial(int(row.sum()), (row + PRIOR) / (row + PRIOR).sum(), size=DRAWS).astype(np.float64)
        for row in groups_2G
    ]
    resampled = _index(drawn[0], drawn[1])
    tail = (1.0 - LEVEL) / 2.0
    least, most = (float(found) for found in np.quantile(resampled, [tail, 1.0 - tail]))
    return Distance(value, max(0.0, 2.0 * value - most), max(0.0, 2.0 * value - least))


def share_interval(part: int, whole: int) -> Distance:
    """A share with its Wilson interval at LEVEL; 0 to 1 if `whole` is 0.

    Source: Wilson, "Probable inference", JASA 22 (1927).
    """
    if not whole:
        return Distance(0.0, 0.0, 1.0)
    z2 = 1.959963984540054**2
    share = part / whole
    middle = share + z2 / (2 * whole)
    reach = math.sqrt(z2 * (share * (1 - share) / whole + z2 / (4 * whole * whole)))
    low, high = (middle - reach) / (1 + z2 / whole), (middle + reach) / (1 + z2 / whole)
    return Distance(share, 0.0 if part == 0 else low, 1.0 if part == whole else high)


def _index(one_G: np.ndarray, other_G: np.ndarray) -> np.ndarray:
    p_G, q_G = ((x + PRIOR) / (x + PRIOR).sum(axis=-1, keepdims=True) for x in (one_G, other_G))
    total: np.ndarray = ((p_G - q_G) * np.log(p_G / q_G)).sum(axis=-1)
    return total


def _aligned(one: Histogram, other: Histogram) -> np.ndarray:
    """Counts of both histograms on a common grid, (2, N) float64."""
    if not one.total or not other.total:
        raise ValueError("an empty distribution cannot be compared.")
    grid = Histogram()
    grid.merge(one)
    grid.merge(other)
    counts_2N = np.zeros((2, len(grid.counts)))
    for row, found in zip(counts_2N, (one.coarsened(grid.exponent), other.coarsened(grid.exponent)), strict=True):
        row[found.first - grid.first : found.first - grid.first + len(found.counts)] = found.counts
    return counts_2N


def _grouped(counts_2N: np.ndarray) -> np.ndarray:
    """Sums over GROUPS runs of bins, split at the deciles of the second row, (2, G)."""
    reached_N = np.cumsum(counts_2N[1]) / counts_2N[1].sum()
    group_N = np.minimum(np.floor((reached_N - counts_2N[1] / counts_2N[1].sum() / 2) * GROUPS), GROUPS - 1)
    numbers_N = np.maximum(group_N, 0).astype(np.int64)
    grouped = [np.bincount(numbers_N, weights=row, minlength=GROUPS) for row in counts_2N]
    kept = np.asarray(grouped)[:, np.asarray(grouped).sum(axis=0) > 0]
    return kept
