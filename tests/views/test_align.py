"""Alignment by phase correlation, against shifted copies; what follows the part, and what is recorded."""

import base64
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from raydetect.config import ViewSpec
from raydetect.config.validation import validate
from raydetect.errors import SpecError
from raydetect.images.decode import Pixels, decode_member
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.images.view_files import alignment_of
from raydetect.records import Member
from raydetect.scoring.regions import find_regions
from raydetect.views.align import Alignment, note_of, reference_png, shift_in
from raydetect.views.placement import placed, whole_size
from raydetect.views.region import Region
from raydetect.views.view import FILL, View
from tests.builders.images import encode

RULES = DecodeRules(10**8, True)
ALIGN = ViewSpec(align="phase", align_to="reference.png")
MARGIN = 40
SQUARE = Region(polygons=(((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)),))


def texture(seed: int, height: int, width: int, blur_px: float = 2.0) -> np.ndarray:
    """Levels of a texture with a margin on all sides, float64."""
    noise_HW = np.random.default_rng(seed).normal(size=(height + 2 * MARGIN, width + 2 * MARGIN))
    blurred_HW = ndimage.gaussian_filter(noise_HW, blur_px)
    return 120 + 35 * blurred_HW / blurred_HW.std()


def shown(levels_HW: np.ndarray, across: float = 0, down: float = 0) -> np.ndarray:
    """The picture without the margin after a shift right and down, uint8 grey."""
    moved_HW = ndimage.shift(levels_HW, (down, across), order=3)[MARGIN:-MARGIN, MARGIN:-MARGIN]
    return np.clip(np.round(moved_HW), 0, 255).astype(np.uint8)


def found(reference_HW: np.ndarray, picture_HW: np.ndarray, most: float = 0.1) -> tuple[float, float] | None:
    height, width = picture_HW.shape
    return Alignment(reference_png(reference_HW), most).shift_of(picture_HW, (width, height))


def decoded(picture: np.ndarray, view: View, image_size: tuple[int, int] = (64, 64)) -> Pixels:
    pixels = decode_member(Member("k", "", data=encode(picture)), RULES, Preprocess(image_size, "full", view))
    assert pixels.status == "ok", pixels.error
    return pixels


def view_to(reference: np.ndarray, region: Region | None = None, **changes: Any) -> View:
    spec = replace(ALIGN, **changes)
    return View(spec.settings, region, alignment_of(encode(reference), "reference.png", spec))


@pytest.mark.parametrize("blur_px", [1.0, 2.0])
@pytest.mark.parametrize("size", [(256, 192), (96, 96), (120, 240)])
@pytest.mark.parametrize(
    "shift", [(0, 0), (1, 0), (0, -1), (5, 3), (-7, 4), (0.5, 0), (0, -0.5), (2.5, -1.5), (3.25, 6.8), (-9, -9)]
)
def test_a_shift_is_found_within_a_quarter_of_a_px(
    size: tuple[int, int], shift: tuple[float, float], blur_px: float
) -> None:
    for seed in range(3):
        levels_HW = texture(seed, *size, blur_px)
        by = found(shown(levels_HW), shown(levels_HW, *shift))
        assert by is not None and max(abs(a - b) for a, b in zip(by, shift, strict=True)) <= 0.25


def test_light_contrast_and_noise_do_not_matter() -> None:
    levels_HW = texture(1, 128, 128)
    noise_HW = np.random.default_rng(2).normal(0, 5, (128, 128))
    picture_HW = np.clip(shown(levels_HW, 4, -6) * 0.5 + 70 + noise_HW, 0, 255).astype(np.uint8)
    picture_HW[50:60, 70:80] = 255  # a defect
    by = found(shown(levels_HW), picture_HW)
    assert by is not None and max(abs(by[0] - 4), abs(by[1] + 6)) <= 0.25


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(256, 192), (96, 96), (32, 32)])
def test_other_flat_and_far_pictures_are_not_aligned(size: tuple[int, int], seed: int) -> None:
    reference_HW = shown(texture(seed, *size))
    other_HW = shown(texture(seed + 100, *size))
    ramp_HW = np.broadcast_to(np.linspace(0, 255, size[1]), size).astype(np.uint8)
    for picture_HW in (other_HW, ramp_HW, np.zeros_like(other_HW), np.full_like(other_HW, 255)):
        assert found(reference_HW, picture_HW) is None
    levels_HW = texture(seed, *size)
    limit = 0.05
    assert found(shown(levels_HW), shown(levels_HW, 0.04 * size[1], 0), limit) is not None
    assert found(shown(levels_HW), shown(levels_HW, 0.08 * size[1], 0), limit) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(16, 80), st.integers(16, 80), st.sampled_from((2, 3, 256)))
def test_any_picture_has_a_shift_within_the_limit_or_none(seed: int, height: int, width: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    reference_HW, picture_HW = random.integers(0, levels, (2, height, width), np.uint8)
    by = found(reference_HW, picture_HW)
    assert by is None or (abs(by[0]) <= 0.1 * width + 0.01 and abs(by[1]) <= 0.1 * height + 0.01)


def test_a_large_picture_is_compared_at_the_size_of_the_reference() -> None:
    levels_HW = ndimage.zoom(texture(3, 192, 256), 4, order=1)
    margin = 4 * MARGIN
    reference, moved = (
        np.clip(np.roll(levels_HW, shift, (0, 1))[margin:-margin, margin:-margin], 0, 255).astype(np.uint8)
        for shift in ((0, 0), (-22, 31))
    )
    view = view_to(reference)
    assert view.alignment is not None and view.alignment.size == (256, 192)
    (note,) = decoded(moved, view).notes
    assert max(abs(a - b) for a, b in zip(shift_in(note), (31, -22), strict=True)) <= 1  # a quarter of a px, times 4
    half = np.asarray(Image.fromarray(moved).resize((512, 384)))
    (note,) = decoded(half, view).notes
    assert max(abs(a - b) for a, b in zip(shift_in(note), (15.5, -11), strict=True)) <= 0.5
    assert decoded(moved[:, :700], view).notes == ("not_aligned",)
    needed = view.needed((1024, 768), (64, 64))
    assert needed == (256, 192) and View(view.spec).needed((1024, 768), (64, 64)) == (64, 64)


VIEWS: list[dict[str, Any]] = [
    {},
    {"resize": "pad"},
    {"resize": "short_side"},
    {"size": (96, 96), "crop": (64, 64)},
]


@pytest.mark.parametrize("with_region", [False, True])
@pytest.mark.parametrize("settings_of_view", VIEWS)
@pytest.mark.parametrize("shift", [(6, -4), (-5, 9), (0, 3)])
def test_the_input_shows_the_part_where_the_reference_has_it(
    settings_of_view: dict[str, Any], shift: tuple[int, int], with_region: bool
) -> None:
    """Inside of the picture, the input of a shifted picture is that of the reference; outside it is fill."""
    levels_HW = texture(4, 100, 140)
    reference, moved = shown(levels_HW), shown(levels_HW, *shift)
    view = view_to(reference, SQUARE if with_region else None, **settings_of_view)
    (still,) = decoded(reference, view).inputs
    pixels = decoded(moved, view)
    (item,) = pixels.inputs
    by = shift_in(pixels.notes[0])
    assert max(abs(a - b) for a, b in zip(by, shift, strict=True)) <= 0.1 and item.layout.shift == by
    looked_HW = np.ones((64, 64), bool) if item.looked_HW is None else item.looked_HW
    still_HW = np.ones((64, 64), bool) if still.looked_HW is None else still.looked_HW
    assert not (looked_HW & ~still_HW).any() and looked_HW.sum() > 0.75 * still_HW.sum()
    assert (item.image_HWC[~looked_HW] == FILL).all()
    inner_HW = ndimage.binary_erosion(looked_HW, iterations=2)
    np.testing.assert_allclose(item.image_HWC[inner_HW].astype(int), still.image_HWC[inner_HW], atol=14)
    left, upper, right, lower = item.layout.box
    assert 0 <= left < right <= 140 and 0 <= upper < lower <= 100
    for x, y in ((left, upper), (right, lower)):  # what is left out is what lies outside of the picture
        assert -1e-9 <= x <= 140 + 1e-9 and -1e-9 <= y <= 100 + 1e-9
    if not with_region:
        box = still.layout.box
        pitch = (box[2] - box[0]) / still.layout.canvas[1], (box[3] - box[1]) / still.layout.canvas[0]
        wanted = (
            max(0, box[0] + by[0]), max(0, box[1] + by[1]), min(140, box[2] + by[0]), min(100, box[3] + by[1]),
        )  # fmt: skip
        for got, want, step in zip(item.layout.box, wanted, pitch * 2, strict=True):
            assert abs(got - want) < step


@pytest.mark.parametrize("settings_of_view", VIEWS)
def test_regions_and_maps_are_in_px_of_the_stored_picture(settings_of_view: dict[str, Any]) -> None:
    """A value of the map lies where the detector saw it: over the same pixels of the part, shifted."""
    view = View(ViewSpec(**settings_of_view))
    plain = view.layout((140, 100), (64, 64))
    map_HW = np.zeros((64, 64), np.float32)
    map_HW[30:34, 20:26] = 5
    shift = (7.25, -4.5)
    moved = plain.moved(shift)
    regions = []
    for layout in (plain, moved):
        (window,) = layout.windows
        left, upper, right, lower = window.place
        seen_HW = map_HW[upper:lower, left:right]
        (region,), _ = find_regions(seen_HW, layout, 1.0, 5)
        regions.append(region)
        whole_HW = placed(seen_HW, layout, whole_size(layout))
        stored_HW = placed(seen_HW, layout, (100, 140))
        centre = ndimage.center_of_mass(np.nan_to_num(stored_HW))
        assert abs(centre[1] + 0.5 - (region.x + region.width / 2)) < 2.5
        assert abs(centre[0] + 0.5 - (region.y + region.height / 2)) < 2.5
        assert whole_size(layout) == whole_size(plain) and np.nansum(whole_HW) == seen_HW.sum()
    first, second = regions
    assert abs(second.x - first.x - shift[0]) <= 1 and abs(second.y - first.y - shift[1]) <= 1
    assert abs(second.width - first.width) <= 1 and abs(second.height - first.height) <= 1
    assert np.isnan(placed(np.ones(moved.canvas, np.float32), moved, (100, 140))).any() or "crop" in settings_of_view


def test_a_layout_of_which_nothing_would_be_left_stays() -> None:
    layout = View(ViewSpec(resize="pad")).layout((1, 64), (16, 16))
    assert layout.moved((0.5, 0)) is layout and layout.moved((0.0, 0.0)) is layout
    assert layout.moved((0, 64)) is layout


def test_a_flat_picture_and_one_of_another_ratio_are_ok_and_not_aligned() -> None:
    reference = shown(texture(5, 64, 96))
    view = view_to(reference)
    plain = View(ViewSpec())
    for picture in (np.full((64, 96, 3), 90, np.uint8), shown(texture(5, 64, 64)), np.zeros((1, 1), np.uint8)):
        pixels = decoded(picture, view)
        assert pixels.notes == ("not_aligned",)
        np.testing.assert_array_equal(pixels.only_input, decoded(picture, plain).only_input)


def test_the_reference_is_read_upright(tmp_path: Any) -> None:
    reference = shown(texture(6, 96, 64))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(reference).transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    assert alignment_of(buffer.getvalue(), "a.png", ALIGN) == alignment_of(encode(reference), "a.png", ALIGN)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"no picture", "reference.png is not a picture"),
        (encode(np.full((64, 64), 9, np.uint8)), "reference.png shows nothing by which a shift"),
        (encode(shown(texture(0, 8, 90))), "reference.png is shrunk to 90 x 8 px; it needs 16 per side"),
    ],
)
def test_a_reference_that_is_of_no_use_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(SpecError, match=word):
        alignment_of(data, "reference.png", ALIGN)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"align": "phase"}, "align: phase needs align_to"),
        ({"align_to": "a.png"}, "apply to align: phase only"),
        ({"align_max": 0.2}, "apply to align: phase only"),
        ({"align": "phase", "align_to": "a.png", "align_max": 0.3}, "align_max"),
        ({"align": "phase", "align_to": "a.png", "tile": {}}, "remove one of them"),
        ({"align": "edges"}, "align"),
    ],
)
def test_mistaken_settings_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        validate(ViewSpec, values, "view")


def test_a_record_is_restored() -> None:
    view = view_to(shown(texture(7, 128, 300)), SQUARE, align_max=0.2, resize="pad")
    entry = view.recorded()
    assert set(entry) == {"resize", "region", "align"} and entry["align"]["max"] == 0.2
    restored = View.of_record(entry)
    assert restored == view and restored.recorded() == entry and restored.ignores
    assert view.alignment is not None and view.alignment.size == (256, 109)


def png(picture: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


GOOD = png(Image.fromarray(shown(texture(8, 40, 40))))


@pytest.mark.parametrize(
    "entry",
    [
        {"align": "phase"},
        {"align": {}},
        {"align": {"png": GOOD}},
        {"align": {"png": GOOD, "max": 0.1, "more": 1}},
        {"align": {"png": GOOD, "max": 0.5}},
        {"align": {"png": GOOD, "max": 0}},
        {"align": {"png": GOOD, "max": True}},
        {"align": {"png": GOOD, "max": "0.1"}},
        {"align": {"png": GOOD, "max": math.nan}},
        {"align": {"png": GOOD[:40], "max": 0.1}},
        {"align": {"png": "%%%", "max": 0.1}},
        {"align": {"png": 3, "max": 0.1}},
        {"align": {"png": png(Image.new("RGB", (40, 40))), "max": 0.1}},
        {"align": {"png": png(Image.new("L", (257, 40))), "max": 0.1}},
        {"align": {"png": png(Image.new("L", (40, 8))), "max": 0.1}},
        {"align": {"png": png(Image.new("L", (40, 40)), "BMP"), "max": 0.1}},
        {"align": {"png": GOOD, "max": 0.1}, "tile": {"overlap": 16}},
        {"align_to": "a.png"},
        {"align_max": 0.2},
    ],
)
def test_a_damaged_record_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="align"):
        View.of_record(entry)


@given(st.floats(-5e6, 5e6), st.floats(-5e6, 5e6))
def test_a_note_has_the_shift_to_the_bit(across: float, down: float) -> None:
    shift = round(across, 2), round(down, 2)
    assert shift_in(f"pages_not_read: 2; {note_of(shift)}; nodata: 1.00 %") == shift
    assert shift_in("not_aligned") == shift_in("") == shift_in("aligned: a, b") == (0.0, 0.0)
    assert shift_in("label_not_read: aligned: 1.00, 2.00") == (0.0, 0.0)
