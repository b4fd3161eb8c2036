"""Pixel histograms of anomaly maps with their masks, and the per-region overlap computed from them.

Columns: normal pixels, anomalous pixels, and overlap. The pixels of a region share `UNIT` in whole numbers: from the
highest bin down, the cumulative part is floor(UNIT * pixels so far / pixels of the region). So every region has the
same weight whatever its size, sums stay integers (merging is exact), and overlaps are low by less than 2^-32.

Definition: regions are 8-connected; the curve is the mean overlap of all regions over the false positive rate of all
normal pixels, with one point per bin and linear interpolation; AUPRO is its area up to a limit, divided by the limit.
Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, sec. 5.2.
"""

import numpy as np
from scipy.ndimage import label

from raydetect.metrics.curves import Estimate
from raydetect.metrics.pro import NEIGHBOURS
from raydetect.metrics.score_bins import ScoreBins, aligned, order_of

NORMAL, ANOMALOUS, OVERLAP = range(3)
UNIT = 1 << 32
COLUMNS = 3
PIXELS = 1 << 20  # counted at a time, which bounds the memory for large maps and changes no bin


def pixels_of(map_HW: np.ndarray, mask_HW: np.ndarray, limit: int, looked_HW: np.ndarray | None = None) -> ScoreBins:
    """Creates the histogram of one map's pixels, as exact as at most `limit` bins allow.

    Args:
        map_HW: float32, higher = more anomalous.
        mask_HW: nonzero = anomalous; all zero for a normal image.
        limit: see `ScoreBins`.
        looked_HW: the pixels that count; None = all.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    if map_HW.shape != mask_HW.shape:
        raise ValueError(f"the map has shape {map_HW.shape} and its mask {mask_HW.shape}; they must be equal.")
    looked_HW = np.ones(map_HW.shape, bool) if looked_HW is None else looked_HW
    anomalous_HW = (mask_HW != 0) & looked_HW
    orders_N, anomalous_N = order_of(map_HW[looked_HW]), anomalous_HW[looked_HW]
    parts = [
        _counted(orders_N[start : start + PIXELS], anomalous_N[start : start + PIXELS], limit)
        for start in range(0, orders_N.size, PIXELS)
    ]
    if anomalous_N.any():
        parts.append(_overlap(orders_N[anomalous_N], anomalous_HW, limit))
    return ScoreBins.empty(limit, COLUMNS).merge(*parts)


def _counted(orders_N: np.ndarray, anomalous_N: np.ndarray, limit: int) -> ScoreBins:
    """Counts normal and anomalous pixels."""
    bins_B, bin_N = np.unique(orders_N, return_inverse=True)
    counts_BC = np.zeros((len(bins_B), COLUMNS), np.int64)
    for column, chosen_N in ((NORMAL, ~anomalous_N), (ANOMALOUS, anomalous_N)):
        counts_BC[:, column] = np.bincount(bin_N[chosen_N], minlength=len(bins_B))
    return ScoreBins.empty(limit, COLUMNS).merge(ScoreBins(limit, 0, bins_B, counts_BC))


def _overlap(orders_A: np.ndarray, anomalous_HW: np.ndarray, limit: int) -> ScoreBins:
    """Shares the units of all regions among the anomalous pixels, which `orders_A` has in the order of the mask."""
    bins_B, bin_A = np.unique(orders_A, return_inverse=True)
    counts_BC = np.zeros((len(bins_B), COLUMNS), np.int64)
    regions_HW, count = label(anomalous_HW, structure=NEIGHBOURS)
    regions_A = regions_HW[anomalous_HW]
    for region in range(1, count + 1):
        _share(bin_A[regions_A == region], counts_BC[:, OVERLAP])
    return ScoreBins(limit, 0, bins_B, counts_BC)


def _share(bin_R: np.ndarray, overlap_B: np.ndarray) -> None:
    """Adds one region's UNIT to the bins of its pixels."""
    bins, counts = np.unique(bin_R, return_counts=True)
    reached = np.cumsum(counts[::-1].astype(object)) * UNIT // len(bin_R)  # Python integers: no overflow
    overlap_B[bins[::-1]] += np.diff(reached.astype(np.int64), prepend=0)


def aupro_of(parts: list[ScoreBins], fpr_limit: float) -> Estimate:
    """Area under the mean per-region overlap up to a false positive rate, as defined in the module docstring.

    The exact curve is monotone, so between two points it stays inside the box they span.

    Args:
        parts: pixel histograms to evaluate together.
        fpr_limit: in (0, 1].

    Raises:
        ValueError: there is no region or no normal pixel, or the limit is invalid.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit = {fpr_limit}: must be in (0, 1].")
    normal_B = aligned(parts, [NORMAL] * len(parts)).sum(1)
    overlap_B = aligned(parts, [OVERLAP] * len(parts)).sum(1)
    if not normal_B.any() or not overlap_B.any():
        raise ValueError("per-region overlap needs at least one anomalous region and one normal pixel.")
    rate = np.concatenate([[0.0], np.cumsum(normal_B) / normal_B.sum()])
    covered = np.concatenate([[0.0], np.cumsum(overlap_B) / overlap_B.sum()])
    value, loss = _area(rate, covered, fpr_limit)
    if max(part.shift for part in parts) == 0:
        loss = 0.0
    loss += 1.0 / UNIT
    return Estimate(value, value - loss, value + loss)


def _area(rate: np.ndarray, covered: np.ndarray, limit: float) -> tuple[float, float]:
    """(area by the trapezoidal rule, its error bound from the boxes), both divided by the limit."""
    inside = int(np.searchsorted(rate, limit, side="right"))
    x, y = rate[:inside], covered[:inside]
    loss = float(np.sum(np.diff(x) * np.diff(y))) / 2
    if x[-1] < limit:
        end = float(np.interp(limit, rate, covered))
        loss += float((limit - x[-1]) * (covered[inside] - y[-1]))
        x, y = np.append(x, limit), np.append(y, end)
    return float(np.trapezoid(y, x)) / limit, loss / limit
