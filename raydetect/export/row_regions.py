"""Masks of the regions of a row: their outlines where the run stored the anomaly map, else their boxes."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy import ndimage

from raydetect.export.outlines import MaskRegion
from raydetect.report.pictures import MapScale
from raydetect.sinks.heatmaps import map_png, read_map_png
from raydetect.views.view import Layout

TOUCHING = np.ones((3, 3), dtype=bool)  # at an edge or a corner, as when the row was written


def boxes_of(row: Mapping[str, Any]) -> Iterator[MaskRegion]:
    """Yields the boxes of a row's regions as masks, in their order."""
    for region in row["regions"] or ():
        mask_HW = np.zeros((row["height"], row["width"]), dtype=bool)
        mask_HW[_box(region)] = True
        yield _mask_region(region, mask_HW)


def outlines_of(
    row: Mapping[str, Any], map_HW: np.ndarray, layout: Layout, threshold: float, scale: MapScale
) -> Iterator[MaskRegion]:
    """Yields the masks of a row's regions, in their order.

    A stored map is rounded to 16 bits, and so is the threshold here. So a mask has all pixels of the region, and may
    have some more in its box that are below the threshold by less than that.

    Args:
        row: the row.
        map_HW: its stored map.
        layout: where the map lies in the picture.
        threshold: lowest value of a region.
        scale: of stored maps.
    """
    rounded = read_map_png(
        map_png(np.full((1, 1), threshold, np.float32), scale.low, scale.high)[0], scale.low, scale.high
    )
    labelled_HW, _ = ndimage.label(map_HW >= rounded[0, 0], structure=TOUCHING)
    across, down = layout.cuts
    for region in row["regions"] or ():
        rows, columns = layout.beneath(region["peak_x"], region["peak_y"])
        highest = np.unravel_index(np.argmax(map_HW[rows, columns]), map_HW[rows, columns].shape)
        found_HW = labelled_HW == labelled_HW[rows, columns][highest]
        stored_HW = np.repeat(np.repeat(found_HW, np.diff(down), axis=0), np.diff(across), axis=1)
        whole_HW = np.zeros((row["height"], row["width"]), dtype=bool)
        whole_HW[down[0] : down[-1], across[0] : across[-1]] = stored_HW
        mask_HW = np.zeros_like(whole_HW)
        mask_HW[_box(region)] = whole_HW[_box(region)]
        mask_HW[region["peak_y"], region["peak_x"]] = True
        yield _mask_region(region, mask_HW)


def _box(region: Mapping[str, Any]) -> tuple[slice, slice]:
    x, y = region["x"], region["y"]
    return slice(y, y + region["height"]), slice(x, x + region["width"])


def _mask_region(region: Mapping[str, Any], mask_HW: np.ndarray) -> MaskRegion:
    box = (region["x"], region["y"], region["width"], region["height"])
    return MaskRegion(mask_HW, box, region["area_px"])
