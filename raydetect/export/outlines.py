"""COCO encodings of masks: column-major run lengths, their compressed string, and polygons along pixel edges."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

BITS, MORE, SIGN, FIRST_CHAR = 5, 0x20, 0x10, 48
Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MaskRegion:
    """One connected region of a mask.

    Attributes:
        mask_HW: bool, with the size of the image.
        box: left, top, width, height in px.
        area_px: number of pixels.
    """

    mask_HW: np.ndarray
    box: tuple[int, int, int, int]
    area_px: int


def regions(mask_HW: np.ndarray) -> Iterator[MaskRegion]:
    """Yields the 4-connected regions of a mask, from the top left on."""
    labelled_HW, _ = ndimage.label(mask_HW)
    for number, window in enumerate(ndimage.find_objects(labelled_HW), start=1):
        rows, columns = window
        region_HW = np.zeros(mask_HW.shape, dtype=bool)
        region_HW[window] = labelled_HW[window] == number
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        yield MaskRegion(region_HW, box, int(region_HW.sum()))


def run_lengths(mask_HW: np.ndarray) -> list[int]:
    """Returns the lengths of alternating runs of 0 and 1 in column-major order; the first, of 0s, may be 0."""
    flat = mask_HW.astype(bool).flatten(order="F")
    changes = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    edges = np.concatenate([[0], changes, [len(flat)]])
    lengths = np.diff(edges).tolist()
    return [0, *lengths] if len(flat) and flat[0] else lengths


def length_text(lengths: list[int]) -> str:
    """Encodes run lengths as COCO's string: from the fourth on, differences to the one two before; 5 bits per char."""
    chars = []
    for index, length in enumerate(lengths):
        left = length - lengths[index - 2] if index > 2 else length
        while True:
            bits = left & (MORE - 1)
            left >>= BITS
            ended = left == (-1 if bits & SIGN else 0)
            chars.append(chr(FIRST_CHAR + (bits if ended else bits | MORE)))
            if ended:
                break
    return "".join(chars)


def polygons_of(region: MaskRegion) -> list[list[int]]:
    """Returns the outer outlines of the parts of a region that touch at corners only; see `polygon`."""
    return [polygon(part) for part in regions(region.mask_HW)]


def polygon(region: MaskRegion) -> list[int]:
    """Returns the outer outline of a region along pixel edges as x, y, x, y, ..., clockwise; holes are filled."""
    steps = _edges(region)
    loops = []
    while steps:
        loops.append(_follow(steps))
    outer = max(loops, key=lambda loop: abs(_area(loop)))
    return [value for point in _corners(outer) for value in point]


def _edges(region: MaskRegion) -> dict[Point, list[Point]]:
    """Returns the boundary edges of a region by their start point, directed with the region on the right."""
    left, top, width, height = region.box
    inside = np.pad(region.mask_HW[top : top + height, left : left + width], 1)
    steps: dict[Point, list[Point]] = {}
    sides = (
        ((-1, 0), (0, 0), (1, 0)),  # above: to the right
        ((0, 1), (1, 0), (1, 1)),  # right: down
        ((1, 0), (1, 1), (0, 1)),  # below: to the left
        ((0, -1), (0, 1), (0, 0)),  # left: up
    )
    for (down, across), start, stop in sides:
        neighbour = np.roll(inside, (-down, -across), axis=(0, 1))
        for row, column in np.argwhere(inside & ~neighbour).tolist():
            x, y = column - 1 + left, row - 1 + top
            steps.setdefault((x + start[0], y + start[1]), []).append((x + stop[0], y + stop[1]))
    return steps


def _follow(steps: dict[Point, list[Point]]) -> list[Point]:
    """Removes one closed loop from the edges; at a point with two outgoing edges it turns right."""
    start = next(iter(steps))
    loop, point, heading = [start], start, (0, 0)
    while True:
        ends = steps[point]
        chosen = ends[0] if len(ends) == 1 else max(ends, key=lambda end: _turn(heading, point, end))
        ends.remove(chosen)
        if not ends:
            del steps[point]
        heading, point = (chosen[0] - point[0], chosen[1] - point[1]), chosen
        if point == start:
            return loop
        loop.append(point)


def _turn(heading: Point, point: Point, end: Point) -> int:
    """Positive for a right turn, negative for a left turn, 0 for straight on, with y pointing down."""
    return heading[0] * (end[1] - point[1]) - heading[1] * (end[0] - point[0])


def _area(loop: list[Point]) -> float:
    following = [*loop[1:], loop[0]]
    return sum(x * later_y - later_x * y for (x, y), (later_x, later_y) in zip(loop, following, strict=True)) / 2


def _corners(loop: list[Point]) -> list[Point]:
    """Drops points on straight lines from a loop."""
    around = zip([loop[-1], *loop[:-1]], loop, [*loop[1:], loop[0]], strict=True)
    return [point for before, point, after in around if (after[0] - before[0]) and (after[1] - before[1])]
