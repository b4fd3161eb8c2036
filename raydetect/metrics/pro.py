"""Per-region overlap: how well anomaly maps cover the anomalous regions, each with the same weight whatever its size.

Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, sec. 5.2.
"""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import label

NEIGHBOURS = np.ones((3, 3))  # 8-connectivity, as in the data set authors' own script


def aupro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], fpr_limit: float = 0.3) -> float:
    """Area under the mean per-region overlap over the false positive rate, up to a limit and divided by it (AUPRO).

    Exact: every value of the maps is a threshold. The overlap is the mean over the connected regions of all masks, with
    equal weights; the false positive rate is over all normal pixels. Sorts all pixels: O(n log n).

    Args:
        maps: anomaly map (H, W) of every image, higher = more anomalous.
        masks: mask (H, W) of every image, nonzero = anomalous; all zero for a normal image.
        fpr_limit: in (0, 1]; 0.3 is common, 0.05 is the stricter limit of later data sets. Report it with the value.

    Returns:
        In [0, 1].

    Raises:
        ValueError: shapes differ, there is no anomalous region or no normal pixel, a value is not finite, or the limit
            is out of range.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit = {fpr_limit}: must be in (0, 1].")
    values, overlap, normal = _weighted(maps, masks)
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    rate = np.concatenate([[0.0], np.cumsum(normal[order])[ends]])
    covered = np.concatenate([[0.0], np.cumsum(overlap[order])[ends]])
    return _area(rate / rate[-1], covered / covered[-1], fpr_limit)


def _weighted(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For all pixels: value, weight in the region's overlap (1 / pixels of the region; 0 outside), whether normal."""
    values, overlap = [], []
    for number, (map_HW, mask_HW) in enumerate(zip(maps, masks, strict=True)):
        map_HW, anomalous_HW = np.asarray(map_HW, dtype=np.float64), np.asarray(mask_HW) != 0
        if map_HW.shape != anomalous_HW.shape:
            raise ValueError(
                f"image {number}: the map has shape {map_HW.shape} and its mask {anomalous_HW.shape}; "
                "they must be equal."
            )
        if not np.isfinite(map_HW).all():
            raise ValueError(f"image {number}: its map is not finite. Exclude failed images by their status.")
        regions_HW, count = label(anomalous_HW, structure=NEIGHBOURS)
        sizes = np.bincount(regions_HW.ravel(), minlength=count + 1)
        share = 1.0 / np.maximum(sizes, 1)
        share[0] = 0.0  # background
        values.append(map_HW.ravel())
        overlap.append(share[regions_HW.ravel()])
    all_overlap = np.concatenate(overlap) if overlap else np.zeros(0)
    normal = all_overlap == 0
    if normal.all() or not normal.any():
        raise ValueError("per-region overlap needs at least one anomalous region and one normal pixel.")
    return np.concatenate(values), all_overlap, normal.astype(np.float64)


def _area(rate: np.ndarray, covered: np.ndarray, limit: float) -> float:
    """Area by the trapezoidal rule from rate 0 to the limit, divided by the limit."""
    inside = int(np.searchsorted(rate, limit, side="right"))
    x, y = rate[:inside], covered[:inside]
    if x[-1] < limit:
        x = np.append(x, limit)
        y = np.append(y, np.interp(limit, rate, covered))
    return float(np.trapezoid(y, x) / limit)
