"""Draws the regions of a row on small pictures, and cuts out the surroundings of the strongest one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from raydetect.sinks.close_ups import CASING, GAP_PX, STRONGEST, outline

OTHERS = (255, 255, 255)
ZOOM_PX = (360, 180)
ZOOM_SHARE, LEAST_ZOOM_PX = 0.4, 32  # of the zoomed picture that a region takes; the least height that is cut out

Region = Mapping[str, Any]
Box = tuple[float, float, float, float]


def with_boxes(picture: Image.Image, regions: Sequence[Region], size: tuple[int, int], side_px: int) -> Image.Image:
    """Shrinks a picture to at most `side_px` per side and draws the box of every region, the first one on top.

    Args:
        picture: the upright picture at any size.
        regions: of its row, in px of the stored picture, highest peak first.
        size: (width, height) of the stored picture in px.
        side_px: longest side of the result.
    """
    small = picture.copy()
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    _draw(small, [_scaled(region, size, small.size) for region in regions])
    return small


def zoomed(picture: Image.Image, regions: Sequence[Region], size: tuple[int, int]) -> Image.Image:
    """The surroundings of the first region, `ZOOM_PX` large, with the boxes of all; arguments as in `with_boxes`."""
    left, upper, right, lower = zoom_box(regions[0], size)
    across, down = picture.width / size[0], picture.height / size[1]
    part = (left * across, upper * down, min(right * across, picture.width), min(lower * down, picture.height))
    zoom = ZOOM_PX[0] / (right - left)
    target = (ZOOM_PX[0], max(1, round((lower - upper) * zoom)))
    shown = picture.resize(target, Image.Resampling.BICUBIC, part)
    boxes = [_moved(region, left, upper) for region in regions]
    _draw(shown, [(x * zoom, y * zoom, end_x * zoom, end_y * zoom) for x, y, end_x, end_y in boxes])
    return shown


def zoom_box(region: Region, size: tuple[int, int]) -> Box:
    """(left, upper, right, lower) of the surroundings of a region inside a picture of (width, height) `size`, in px."""
    ratio = ZOOM_PX[0] / ZOOM_PX[1]
    height = max(region["height"] / ZOOM_SHARE, region["width"] / ZOOM_SHARE / ratio, LEAST_ZOOM_PX)
    width, height = min(height * ratio, size[0]), min(height, size[1])
    left = min(max(region["x"] + region["width"] / 2 - width / 2, 0), size[0] - width)
    upper = min(max(region["y"] + region["height"] / 2 - height / 2, 0), size[1] - height)
    return left, upper, left + width, upper + height


def needed_px(regions: Sequence[Region], size: tuple[int, int], least_px: int) -> int:
    """The longest side at which a picture must be decoded to zoom into its first region; at least `least_px`."""
    left, _, right, _ = zoom_box(regions[0], size)
    return max(least_px, math.ceil(max(size) * min(1.0, ZOOM_PX[0] / (right - left))))


def regions_text(row: Mapping[str, Any]) -> str:
    """Describes the regions of a row: `3 regions, the strongest of 63 x 28 px, 5.37 at (441, 263)`; "" without any."""
    if not row["regions"]:
        return ""
    first, count = row["regions"][0], len(row["regions"]) + (row["regions_left_out"] or 0)
    which = "1 region" if count == 1 else f"{count:,} regions, the strongest"
    box = f"{first['width']} x {first['height']} px"
    return f"{which} of {box}, {first['peak_score']:.4g} at ({first['peak_x']}, {first['peak_y']})"


def _moved(region: Region, left: float, upper: float) -> Box:
    x, y = region["x"] - left, region["y"] - upper
    return x, y, x + region["width"], y + region["height"]


def _scaled(region: Region, size: tuple[int, int], shown: tuple[int, int]) -> Box:
    left, upper, right, lower = _moved(region, 0, 0)
    across, down = shown[0] / size[0], shown[1] / size[1]
    return left * across, upper * down, right * across, lower * down


def _draw(picture: Image.Image, boxes: Sequence[Box]) -> None:
    for place, box in reversed(list(enumerate(boxes))):
        colour, width = (STRONGEST, 2) if not place else (OTHERS, 1)
        outline(picture, box, ((GAP_PX + 1, width + 2, CASING), (GAP_PX, width, colour)))
