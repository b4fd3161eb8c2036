"""Puts an anomaly map at its place in the whole picture.

A map of the whole picture has at most `MAX_CANVAS_PX` along each side, as that of tiles: where a view cuts a small part
from a large or very oblong picture, it has the highest of each block of px of the detector's map.
"""

import math
from dataclasses import replace

import numpy as np
from PIL import Image

from raydetect.views.view import MAX_CANVAS_PX, Layout


def bounded(layout: Layout) -> Layout:
    """Returns the layout of the stored map, whose canvas is reduced if the whole picture would be too large."""
    by = math.ceil(max(_unbounded_size(layout)) / MAX_CANVAS_PX)
    if by == 1:
        return layout
    height, width = (max(1, side // by) for side in layout.canvas)
    window = replace(layout.windows[0], cell=(0, 0, width, height), size=(width, height))
    return replace(layout, windows=(window,), canvas=(height, width))


def whole_size(layout: Layout) -> tuple[int, int]:
    """(height, width) in px of the whole picture at the scale of its stored map, each at most `MAX_CANVAS_PX`."""
    height, width = _unbounded_size(bounded(layout))
    return min(height, MAX_CANVAS_PX), min(width, MAX_CANVAS_PX)


def _unbounded_size(layout: Layout) -> tuple[int, int]:
    left, upper, right, lower = layout.box
    height, width = layout.canvas
    across, down = layout.picture[0] / (right - left), layout.picture[1] / (lower - upper)
    return max(height, round(height * down)), max(width, round(width * across))


def placed(map_HW: np.ndarray, layout: Layout, size: tuple[int, int]) -> np.ndarray:
    """Returns the map of the whole picture at (height, width) `size` px, float32; NaN where nothing is looked at.

    Args:
        map_HW: of the layout's canvas, NaN outside of the region.
        layout: where the map belongs.
        size: of the result.
    """
    across, down = size[1] / layout.picture[0], size[0] / layout.picture[1]
    left, upper, right, lower = (
        round(side * scale) for side, scale in zip(layout.box, (across, down) * 2, strict=True)
    )
    inside_HW = resized(map_HW, (max(1, lower - upper), max(1, right - left)))
    if inside_HW.shape == size:
        return inside_HW
    whole_HW = np.full(size, np.nan, np.float32)
    shown_HW = whole_HW[upper : upper + inside_HW.shape[0], left : left + inside_HW.shape[1]]
    shown_HW[...] = inside_HW[: shown_HW.shape[0], : shown_HW.shape[1]]
    return whole_HW


def in_whole(map_HW: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns the map of the whole picture, float32, with a map of the layout's canvas at its place, px for px.

    If the canvas is reduced (`bounded`), its px have the highest of each block of the map.
    """
    whole_HW = np.full(whole_size(layout), np.nan, np.float32)
    whole_HW[_within_whole(layout)] = _highest(map_HW, bounded(layout).canvas)
    return whole_HW


def of_whole(whole_HW: np.ndarray, layout: Layout) -> tuple[np.ndarray, Layout]:
    """Returns the map that `in_whole` put in the map of the whole picture, and where it lies (`bounded`)."""
    return whole_HW[_within_whole(layout)], bounded(layout)


def _highest(map_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The highest known value of each of (height, width) `size` blocks; NaN where none is known."""
    if map_HW.shape == size:
        return map_HW
    rows, columns = (np.arange(count) * length // count for count, length in zip(size, map_HW.shape, strict=True))
    highest_HW: np.ndarray = np.fmax.reduceat(np.fmax.reduceat(map_HW, rows, axis=0), columns, axis=1)
    return highest_HW


def _within_whole(layout: Layout) -> tuple[slice, slice]:
    (height, width), (rows, columns) = whole_size(layout), bounded(layout).canvas
    left = min(round(layout.box[0] / layout.picture[0] * width), width - columns)
    upper = min(round(layout.box[1] / layout.picture[1] * height), height - rows)
    return slice(upper, upper + rows), slice(left, left + columns)


def resized(map_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a map to (height, width) by antialiased bilinear interpolation, as images are; no-op for equal sizes.

    NaN stays NaN and does not spread: around it, only the other px count.
    """
    if map_HW.shape == size:
        return map_HW
    known_HW = ~np.isnan(map_HW)
    if known_HW.all():
        return _bilinear(map_HW, size)
    weight_HW = _bilinear(known_HW, size)
    values_HW = _bilinear(np.where(known_HW, map_HW, 0.0), size)
    nearest_HW = np.asarray(Image.fromarray(known_HW).resize(size[::-1], Image.Resampling.NEAREST))
    shown_HW = nearest_HW & (weight_HW > 0)
    mean_HW: np.ndarray = np.divide(values_HW, weight_HW, out=np.full(size, np.nan, np.float32), where=shown_HW)
    return mean_HW


def _bilinear(values_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(values_HW.astype(np.float32))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
