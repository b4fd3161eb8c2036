"""Regions by flood fill, pixel by pixel, and their place in the picture in exact fractions."""

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

Pixel = tuple[int, int]


def flood(map_HW: np.ndarray, threshold: float) -> list[set[Pixel]]:
    """The sets of pixels (row, column) from a threshold on that touch at an edge or corner, from the top left on."""
    height, width = map_HW.shape
    left = {(r, c) for r in range(height) for c in range(width) if float(map_HW[r, c]) >= threshold}
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        left.discard(start)
        region, waiting = {start}, [start]
        while waiting:
            row, column = waiting.pop()
            for near in ((row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)):
                if near in left:
                    left.discard(near)
                    region.add(near)
                    waiting.append(near)
        found.append(region)
    return found


def stated(
    map_HW: np.ndarray,
    threshold: float,
    picture: tuple[int, int],
    corner: tuple[Fraction, Fraction],
    pitch: tuple[Fraction, Fraction],
) -> list[dict[str, float]]:
    """The regions of a map in px of the picture, highest peak first.

    Args:
        map_HW: the map.
        threshold: lowest value of a region.
        picture: (width, height) in px.
        corner: (x, y) of the map's corner in px of the picture.
        pitch: (width, height) of a px of the map in px of the picture.
    """

    def place(x: int, y: int) -> Pixel:
        half = Fraction(1, 2)
        return int((y + half - corner[1]) // pitch[1]), int((x + half - corner[0]) // pitch[0])

    shown: dict[Pixel, list[Pixel]] = {}
    for y in range(picture[1]):
        for x in range(picture[0]):
            shown.setdefault(place(x, y), []).append((x, y))
    entries: list[tuple[float, Pixel, dict[str, float]]] = []
    for region in flood(map_HW, threshold):
        highest = max(float(map_HW[pixel]) for pixel in region)
        peak = min(pixel for pixel in region if float(map_HW[pixel]) == highest)
        peak_x = min(int(corner[0] + (peak[1] + Fraction(1, 2)) * pitch[0]), picture[0] - 1)
        peak_y = min(int(corner[1] + (peak[0] + Fraction(1, 2)) * pitch[1]), picture[1] - 1)
        own = [pixel for part in region for pixel in shown.get(part, [])]
        xs, ys = [x for x, _ in own] + [peak_x], [y for _, y in own] + [peak_y]
        facts: Mapping[str, float] = {
            "x": min(xs),
            "y": min(ys),
            "width": max(xs) - min(xs) + 1,
            "height": max(ys) - min(ys) + 1,
            "area_px": max(1, len(own)),
            "peak_score": highest,
            "peak_x": peak_x,
            "peak_y": peak_y,
        }
        entries.append((-highest, peak, dict(facts)))
    return [facts for _, _, facts in sorted(entries, key=lambda entry: entry[:2])]
