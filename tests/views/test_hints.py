"""Hints: when they are given, and their numbers."""

import io

import numpy as np
import pytest
from PIL import Image

from raydetect.config import ViewSpec
from raydetect.config.validation import validate
from raydetect.images.decode import decode_member
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.records import Member
from raydetect.views.hints import dark_hints, hints
from raydetect.views.view import View

INPUT = (256, 256)


def view(**settings: object) -> View:
    return View(validate(ViewSpec, settings, "view"))


def test_no_hint_without_a_cause() -> None:
    assert hints({}, view(), INPUT) == []
    assert hints({(256, 256): 5, (300, 280): 5, (1000, 1000): 9}, view(), INPUT) == []


@pytest.mark.parametrize(
    ("sizes", "words", "size"),
    [
        ({(640, 400): 3}, "1.6 times as wide as high", "[256, 416]"),
        ({(400, 640): 3, (400, 400): 2}, "1.6 times as high as wide", "[416, 256]"),
    ],
)
def test_oblong_pictures_that_are_squeezed(sizes: dict[tuple[int, int], int], words: str, size: str) -> None:
    (hint,) = hints(sizes, view(), INPUT)
    assert words in hint and f"image_size: {size}" in hint and "view.resize: pad" in hint
    assert hints(sizes, view(resize="pad"), INPUT) == []
    assert hints(sizes, view(tile={}), INPUT) == []
    assert hints(sizes, view(), (256, 400)) == []
    assert hints({**sizes, (300, 300): 9}, view(), INPUT) == []


def test_large_pictures_are_counted_in_tiles() -> None:
    (hint,) = hints({(2048, 2048): 1}, view(), INPUT)
    assert "2048 x 2048 px" in hint and "tile: {overlap: 64}} looks at them in 121 tiles" in hint
    assert "with scale: 0.5 in 25." in hint
    assert len(view(tile={"overlap": 64}).layout((2048, 2048), INPUT).windows) == 121
    assert len(view(tile={"overlap": 64}, scale=0.5).layout((2048, 2048), INPUT).windows) == 25
    assert hints({(1024, 1024): 1}, view(), INPUT) == []


def test_sizes_that_vary() -> None:
    (hint,) = hints({(100, 100): 4, (401, 401): 4, (200, 200): 2}, view(), INPUT)
    assert "from 100 to 401 px" in hint
    assert hints({(100, 100): 4, (400, 400): 4}, view(), INPUT) == []


@pytest.mark.parametrize(
    ("settings", "size", "words"),
    [
        ({"resize": "short_side"}, (512, 256), "view.resize: short_side leaves out 50%"),
        ({"size": [256, 256], "crop": [224, 224]}, (256, 256), "view.crop leaves out 23%"),
    ],
)
def test_what_is_left_out_is_said(settings: dict[str, object], size: tuple[int, int], words: str) -> None:
    input_px = (224, 224) if "crop" in settings else INPUT
    assert any(words in hint for hint in hints({size: 2}, view(**settings), input_px))
    assert not any("leaves out" in hint for hint in hints({(270, 256): 2}, view(resize="short_side"), INPUT))


def test_grey_of_sixteen_bits_that_uses_little_of_its_range() -> None:
    found = []
    for white in (4095, 65535):
        buffer = io.BytesIO()
        Image.fromarray(np.linspace(0, white, 64 * 64).reshape(64, 64).astype(np.uint16)).save(buffer, "PNG")
        member = Member("k", "", data=buffer.getvalue())
        found.append(decode_member(member, DecodeRules(10**6, True), Preprocess((32, 32))).levels)
    assert found == [16, 255]
    assert dark_hints({}) == dark_hints({255: 2, 16: 2}) == []
    (hint,) = dark_hints({16: 3, 255: 2})
    assert hint.startswith("3 of 5 16-bit grey images use less than an eighth of their range")
