"""Cuts an anomaly map into regions and states them in px of the upright stored picture.

A region is a set of pixels of the map at or above a threshold that touch at an edge or a corner. A pixel of the picture
belongs to the pixel of the map in which its centre lies. Where the map is finer than the picture, that may leave a
region without any, so the pixel of its peak always belongs to it.
"""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from raydetect.records import AnomalousRegion
from raydetect.views.view import Layout

TOUCHING = np.ones((3, 3), dtype=bool)  # at an edge or a corner
BLOCK_PX = 1 << 18  # of a map whose places are listed at a time


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
    peaks_R, places_R = _peaks(map_HW, labelled_HW, count)
    kept_R = np.lexsort((places_R, -peaks_R))[:limit]
    boxes_R4, areas_R = _boxes(labelled_HW, count, layout)
    regions = []
    for label in kept_R.tolist():
        row, column = divmod(int(places_R[label]), map_HW.shape[1])
        x, y = layout.shown(column, row)
        left, upper, right, lower = boxes_R4[label].tolist()
        left, upper, right, lower = min(left, x), min(upper, y), max(right, x + 1), max(lower, y + 1)
        region = AnomalousRegion(
            x=left,
            y=upper,
            width=right - left,
            height=lower - upper,
            area_px=max(1, int(areas_R[label])),
            peak_score=float(map_HW[row, column]),
            peak_x=x,
            peak_y=y,
        )
        regions.append(region)
    return tuple(regions), count - len(regions)


def _blocks(labelled_HW: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields of a few rows at a time the first one, and the rows, columns and regions from 0 of the pixels in regions.

    Rows count from the first one. So a map that is high everywhere does not need many times its own memory.
    """
    height, width = labelled_HW.shape
    step = max(1, BLOCK_PX // width)
    for first in range(0, height, step):
        part_HW = labelled_HW[first : first + step]
        rows_N, columns_N = np.nonzero(part_HW)
        if len(rows_N):
            yield first, rows_N, columns_N, part_HW[rows_N, columns_N] - 1


def _peaks(map_HW: np.ndarray, labelled_HW: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The highest value of every region, and the first place, row by row, that has it."""
    peaks_R = np.full(count, -np.inf, np.float32)
    places_R = np.full(count, map_HW.size, np.int64)
    for first, rows_N, columns_N, regions_N in _blocks(labelled_HW):
        np.maximum.at(peaks_R, regions_N, map_HW[first:][rows_N, columns_N])
    for first, rows_N, columns_N, regions_N in _blocks(labelled_HW):
        is_peak_N = map_HW[first:][rows_N, columns_N] == peaks_R[regions_N]
        places_N = (first + rows_N[is_peak_N]) * map_HW.shape[1] + columns_N[is_peak_N]
        np.minimum.at(places_R, regions_N[is_peak_N], places_N)
    return peaks_R, places_R


def _boxes(labelled_HW: np.ndarray, count: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(left, upper, right, lower) and area of every region in px of the picture.

    A region without any has a box that is no larger than nothing.
    """
    across, down = layout.cuts
    heights, widths = np.diff(down), np.diff(across)
    boxes_R4, areas_R = np.tile(np.array([*layout.picture, 0, 0]), (count, 1)), np.zeros(count, np.int64)
    for first, rows_N, columns_N, regions_N in _blocks(labelled_HW):
        rows_N += first
        areas_N = heights[rows_N] * widths[columns_N]
        np.add.at(areas_R, regions_N, areas_N)
        seen_N = areas_N > 0
        rows_N, columns_N, regions_N = rows_N[seen_N], columns_N[seen_N], regions_N[seen_N]
        np.minimum.at(boxes_R4[:, 0], regions_N, across[columns_N])
        np.minimum.at(boxes_R4[:, 1], regions_N, down[rows_N])
        np.maximum.at(boxes_R4[:, 2], regions_N, across[columns_N + 1])
        np.maximum.at(boxes_R4[:, 3], regions_N, down[rows_N + 1])
    return boxes_R4, areas_R
