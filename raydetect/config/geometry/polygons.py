"""Polygons of `view.region`, checked one by one, so that a mistake is one sentence that names its polygon and point."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

from raydetect.redaction import redacted

CHARACTERS_SHOWN = 60  # of a given value
FEWEST_POINTS = 3


def checked_region(region: Any) -> Any:
    """Returns the value of `view.region` as it is: the URI of a mask, polygons, or nothing.

    Raises:
        ValueError: the first mistake in one sentence.
    """
    if region is None or isinstance(region, str):
        return region
    if not _is_list(region):
        raise ValueError("expected the URI of a mask, or a list of polygons [[[x, y], ...], ...]")
    if not region:
        raise ValueError("has no polygon; remove it")
    if _is_point(region[0]):
        raise ValueError("is a list of points, but polygons are expected; put the points in a list: [[[x, y], ...]]")
    for number, polygon in enumerate(region, start=1):
        _check_polygon(f"polygon {number}", polygon)
    return region


def _check_polygon(name: str, polygon: Any) -> None:
    if not _is_list(polygon):
        raise ValueError(f"{name} is {_shown(polygon)}; write it as a list of points [x, y]")
    for number, point in enumerate(polygon, start=1):
        if not _is_point(point):
            raise ValueError(f"point {number} of {name} is {_shown(point)}; write it as two numbers [x, y]")
        if not all(0 <= side <= 1 for side in point):
            raise ValueError(
                f"point {number} of {name} is {_shown(point)}; x and y are shares of the picture's width and height "
                "from 0 to 1, so divide px by them"
            )
    if len(polygon) < FEWEST_POINTS:
        points = f"{len(polygon)} point{'' if len(polygon) == 1 else 's'}"
        raise ValueError(f"{name} has {points}; give it {FEWEST_POINTS} or more, or remove it")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_point(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(isinstance(s, Real) and not isinstance(s, bool) for s in value)


def _shown(value: Any) -> str:
    text = redacted(repr(list(value) if isinstance(value, tuple) else value))
    return text if len(text) <= CHARACTERS_SHOWN else f"{text[:CHARACTERS_SHOWN]}..."
