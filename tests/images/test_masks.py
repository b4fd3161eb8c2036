"""Masks: which levels are defects, and how masks follow the orientation of their images."""

import io

import numpy as np
import pytest
from PIL import Image

from raydetect.errors import MemberError
from raydetect.images.decode import Pixels, decode_member
from raydetect.images.masks.decoding import decode_mask
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.records import Member

APPLY, IGNORE = DecodeRules(10**6, True), DecodeRules(10**6, False)
MARKS = np.zeros((40, 64), bool)
MARKS[6:17, 9:30] = True
PLAIN = Pixels((), 64, 40)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def of(levels: np.ndarray, kind: str = "PNG", **options: object) -> np.ndarray:
    return decode_mask(encoded(Image.fromarray(levels), kind, **options), PLAIN, APPLY)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("level", [1, 2, 100, 127, 128, 200, 255])
def test_one_level_is_a_defect_however_bright(kind: str, level: int) -> None:
    assert (of(np.where(MARKS, level, 0).astype(np.uint8), kind) == MARKS).all()


@pytest.mark.parametrize("level", [1, 300, 32767, 32768, 65535])
def test_one_16_bit_level_is_a_defect_however_bright(level: int) -> None:
    for kind in ("PNG", "TIFF"):
        assert (of(np.where(MARKS, level, 0).astype(np.uint16), kind) == MARKS).all()


def test_class_ids_bits_colours_and_palettes() -> None:
    ids = np.where(MARKS, 1 + np.arange(64) % 15 * 17, 0).astype(np.uint8)
    assert (of(ids) == MARKS).all()
    assert (of(MARKS) == MARKS).all()
    for colour in ([255, 0, 0], [0, 0, 90], [0, 128, 3]):
        assert (of(MARKS[..., None] * np.array(colour, np.uint8)) == MARKS).all()
    alpha = np.dstack([np.where(MARKS, 255, 0).astype(np.uint8)] * 3 + [np.full(MARKS.shape, 255, np.uint8)])
    assert (of(alpha) == MARKS).all()
    assert (of(np.dstack([alpha[..., 0], alpha[..., 3]])) == MARKS).all()
    palette = Image.fromarray(MARKS.astype(np.uint8), "L").convert("P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # the colours contradict the indices
    assert (decode_mask(encoded(palette, "PNG"), PLAIN, APPLY) == MARKS).all()


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_artefacts_around_edges_are_not_defects(quality: int) -> None:
    for levels in (np.where(MARKS, 255, 0), MARKS[..., None] * np.array([255, 255, 255])):
        found = of(levels.astype(np.uint8), "JPEG", quality=quality)
        assert (found != MARKS).sum() <= 12
    lossy = of(np.dstack([np.where(MARKS, 255, 0).astype(np.uint8)] * 3), "WEBP", quality=quality)
    assert (lossy != MARKS).sum() <= 12


def test_a_soft_border_is_a_defect_from_half_of_full_scale_on() -> None:
    soft = np.clip(np.add.outer(np.zeros(40), np.arange(64) * 4), 0, 255).astype(np.uint8)
    assert (of(soft) == (soft >= 128)).all()
    assert (of(soft.astype(np.uint16) * 257) == (soft >= 128)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("rules", [APPLY, IGNORE])
def test_a_mask_is_rotated_like_its_image(orientation: int, rules: DecodeRules) -> None:
    levels = Image.fromarray(np.where(MARKS, 255, 0).astype(np.uint8))
    data = encoded(levels, "PNG", exif=exif(orientation))
    image = decode_member(Member("k", "", data=data), rules, Preprocess((8, 8)))
    found = decode_mask(data, image, rules)
    assert found.shape == (image.height, image.width)
    seen = levels.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else levels
    if orientation in (1, 6) and rules.apply_exif:
        assert (found == (np.asarray(seen) > 0)).all()
    if orientation >= 5 or not rules.apply_exif:  # its size shows that it was drawn on the image as stored
        assert (decode_mask(encoded(levels, "PNG"), image, rules) == found).all()


def test_a_mask_drawn_on_the_upright_image_is_not_rotated() -> None:
    image = Pixels((), 40, 64, orientation=6)
    upright = np.rot90(np.where(MARKS, 255, 0).astype(np.uint8), -1)
    assert (decode_mask(encoded(Image.fromarray(upright), "PNG"), image, APPLY) == (upright > 0)).all()


def test_a_damaged_mask_and_one_of_floats_are_refused() -> None:
    whole = encoded(Image.fromarray(np.where(MARKS, 255, 0).astype(np.uint8)), "JPEG")
    with pytest.raises(MemberError, match="scan is damaged"):
        decode_mask(whole[: len(whole) - 30] + b"\xff\xd9", PLAIN, APPLY)
    with pytest.raises(MemberError, match="mode F"):
        of(MARKS.astype(np.float32), "TIFF")
