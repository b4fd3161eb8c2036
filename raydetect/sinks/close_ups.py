"""Close-ups: parts of a large picture at its stored size, one around each of its regions.

A close-up shows twice the region's box, at least `LEAST_PX` and at most `MOST_PX` per side, and lies in the picture.
Along a side on which the region is longer than that, its middle is the region's peak. The px are those of the picture,
but for a thin line around the region.
"""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from raydetect.records import AnomalousRegion
from raydetect.sinks.heatmaps import encoded_png

LEAST_PX, MOST_PX = 128, 512
MOST_PIXELS = 1 << 21  # of all close-ups of a picture: 8 of the largest, or 128 of the smallest
MOST_CLOSE_UPS = MOST_PIXELS // LEAST_PX**2
STRONGEST, CASING = (0, 229, 255), (0, 0, 0)
GAP_PX = 3  # between a region and its line, so that the line hides nothing of it

Place = tuple[int, int, int, int]
Line = tuple[int, int, tuple[int, int, int]]  # distance from the box, width, colour


def close_up_places(regions: Sequence[AnomalousRegion], size: tuple[int, int]) -> list[Place]:
    """(left, upper, right, lower) of the close-ups of a picture of (width, height) `size`, in the order of its regions.

    Only the first `MOST_CLOSE_UPS` regions have one. If many are large, the last ones are smaller, with sides of at
    least `LEAST_PX`.
    """
    shown, places = regions[:MOST_CLOSE_UPS], list[Place]()
    unused = MOST_PIXELS
    for position, region in enumerate(shown):
        following = len(shown) - position - 1
        most_px = min(MOST_PX, math.isqrt(unused - following * LEAST_PX**2))
        left, right = _span(region.x, region.width, region.peak_x, size[0], most_px)
        upper, lower = _span(region.y, region.height, region.peak_y, size[1], most_px)
        places.append((left, upper, right, lower))
        unused -= (right - left) * (lower - upper)
    return places


def close_up_png(part: Image.Image, place: Place, region: AnomalousRegion) -> bytes:
    """Draws a line around a region on the part of the picture at `place`; returns PNG bytes."""
    left, upper = region.x - place[0], region.y - place[1]
    shown = part.copy()
    lines = ((GAP_PX + 1, 1, CASING), (GAP_PX, 1, STRONGEST))
    outline(shown, (left, upper, left + region.width, upper + region.height), lines)
    return encoded_png(shown)


def outline(picture: Image.Image, box: tuple[float, float, float, float], lines: Sequence[Line]) -> None:
    """Draws lines around a box of a picture, outside of it."""
    left, upper, right, lower = box
    draw = ImageDraw.Draw(picture)
    for gap, width, colour in lines:
        corners = (left - gap, upper - gap, right + gap - 1, lower + gap - 1)
        draw.rectangle([round(side) for side in corners], outline=colour, width=width)


def _span(start: int, length: int, peak: int, side: int, most_px: int) -> tuple[int, int]:
    """First px and last px + 1 of a close-up along one side of the picture."""
    shown = min(max(2 * length, LEAST_PX), most_px, side)
    middle = start + length / 2 if length <= shown else peak
    first = min(max(0, math.floor(middle - shown / 2)), side - shown)
    return first, first + shown
