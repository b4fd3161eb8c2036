"""Bands and ranges of pictures that are decoded in memory: exact levels, orientation, limits and damage."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydetect.config import SourceSpec
from raydetect.config.view import TileSpec, ViewSpec
from raydetect.images.decode import Pixels, decode_image, decode_member
from raydetect.images.opening import DecodeRules
from raydetect.images.png import chunks
from raydetect.images.preprocess import Preprocess
from raydetect.images.rasters import in_memory
from raydetect.images.rasters.library import INSTALL
from raydetect.images.view_files import alignment_of
from raydetect.records import Member
from raydetect.views.view import View
from tests.builders.rasters import raster

SIDE = 48
RULES = DecodeRules.of(SourceSpec(uri="memory://x"))
RANDOM = np.random.default_rng(0)
DEEP = RANDOM.integers(0, 65_536, (SIDE, SIDE, 4)).astype(np.uint16)
SHALLOW = RANDOM.integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, spec: ViewSpec, rules: DecodeRules = RULES) -> Pixels:
    return decode_member(Member("a", "memory://a", data), rules, Preprocess((SIDE, SIDE), "full", View(spec)))


def shown(data: bytes, spec: ViewSpec) -> np.ndarray:
    found = decoded(data, spec)
    assert found.status == "ok", found.error
    assert found.only_input is not None
    return found.only_input


def expected(values_HWC: np.ndarray, low: float, high: float) -> np.ndarray:
    """Levels of one or three bands as RGB, by the formula of the documentation."""
    levels = np.floor(np.clip((values_HWC.astype(float) - low) / (high - low), 0, 1) * 255 + 0.5)
    return np.broadcast_to(levels, (*levels.shape[:2], 3)).astype(np.uint8)


def png(values: np.ndarray) -> bytes:
    return raster(values, "PNG")


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """Adds a chunk behind the header of a PNG."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize(
    ("data", "bands", "values"),
    [
        (png(DEEP[..., 0]), None, DEEP[..., :1]),
        (png(DEEP[..., 0]), (1,), DEEP[..., :1]),
        (png(DEEP[..., :2]), None, DEEP[..., :1]),
        (png(DEEP[..., :2]), (2,), DEEP[..., 1:2]),
        (png(DEEP[..., :3]), None, DEEP[..., :3]),
        (png(DEEP[..., :3]), (3, 1, 2), DEEP[..., [2, 0, 1]]),
        (png(DEEP), None, DEEP[..., :3]),
        (png(DEEP), (4,), DEEP[..., 3:]),
        (encoded(Image.fromarray(DEEP[..., 0].astype(np.int32)), "PPM"), None, DEEP[..., :1]),
    ],
)
def test_sixteen_bits_are_mapped_from_all_their_bits(data: bytes, bands: Any, values: np.ndarray) -> None:
    for low, high in ((500, 1700), (0, 65_535), (-100.5, 40_000)):
        assert (shown(data, ViewSpec(bands=bands, range=(low, high))) == expected(values, low, high)).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "PPM"])
@pytest.mark.parametrize("bands", [None, (2,), (3, 2, 1)])
def test_eight_bits_are_mapped_and_their_bands_chosen(kind: str, bands: Any) -> None:
    data = encoded(Image.fromarray(SHALLOW[..., :3]), kind, **({"lossless": True} if kind == "WEBP" else {}))
    values = SHALLOW[..., :3] if bands is None else SHALLOW[..., [band - 1 for band in bands]]
    assert (shown(data, ViewSpec(bands=bands, range=(30, 91))) == expected(values, 30, 91)).all()
    if bands is not None:
        assert (shown(data, ViewSpec(bands=bands)) == expected(values, 0, 255)).all()


def test_grey_alpha_and_few_bits_have_their_bands() -> None:
    grey_and_alpha = encoded(Image.fromarray(SHALLOW[..., :2], "LA"))
    assert (shown(grey_and_alpha, ViewSpec(range=(9, 90))) == expected(SHALLOW[..., :1], 9, 90)).all()
    assert (shown(encoded(Image.fromarray(SHALLOW)), ViewSpec(bands=(4,))) == expected(SHALLOW[..., 3:], 0, 255)).all()
    bilevel = encoded(Image.fromarray(SHALLOW[..., 0] > 127))
    assert (shown(bilevel, ViewSpec(range=(0, 510))) == expected((SHALLOW[..., :1] > 127) * 255, 0, 510)).all()


def test_a_jpeg_is_mapped_from_its_decoded_values() -> None:
    data = encoded(Image.fromarray(SHALLOW[..., 0]), "JPEG", quality=95)
    values = np.asarray(decode_image(data, RULES))[..., :1]
    assert (shown(data, ViewSpec(range=(100, 150))) == expected(values, 100, 150)).all()


def test_bands_alone_keep_the_fixed_scale() -> None:
    assert (shown(png(DEEP[..., 0]), ViewSpec(bands=(1,))) == shown(png(DEEP[..., 0]), ViewSpec())).all()
    upper = (DEEP >> 8).astype(np.uint8)
    assert (shown(png(DEEP[..., :3]), ViewSpec(bands=(3, 2, 1))) == upper[..., [2, 1, 0]]).all()


def test_a_range_counts_stored_values_whatever_other_chunks_say() -> None:
    values = (DEEP[..., :1] >> 4).astype(np.uint16)  # 12 bits, in the lower ones
    data = png(values[..., 0])
    for kind, content in ((b"sBIT", b"\x0c"), (b"gAMA", struct.pack(">I", 45_455)), (b"tRNS", b"\0\7")):
        assert (shown(with_chunk(data, kind, content), ViewSpec(range=(0, 4095))) == expected(values, 0, 4095)).all()
    colour = with_chunk(png(DEEP[..., :3]), b"tRNS", DEEP[0, 0, :3].astype(">u2").tobytes())
    assert (shown(colour, ViewSpec(range=(0, 9999))) == expected(DEEP[..., :3], 0, 9999)).all()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(count: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    values = DEEP[..., 0] if count == 1 else DEEP[..., :3]
    data = with_chunk(png(values), b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    stored = expected(values.reshape(SIDE, SIDE, count), 0, 5000)
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert (shown(data, ViewSpec(range=(0, 5000))) == turned).all()
    ignoring = decoded(data, ViewSpec(range=(0, 5000)), DecodeRules(1 << 26, False))
    assert ignoring.only_input is not None and (ignoring.only_input == stored).all()


@pytest.mark.parametrize("count", [1, 3])
def test_tiles_and_drawings_show_the_same_levels(count: int) -> None:
    values = DEEP[..., :count]
    data, levels = png(values if count > 1 else values[..., 0]), expected(values, 1000, 3000)
    found = decoded(data, ViewSpec(range=(1000, 3000), tile=TileSpec(size=(24, 24), overlap=0)))
    for item in found.inputs:
        picture = Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BILINEAR, item.window.box)
        assert (item.image_HWC == np.asarray(picture)).all()
    assert len(found.inputs) == 4
    assert (np.asarray(decode_image(data, RULES, SIDE, ViewSpec(range=(1000, 3000)))) == levels).all()


def test_the_picture_to_align_to_is_read_by_the_range() -> None:
    blob = np.zeros((64, 64), np.uint16)
    blob[20:40, 24:50] = RANDOM.integers(300, 600, (20, 26))
    spec = ViewSpec(range=(200, 700), align="phase", align_to="memory://a.png")
    reference = Image.open(io.BytesIO(alignment_of(png(blob), "a.png", spec).png))
    assert (np.asarray(reference) == expected(blob[..., None], 200, 700)[..., 0]).all()


@pytest.mark.parametrize("count", [1, 3])
def test_limits_and_damage_give_a_status(count: int) -> None:
    data, spec = png(DEEP[..., 0] if count == 1 else DEEP[..., :3]), ViewSpec(range=(0, 100))
    assert decoded(data, spec, DecodeRules(SIDE * SIDE - 1, True)).status == "too_many_pixels"
    assert decoded(b"", spec).status == "empty"
    start, stop = next((start, stop) for kind, start, stop in chunks(data) if kind == b"IDAT")
    middle = (start + stop) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]
    for bad in (data[: len(data) // 2], flipped, data[:start] + data[stop:]):
        found = decoded(bad, spec)
        assert found.status == "corrupt" and not found.inputs and "vsimem" not in found.error, found


@pytest.mark.parametrize(
    ("picture", "kind", "spec", "words"),
    [
        (Image.fromarray(SHALLOW[..., :3]), "PNG", ViewSpec(bands=(4,)), "view.bands = [4], and it has 3 bands."),
        (Image.fromarray(SHALLOW[..., 0]), "JPEG", ViewSpec(bands=(3, 2, 1)), "it has 1 band. Name others."),
        (Image.fromarray(SHALLOW[..., :3]).quantize(9), "PNG", ViewSpec(range=(0, 9)), "Convert it to RGB."),
        (Image.fromarray(SHALLOW).convert("CMYK"), "JPEG", ViewSpec(range=(0, 9)), "pixels of mode CMYK"),
    ],
)
def test_what_has_no_such_bands_is_one_sentence(picture: Image.Image, kind: str, spec: ViewSpec, words: str) -> None:
    found = decoded(encoded(picture, kind), spec)
    assert found.status == "unsupported_mode" and words in found.error


def test_values_that_are_rescaled_are_refused() -> None:
    data = b"P5 # a comment\n2 1\n4095\n" + np.array([100, 4095], ">u2").tobytes()
    found = decoded(data, ViewSpec(range=(0, 4095)))
    assert found.status == "unsupported_mode" and "a PPM with values up to 4095 is rescaled" in found.error
    colour = b"P6 1 1 65535\n" + np.array([1, 2, 3], ">u2").tobytes()
    assert "up to 65535" in decoded(colour, ViewSpec(range=(0, 9))).error


def test_only_deep_colour_needs_rasterio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_memory, "is_installed", lambda: False)
    monkeypatch.setattr("raydetect.images.rasters.opening.is_installed", lambda: False)
    assert decoded(png(DEEP[..., 0]), ViewSpec(range=(0, 9))).status == "ok"
    found = decoded(png(DEEP[..., :3]), ViewSpec(range=(0, 9)))
    assert found.status == "unsupported_mode" and INSTALL in found.error
    assert decoded(png(DEEP[..., :3]), ViewSpec()).status == "ok"
