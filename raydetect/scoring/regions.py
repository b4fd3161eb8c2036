"""Cuts an anomaly map into regions and states them in px of the upright stored picture.

A region is a set of pixels of the map at or above a threshold that touch at an edge or a corner. A pixel of the picture
belongs to the pixel of the map in which its centre lies. Where the map is finer than the picture, that may leave a
region without any, so the pixel of its peak always belongs to it.
"""

import numpy as np
from scipy import ndimage

from raydetect.records import AnomalousRegion
from raydetect.views.view import Layout

TOUCHING = np.ones((3, 3), dtype=bool)  # at an edge or a corner


def find_regions(
    map_HW: np.ndarray, layout: Layout, threshold: float, limit: int
) -> tuple[tuple[AnomalousRegion, ...], int]:
    """Returns the regions with the highest peaks, and how many others there are.

    Equal peaks are in order of their place, from the top left on.

    Args:
        map_HW: float32 map of the layout's canvas; NaN where the picture is not looked at.
        layout: where the map lies in the picture.
        threshold: lowest value of a region, a float32.
        limit: number of regions to return, at most.
    """
    high_HW = map_HW >= np.float32(threshold)  # False for NaN
    if not high_HW.any():
        return (), 0
    labelled_HW, count = ndimage.label(high_HW, structure=TOUCHING)
    rows_N, columns_N = np.nonzero(high_HW)
    labels_N, values_N = labelled_HW[rows_N, columns_N] - 1, map_HW[rows_N, columns_N]
    order_N = np.lexsort((-values_N, labels_N))  # stable, so the first of equal values stays first
    peaks_R = order_N[np.searchsorted(labels_N[order_N], np.arange(count))]
    kept_R = np.lexsort((peaks_R, -values_N[peaks_R]))[:limit]
    boxes_R4, areas_R = _boxes(rows_N, columns_N, labels_N, count, layout)
    regions = []
    for label in kept_R.tolist():
        peak = peaks_R[label]
        x, y = layout.shown(int(columns_N[peak]), int(rows_N[peak]))
        left, upper, right, lower = boxes_R4[label].tolist()
        left, upper, right, lower = min(left, x), min(upper, y), max(right, x + 1), max(lower, y + 1)
        region = AnomalousRegion(
            x=left,
            y=upper,
            width=right - left,
            height=lower - upper,
            area_px=max(1, int(areas_R[label])),
            peak_score=float(values_N[peak]),
            peak_x=x,
            peak_y=y,
        )
        regions.append(region)
    return tuple(regions), count - len(regions)


def _boxes(
    rows_N: np.ndarray, columns_N: np.ndarray, labels_N: np.ndarray, count: int, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    """(left, upper, right, lower) and area of every region in px of the picture.

    A region without any has a box that is no larger than nothing.
    """
    across, down = layout.cuts
    areas_N = np.diff(down)[rows_N] * np.diff(across)[columns_N]
    seen_N = areas_N > 0
    rows_N, columns_N, seen_labels_N = rows_N[seen_N], columns_N[seen_N], labels_N[seen_N]
    boxes_R4 = np.tile(np.array([*layout.picture, 0, 0]), (count, 1))
    np.minimum.at(boxes_R4[:, 0], seen_labels_N, across[columns_N])
    np.minimum.at(boxes_R4[:, 1], seen_labels_N, down[rows_N])
    np.maximum.at(boxes_R4[:, 2], seen_labels_N, across[columns_N + 1])
    np.maximum.at(boxes_R4[:, 3], seen_labels_N, down[rows_N + 1])
    return boxes_R4, np.bincount(labels_N, areas_N, count)
