"""Masks as COCO stores them: run lengths in columns, their text form, and polygons along pixel edges."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

BITS, MORE, SIGN, FIRST_LETTER = 5, 0x20, 0x10, 48
Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Region:
    """One connected part of a mask.

    Attributes:
        mask_HW: bool, of the whole image's size.
        box: left, top, width, height in px.
        area_px: number of its pixels.
    """

    mask_HW: np.ndarray
    box: tuple[int, int, int, int]
    area_px: int


def regions(mask_HW: np.ndarray) -> Iterator[Region]:
    """Parts of a mask whose pixels touch by an edge, from the top left on."""
    labelled_HW, _ = ndimage.label(mask_HW)
    for number, found in enumerate(ndimage.find_objects(labelled_HW), start=1):
        rows, columns = found
        mine_HW = np.zeros(mask_HW.shape, dtype=bool)
        mine_HW[found] = labelled_HW[found] == number
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        yield Region(mine_HW, box, int(mine_HW.sum()))


def run_lengths(mask_HW: np.ndarray) -> list[int]:
    """Lengths of runs of 0, 1, 0, ... down the columns, one column after the other; the first may be 0."""
    flat = mask_HW.astype(bool).flatten(order="F")
    changes = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    edges = np.concatenate([[0], changes, [len(flat)]])
    lengths = np.diff(edges).tolist()
    return [0, *lengths] if len(flat) and flat[0] else lengths


def length_text(lengths: list[int]) -> str:
    """Run lengths in COCO's text form: from the fourth on the difference to the one two before, 5 bits a letter."""
    letters = []
    for place, length in enumerate(lengths):
        left = length - lengths[place - 2] if place > 2 else length
        while True:
            bits = left & (MORE - 1)
            left >>= BITS
            ended = left == (-1 if bits & SIGN else 0)
            letters.append(chr(FIRST_LETTER + (bits if ended else bits | MORE)))
            if ended:
                break
    return "".join(letters)


def polygon(region: Region) -> list[int]:
    """The outer outline of a region along pixel edges, x and y in turn, clockwise; holes in it are filled."""
    steps = _edges(region)
    loops = []
    while steps:
        loops.append(_follow(steps))
    outer = max(loops, key=lambda loop: abs(_area(loop)))
    return [value for point in _corners(outer) for value in point]


def _edges(region: Region) -> dict[Point, list[Point]]:
    """Edges between the region and what is not, by their start, with the region on their right hand."""
    left, top, width, height = region.box
    inner = np.pad(region.mask_HW[top : top + height, left : left + width], 1)
    steps: dict[Point, list[Point]] = {}
    sides = (
        ((-1, 0), (0, 0), (1, 0)),  # above: to the right
        ((0, 1), (1, 0), (1, 1)),  # right: down
        ((1, 0), (1, 1), (0, 1)),  # below: to the left
        ((0, -1), (0, 1), (0, 0)),  # left: up
    )
    for (down, across), start, stop in sides:
        beside = np.roll(inner, (-down, -across), axis=(0, 1))
        for row, column in np.argwhere(inner & ~beside).tolist():
            x, y = column - 1 + left, row - 1 + top
            steps.setdefault((x + start[0], y + start[1]), []).append((x + stop[0], y + stop[1]))
    return steps


def _follow(steps: dict[Point, list[Point]]) -> list[Point]:
    """Takes one closed loop out of the edges; where two ways leave a point, the one that turns right."""
    begin = next(iter(steps))
    loop, point, heading = [begin], begin, (0, 0)
    while True:
        ways = steps[point]
        way = ways[0] if len(ways) == 1 else max(ways, key=lambda end: _turn(heading, point, end))
        ways.remove(way)
        if not ways:
            del steps[point]
        heading, point = (way[0] - point[0], way[1] - point[1]), way
        if point == begin:
            return loop
        loop.append(point)


def _turn(heading: Point, point: Point, end: Point) -> int:
    """1 to the right, -1 to the left, 0 straight on, in an image whose y grows downwards."""
    return heading[0] * (end[1] - point[1]) - heading[1] * (end[0] - point[0])


def _area(loop: list[Point]) -> float:
    following = [*loop[1:], loop[0]]
    return sum(x * later_y - later_x * y for (x, y), (later_x, later_y) in zip(loop, following, strict=True)) / 2


def _corners(loop: list[Point]) -> list[Point]:
    """The loop without points on straight lines."""
    around = zip([loop[-1], *loop[:-1]], loop, [*loop[1:], loop[0]], strict=True)
    return [point for before, point, after in around if (after[0] - before[0]) and (after[1] - before[1])]
