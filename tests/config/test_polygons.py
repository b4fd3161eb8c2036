"""Mistakes in the polygons of `view.region`: one sentence each, with the polygon and the point."""

from typing import Any

import numpy as np
import pytest

from raydetect.config import ViewSpec
from raydetect.config.validation import validate
from raydetect.errors import SpecError

SQUARE = [[0, 0], [1, 0], [1, 1], [0, 1]]
LIMITS = "x and y are shares of the picture's width and height from 0 to 1, so divide px by them."


@pytest.mark.parametrize(
    ("region", "sentence"),
    [
        (3, "expected the URI of a mask, or a list of polygons [[[x, y], ...], ...], given 3."),
        ({"polygons": []}, "expected the URI of a mask, or a list of polygons [[[x, y], ...], ...]."),
        ([], "has no polygon; remove it."),
        (SQUARE, "is a list of points, but polygons are expected; put the points in a list: [[[x, y], ...]]."),
        ([SQUARE, []], "polygon 2 has 0 points; give it 3 or more, or remove it."),
        ([SQUARE, [[0, 0]]], "polygon 2 has 1 point; give it 3 or more, or remove it."),
        ([[[0, 0], [1, 1]]], "polygon 1 has 2 points; give it 3 or more, or remove it."),
        ([SQUARE, 0.5], "polygon 2 is 0.5; write it as a list of points [x, y]."),
        ([SQUARE, "a.png"], "polygon 2 is 'a.png'; write it as a list of points [x, y]."),
        ([[[0, 0], [0.5], [1, 1]]], "point 2 of polygon 1 is [0.5]; write it as two numbers [x, y]."),
        ([[[0, 0], [0.5, "1"], [1, 1]]], "point 2 of polygon 1 is [0.5, '1']; write it as two numbers [x, y]."),
        ([[[0, 0], [0.5, True], [1, 1]]], "point 2 of polygon 1 is [0.5, True]; write it as two numbers [x, y]."),
        ([SQUARE, [[0, 0], [1, 1], [640, 0.2]]], f"point 3 of polygon 2 is [640, 0.2]; {LIMITS}"),
        ([[[0, -0.01], [1, 1], [0, 1]]], f"point 1 of polygon 1 is [0, -0.01]; {LIMITS}"),
        ([[[0, 0], [1, float("nan")], [0, 1]]], f"point 2 of polygon 1 is [1, nan]; {LIMITS}"),
        ([[["x" * 99, 0]]], f"point 1 of polygon 1 is ['{'x' * 58}...; write it as two numbers [x, y]."),
    ],
)
def test_a_mistake_is_one_sentence(region: Any, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        validate(ViewSpec, {"region": region}, "fit")
    assert str(caught.value) == f"fit: region: {sentence}"


@pytest.mark.parametrize("number", [int, float, np.float32, np.float64])
def test_polygons_become_floats(number: type) -> None:
    region = [[tuple(number(side) for side in point) for point in SQUARE]]
    found = validate(ViewSpec, {"region": region}, "fit").region
    assert found == (tuple((float(x), float(y)) for x, y in SQUARE),)
    assert validate(ViewSpec, {"region": found}, "fit").region == found


@pytest.mark.parametrize("region", [None, "memory://mask.png"])
def test_a_uri_and_nothing_stay(region: str | None) -> None:
    assert validate(ViewSpec, {"region": region}, "fit").region == region
