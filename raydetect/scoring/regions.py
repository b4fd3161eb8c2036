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
    across, down = layout.cuts
    rows_N, columns_N = np.nonzero(high_HW)
    labels_N = labelled_HW[rows_N, columns_N] - 1
    areas_R = np.bincount(labels_N, np.diff(down)[rows_N] * np.diff(across)[columns_N], count)
    order_N = np.lexsort((np.arange(len(labels_N)), -map_HW[rows_N, columns_N], labels_N))
    peaks_R = order_N[np.searchsorted(labels_N[order_N], np.arange(count))]
    values_R = map_HW[rows_N[peaks_R], columns_N[peaks_R]]
    boxes = ndimage.find_objects(labelled_HW)
    regions = []
    for label in np.lexsort((peaks_R, -values_R))[:limit].tolist():
        peak = (int(columns_N[peaks_R[label]]), int(rows_N[peaks_R[label]]))
        regions.append(_region(boxes[label], int(areas_R[label]), peak, float(values_R[label]), layout))
    return tuple(regions), count - len(regions)


def _region(
    box: tuple[slice, slice], area_px: int, peak: tuple[int, int], value: float, layout: Layout
) -> AnomalousRegion:
    """Converts a region from px of the map to px of the picture."""
    across, down = layout.cuts
    peak_x, peak_y = layout.shown(*peak)
    left, right = min(int(across[box[1].start]), peak_x), max(int(across[box[1].stop]), peak_x + 1)
    upper, lower = min(int(down[box[0].start]), peak_y), max(int(down[box[0].stop]), peak_y + 1)
    return AnomalousRegion(
        x=left,
        y=upper,
        width=right - left,
        height=lower - upper,
        area_px=max(1, area_px),
        peak_score=value,
        peak_x=peak_x,
        peak_y=peak_y,
    )
