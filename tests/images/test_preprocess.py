"""Decoding: the rule of every pixel format, and every kind of bad image."""

import io
import struct
import time
import zlib
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import signal

from raydetect.config import SourceSpec
from raydetect.errors import MemberError
from raydetect.images import decode, opening
from raydetect.images.bit_depth import scale_table
from raydetect.images.decode import (
    DecodePool,
    Pixels,
    brightness_and_sharpness,
    decode_image,
    decode_member,
    decode_stream,
)
from raydetect.images.jpeg import UnsupportedByTurboError, check_scans, decode_jpeg, sample_bits, segments, without_exif
from raydetect.images.opening import FORMATS, DecodeRules
from raydetect.images.pages import gif_frames
from raydetect.images.png import significant_bits
from raydetect.images.preprocess import Preprocess
from raydetect.images.tiff import pages as tiff_pages
from raydetect.python_api.inputs import InputImage
from raydetect.records import BAD_STATUSES, OK, Member
from raydetect.storage import Storage
from raydetect.views.windows import Input

RULES = DecodeRules.of(SourceSpec(uri="memory://x"))
COLOUR = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
GREY = COLOUR[..., 0]


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, rules: DecodeRules = RULES) -> np.ndarray:
    picture = decode_image(data, rules)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_colour_is_unchanged(kind: str, options: dict[str, object]) -> None:
    assert (pixels(encoded(Image.fromarray(COLOUR), kind, **options)) == COLOUR).all()


def test_jpeg_is_decoded_as_pillow_does() -> None:
    data = encoded(Image.fromarray(COLOUR), "JPEG", quality=95)
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_grey_is_repeated(kind: str) -> None:
    assert (pixels(encoded(Image.fromarray(GREY), kind)) == GREY[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_use_one_fixed_scale(kind: str) -> None:
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    assert (pixels(encoded(Image.fromarray(values), kind)) == np.rint(values / 257)[..., None]).all()
    dark = np.full((4, 4), 300, np.uint16)  # a dark image stays dark: nothing is stretched
    assert pixels(encoded(Image.fromarray(dark), kind)).max() == 1


def test_alpha_is_dropped_and_palettes_are_looked_up() -> None:
    alpha = np.dstack([COLOUR, GREY])
    assert (pixels(encoded(Image.fromarray(alpha), "PNG")) == COLOUR).all()
    assert (pixels(encoded(Image.fromarray(np.dstack([GREY, GREY])), "PNG")) == GREY[..., None]).all()
    palette = Image.fromarray(COLOUR).quantize(16)
    assert (pixels(encoded(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    assert (pixels(encoded(palette, "PNG", transparency=3)) == np.asarray(palette.convert("RGB"))).all()
    bits = Image.fromarray(GREY > 127)
    assert set(np.unique(pixels(encoded(bits, "PNG")))) == {0, 255}


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK")
    assert np.abs(pixels(encoded(red, "JPEG", quality=95)).astype(int) - (200, 30, 40)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_or_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(COLOUR), "PNG", exif=exif)
    turned = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR, -1),
        7: COLOUR[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(COLOUR),
    }[orientation]
    assert (pixels(data) == turned).all()
    ignore = DecodeRules.of(SourceSpec(uri="memory://x", exif_orientation="ignore"))
    assert (pixels(data, ignore) == COLOUR).all()


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims more pixels than its data contain."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "empty"),
        (b"this is a text file, whatever its name says", "not_an_image"),
        (b"\xff\xd8\xff", "not_an_image"),
        (png(100_000, 100_000), "too_many_pixels"),
        (png(20_000, 20_000), "too_many_pixels"),
        (png(100, 100), "corrupt"),
        (encoded(Image.fromarray(COLOUR), "PNG")[:-600], "corrupt"),
        (encoded(Image.fromarray(COLOUR), "JPEG")[:-300], "corrupt"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported_mode"),
        (encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "unsupported_mode"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    ],
)
def test_a_bad_image_is_a_status(data: bytes, status: str) -> None:
    started = time.monotonic()
    found = decode_member(Member("k#x.jpg", "", data=data), RULES, Preprocess((8, 8)))
    assert found.status == status in BAD_STATUSES and found.only_input is None
    assert found.error.startswith("k#x.jpg: ") and "\n" not in found.error
    assert time.monotonic() - started < 2


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2000), st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]))
def test_no_bytes_break_the_decoder(noise: bytes, offset: int, kind: str) -> None:
    data = encoded(Image.fromarray(COLOUR), kind)
    offset %= len(data)
    found = decoded(data[:offset] + noise + data[offset + len(noise) :])
    assert found.status == OK or found.status in BAD_STATUSES


def test_resizing_and_order_and_stored_size() -> None:
    files = [encoded(Image.fromarray(np.full((40 + i, 60, 3), i * 9, np.uint8)), "PNG") for i in range(12)]
    members = [Member(str(i), "", data=data) for i, data in enumerate(files)]
    for threads in (1, 3):
        with DecodePool(threads) as pool:
            stream = list(decode_stream(members, RULES, Preprocess((24, 32)), pool))
        inputs, found = [i for i in stream if isinstance(i, Input)], [p for p in stream if isinstance(p, Pixels)]
        assert [i.image_HWC.shape for i in inputs] == [(24, 32, 3)] * 12
        assert [(p.width, p.height) for p in found] == [(60, 40 + i) for i in range(12)]
        assert [int(i.image_HWC.mean()) for i in inputs] == [i * 9 for i in range(12)]


def test_a_bad_member_passes_through_and_a_pixel_limit_is_kept() -> None:
    bad = Member("k", "", status="unsafe_name", error="why")
    assert decode_member(bad, RULES, Preprocess((8, 8))).status == "unsafe_name"
    small = DecodeRules.of(SourceSpec(uri="memory://x", max_pixels=599))
    with pytest.raises(MemberError, match=r"30 x 20 px is more than source\.max_pixels = 599"):
        decode_image(encoded(Image.fromarray(COLOUR), "PNG"), small)


@pytest.mark.parametrize("shape", [(20, 30), (3, 3), (2, 5), (1, 1), (64, 48)])
def test_brightness_and_sharpness_equal_scipy(shape: tuple[int, int]) -> None:
    grey = np.random.default_rng(5).integers(0, 256, shape).astype(np.uint8)
    brightness, sharpness = brightness_and_sharpness(grey)
    assert brightness == pytest.approx(float(grey.mean()) / 255, abs=1e-12)
    kernel = np.asarray([[0, 1, 0], [1, -4, 1], [0, 1, 0]]) / 255
    inner = signal.convolve2d(grey.astype(np.float64), kernel, mode="valid") if min(shape) > 2 else np.zeros(1)
    assert sharpness == pytest.approx(float(inner.std()) / brightness, abs=1e-9)
    assert brightness_and_sharpness(np.zeros((9, 9), np.uint8)) == (0.0, 0.0)


def test_a_dim_picture_is_less_bright_and_a_blurred_one_less_sharp() -> None:
    plain = Image.fromarray(COLOUR)
    blurred = plain.filter(ImageFilter.GaussianBlur(2))
    sharp, soft = (decoded(encoded(p, "PNG")) for p in (plain, blurred))
    assert soft.sharpness < 0.3 * sharp.sharpness  # type: ignore[operator]
    assert soft.brightness == pytest.approx(sharp.brightness, abs=0.02)
    dim = decode_member(
        Member("k", "k", data=encoded(Image.fromarray(COLOUR // 2), "PNG")), RULES, Preprocess((20, 30))
    )
    assert dim.brightness == pytest.approx(sharp.brightness / 2, abs=0.01)  # type: ignore[operator]
    assert dim.sharpness == pytest.approx(sharp.sharpness, rel=0.02)
    assert decode_member(Member("k", "k", data=b"x"), RULES, Preprocess((20, 30))).brightness is None


def decoded(data: bytes, rules: DecodeRules = RULES) -> Pixels:
    """Decodes a member at the size of COLOUR; everything except pixels is the same at every DCT scale."""
    member = Member("k", "", data=data)
    found = decode_member(member, rules, Preprocess((20, 30)))
    for size in ((20, 30), (10, 15)):
        scaled = decode_member(member, rules, Preprocess(size, "at_least_2x"))
        assert (scaled.status, scaled.error, scaled.notes) == (found.status, found.error, found.notes)
        assert (scaled.stored_size, scaled.orientation) == (found.stored_size, found.orientation)
    return found


IGNORE = DecodeRules.of(SourceSpec(uri="memory://x", exif_orientation="ignore"))
SCENE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (10, 12, 3)).astype(np.uint8)).resize((240, 200), 3)
NOISY = Image.fromarray(
    np.clip(np.asarray(SCENE) + np.random.default_rng(4).normal(0, 6, (200, 240, 1)), 0, 255).astype(np.uint8)
)


def jpeg_end(data: bytes) -> int:
    """Position of the first scan's data."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95},
        {"quality": 40, "optimize": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"restart_marker_blocks": 5},
        {"keep_rgb": True},
    ],
)
def test_every_kind_of_jpeg_decodes_as_with_pillow(mode: str, options: dict[str, object]) -> None:
    data = encoded(NOISY.convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (pixels(data) == expected).all()
    if mode == "CMYK" and options.get("subsampling") == 1:  # not supported by TurboJPEG, and Pillow hides warnings
        for truncated in (data[:-2], data[: len(data) // 2]):
            assert decoded(truncated).status == "corrupt"
        return
    assert (pixels(data[:-2]) == expected).all()  # complete except for its end marker
    assert (pixels(data + b"a trailer of a phone" * 9) == expected).all()


@pytest.mark.parametrize("options", [{"quality": 95}, {"optimize": True}, {"progressive": True}, {"subsampling": 0}])
def test_a_truncated_jpeg_is_never_ok(options: dict[str, object]) -> None:
    data = encoded(NOISY, "JPEG", **options)
    whole, begins = pixels(data), jpeg_end(data)
    for stop in range(begins, len(data) - 2, 97):
        for cut in (data[:stop], data[:stop] + b"\xff\xd9", data[:stop] + bytes(len(data) - stop)):
            found = decoded(cut)
            if found.status == OK:  # only padding bits were lost
                assert (pixels(cut) == whole).all()
            else:
                assert found.status == "corrupt" and "the JPEG's scan is damaged (" in found.error
    if "progressive" not in options:
        assert "premature end of data segment" in decoded(data[: len(data) // 2] + b"\xff\xd9").error


@pytest.mark.parametrize("options", [{"quality": 95}, {"optimize": True}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("size", [512, 2048])
def test_a_jpeg_with_a_hole_is_never_ok(options: dict[str, object], size: int) -> None:
    data = encoded(NOISY, "JPEG", **options)
    for start in range(jpeg_end(data), len(data) - size, 131):
        assert decoded(data[:start] + bytes(size) + data[start + size :]).status == "corrupt"


def test_a_progressive_jpeg_without_its_last_scans_is_corrupt() -> None:
    data = encoded(NOISY, "JPEG", progressive=True)
    starts = [start for marker, start, _ in segments(data) if marker == 0xDA]
    assert len(starts) > 5
    for start in starts[1:]:
        assert "scans are missing" in decoded(data[:start] + b"\xff\xd9").error
        with pytest.raises(MemberError, match="scans are missing"):
            check_scans(data[:start] + b"\xff\xd9")
    check_scans(data)


def test_a_jpeg_with_lost_restart_intervals_is_corrupt() -> None:
    data = encoded(NOISY, "JPEG", restart_marker_rows=1)
    first, second = data.index(b"\xff\xd1"), data.index(b"\xff\xd3")
    assert decoded(data[:first] + data[second:]).status == "corrupt"


@pytest.mark.parametrize("count", [1, 5, 20, 3000])
def test_bytes_between_the_segments_of_a_jpeg_are_not_damage(count: int) -> None:
    data = encoded(NOISY, "JPEG")
    scan = data.index(b"\xff\xda")
    padded = data[:scan] + b"x" * count + data[scan:]
    assert (pixels(padded) == pixels(data)).all()
    half = len(data) // 2
    assert decoded(padded[:half] + b"\xff\xd9").status == "corrupt"  # a second warning is noticed too


@pytest.mark.parametrize("filling", [b"\0", b" "])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 0}])
def test_a_few_bytes_before_the_end_of_a_jpeg_are_padding_and_many_are_damage(
    filling: bytes, options: dict[str, object]
) -> None:
    data = encoded(NOISY, "JPEG", **options)
    for count in (1, 7, 8, 9, 24, 32):
        assert (pixels(data[:-2] + filling * count + data[-2:]) == pixels(data)).all()
    assert "extraneous bytes before marker 0xd9" in decoded(data[:-2] + b"xyz" * 50 + data[-2:]).error


def test_harmless_values_in_a_jpeg_header_are_not_damage() -> None:
    data = encoded(NOISY, "JPEG")
    revision = data.index(b"JFIF\0") + 5
    assert (pixels(data[:revision] + b"\x09" + data[revision + 1 :]) == pixels(data)).all()
    parameters = jpeg_end(data) - 3
    assert (pixels(data[:parameters] + b"\0\0\0" + data[parameters + 3 :]) == pixels(data)).all()


def test_flat_images_with_scans_of_zeros_are_ok() -> None:
    flat = Image.new("RGB", (1200, 800), (9, 99, 140))
    for options in ({"optimize": True}, {"progressive": True}, {}):
        assert decoded(encoded(flat, "JPEG", **options)).status == OK


def test_a_jpeg_with_conflicting_sizes_is_refused() -> None:
    data = encoded(NOISY, "JPEG")
    with pytest.raises(MemberError, match="its headers disagree: 8 x 8 and 240 x 200 px"):
        decode_jpeg(data, (8, 8), "RGB")
    frame = data.index(b"\xff\xc0")
    deep = data[: frame + 4] + b"\x0c" + data[frame + 5 :]
    assert (decoded(deep).status, "12 bits" in decoded(deep).error) == ("unsupported_mode", True)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 16), st.binary(max_size=12), st.integers(0, 40), st.booleans())
def test_damaged_jpeg_headers_raise_no_other_errors(offset: int, new: bytes, removed: int, progressive: bool) -> None:
    data = encoded(Image.fromarray(COLOUR), "JPEG", progressive=progressive)
    offset %= len(data)
    data = data[: max(2, offset)] + new + data[offset + removed :]
    sample_bits(data)
    without_exif(data)
    try:
        decode_jpeg(data, (30, 20), "RGB")
    except (MemberError, UnsupportedByTurboError) as error:
        assert str(error)


def test_threads_get_only_the_warnings_of_their_own_image() -> None:
    good = encoded(NOISY, "JPEG", quality=95)
    bad = good[: len(good) // 2] + b"\xff\xd9"
    members = [Member(str(i), "", data=bad if i % 3 == 0 else good) for i in range(60)]
    with DecodePool(4) as pool:
        stream = decode_stream(members, RULES, Preprocess((20, 30)), pool)
        found = [item.status for item in stream if isinstance(item, Pixels)]
    assert found == ["corrupt" if i % 3 == 0 else OK for i in range(60)]


def tiff(bits: int, photometric: int, data: bytes, order: str = "<", sample_format: int = 1) -> bytes:
    """A grey TIFF of COLOUR's size in one strip, without compression."""
    tags = {256: 30, 257: 20, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 20, 279: len(data)}
    tags[339] = sample_format
    body = struct.pack(order + "H", len(tags))
    for tag, value in tags.items():
        body += struct.pack(order + "HHI", tag, 3, 1) + struct.pack(order + "HH", value, 0)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return head + data + body + bytes(4)


def packed_12_bits(values: np.ndarray) -> bytes:
    left, right = values[:, 0::2], values[:, 1::2]
    return np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], -1).astype(np.uint8).tobytes()


def png_16(values: np.ndarray, significant: int | None, late: bool = False) -> bytes:
    """A grey 16-bit PNG with an sBIT chunk."""
    data = encoded(Image.fromarray(values.astype(np.uint16)), "PNG")
    if significant is None:
        return data
    body = b"sBIT" + bytes([significant])
    chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
    position = data.index(b"IEND" if late else b"IDAT") - 4
    return data[:position] + chunk + data[position:]


def test_grey_is_independent_of_bit_depth_and_photometric_interpretation() -> None:
    wide = GREY.astype(int)
    twelve = wide * 4095 // 255
    files = [
        tiff(8, 1, GREY.tobytes()),
        tiff(8, 0, (255 - GREY).tobytes()),
        *(tiff(16, 1, (wide * 257).astype(order + "u2").tobytes(), order) for order in "<>"),
        *(tiff(16, 0, (65535 - wide * 257).astype(order + "u2").tobytes(), order) for order in "<>"),
        tiff(12, 1, packed_12_bits(twelve)),
        tiff(12, 0, packed_12_bits(4095 - twelve)),
        png_16(twelve, 12),
        png_16(wide * 257, 12),
        png_16(twelve << 4, 12),
        png_16(twelve << 4 | twelve >> 8, 12),
        png_16(wide, 8),
        png_16(wide * 257, 8),
        png_16(wide * 257, None),
    ]
    for data in files:
        assert (pixels(data) == GREY[..., None]).all()


def test_a_16_bit_pillow_image_has_the_pixels_of_its_file() -> None:
    wide = GREY.astype(int)
    for data in (
        tiff(16, 0, (65535 - wide * 257).astype("<u2").tobytes()),
        tiff(12, 1, packed_12_bits(wide * 4095 // 255)),
        encoded(Image.fromarray(GREY), "PNG", exif=b"Exif\0\0no TIFF header"),
    ):
        member = InputImage("k", Image.open(io.BytesIO(data))).member(Storage())
        assert (pixels(member.data) == GREY[..., None]).all()


def test_significant_bits_are_the_upper_ones_unless_the_values_contradict() -> None:
    dark = np.full((20, 30), 4080)  # 255 << 4: a dark picture written according to the standard
    assert pixels(png_16(dark, 12)).max() == 16
    assert pixels(png_16(np.full((20, 30), 4083), 12)).max() == 254
    assert pixels(png_16(np.full((20, 30), 0), 12)).max() == 0
    assert (
        pixels(png_16(np.full((20, 30), 4083), 12, late=True)).max() == 16
    )  # after the pixels, where the standard does not allow it
    for strange in (0, 16, 255):
        assert pixels(png_16(np.full((20, 30), 4083), strange)).max() == 16
    data = png_16(dark, 12)
    assert all(significant_bits(data[:stop]) in (None, 12) for stop in range(len(data)))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("inverted", [False, True])
def test_the_scale_of_grey_is_rounded_and_fixed(bits: int, inverted: bool) -> None:
    white = 2**bits - 1
    values = np.arange(white + 1)
    expected = np.floor((white - values if inverted else values) * 255 / white + 0.5)
    assert (scale_table(bits, inverted)[: white + 1] == expected).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_every_format_is_rotated_once_or_left_as_stored(kind: str, orientation: int, compression: str | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"compression": compression} if kind == "TIFF" else {}
    picture = NOISY.crop((0, 0, 96, 48))
    data = encoded(picture, kind, exif=exif, **options)
    stored = pixels(data, IGNORE)
    assert stored.shape == (48, 96, 3)
    if kind != "JPEG":
        assert (stored == np.asarray(picture)).all()
    turns = {2: (1, 0), 3: (1, 1), 4: (0, 1)}
    across, down = turns.get(orientation, (0, 0))
    expected = {
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }.get(orientation, stored[:: -1 if down else 1, :: -1 if across else 1])
    assert (pixels(data) == expected).all()
    found = decoded(data)
    assert (found.orientation, found.notes, found.stored_size) == (orientation, (), (96, 48))
    assert decoded(data, IGNORE).orientation == 1


def with_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk before its pixels."""
    position = data.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:position] + chunk + data[position:]


def test_damaged_exif_is_noted_and_makes_no_image_bad() -> None:
    whole = encoded(Image.fromarray(COLOUR), "PNG")
    bad = b"\0\x08\0\x02\x01\x12\0\x03"
    files = [
        with_chunk(whole, b"eXIf", bad),
        with_chunk(whole, b"tEXt", b"Raw profile type exif\0\nexif\n      20\nzz\n"),
        encoded(Image.fromarray(COLOUR), "WEBP", lossless=True, exif=b"Exif\0\0" + bad),
    ]
    for data in files:
        found = decoded(data)
        assert (found.status, found.notes, found.facts()["note"]) == (OK, ("exif_ignored",), "exif_ignored")
        assert (pixels(data) == COLOUR).all()
        assert decoded(data, IGNORE).notes == ()
    jpeg = encoded(NOISY, "JPEG", exif=b"Exif\0\0" + bad)
    assert (decoded(jpeg).status, decoded(jpeg).notes) == (OK, ("exif_ignored",))


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")
def test_avif_is_read_and_its_damaged_exif_is_noted() -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    data = encoded(NOISY, "AVIF", exif=exif, quality=95)
    assert np.abs(pixels(data).astype(int) - np.asarray(NOISY)).mean() < 4
    assert decoded(data).notes == ()
    start = max(data.find(b"II*\0"), data.find(b"MM\0*"))
    damaged = decoded(data[:start] + b"zzzz" + data[start + 4 :])
    assert (damaged.status, damaged.notes) == (OK, ("exif_ignored",))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 200), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_no_exif_makes_an_image_bad(noise: bytes, offset: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[282], exif[296] = 6, "maker", 72.0, 2
    exif.get_ifd(0x8769)[36867] = "2026:11:28"
    block = exif.tobytes()
    offset %= len(block)
    data = encoded(Image.fromarray(COLOUR), kind, exif=block[:offset] + noise + block[offset + len(noise) :])
    assert decoded(data).status == OK


def test_other_tags_of_exif_do_not_matter() -> None:
    tags = [(0x010F, 1, 9999, 1 << 20), (0x0112, 3, 1, 6), (0x02BC, 1, 5000, 1 << 30), (0xEA1C, 99, 7, 7)]
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    for end in (b"", bytes(4)):
        found = decoded(encoded(NOISY, "JPEG", exif=b"Exif\0\0" + block + end))
        assert (found.status, found.orientation, found.notes) == (OK, 6, ())
    assert decoded(encoded(NOISY, "JPEG", exif=b"Exif\0\0" + block[:-20])).notes == ("exif_ignored",)


def test_thumbnails_are_not_counted_as_pages() -> None:
    whole = tiff(8, 1, GREY.tobytes())
    copy = struct.pack("<H", 1) + struct.pack("<HHII", 254, 4, 1, 1) + bytes(4)
    assert tiff_pages(whole[:-4] + struct.pack("<I", len(whole)) + copy) == 1
    page = struct.pack("<H", 1) + struct.pack("<HHII", 254, 4, 1, 2) + bytes(4)
    assert tiff_pages(whole[:-4] + struct.pack("<I", len(whole)) + page) == 2


def test_pages_that_are_not_read_are_counted() -> None:
    frames = [Image.fromarray(np.roll(COLOUR, i, 0)) for i in range(4)]
    many = {"save_all": True, "append_images": frames[1:]}
    for kind in ("TIFF", "GIF", "WEBP", "PNG", *(("AVIF",) if "AVIF" in FORMATS else ())):
        found = decoded(encoded(frames[0], kind, **many))
        assert (found.status, found.notes, kind) == (OK, ("pages_not_read: 3",), kind)
        assert decoded(encoded(frames[0], kind)).notes == ()
    assert (pixels(encoded(frames[0], "TIFF", **many)) == COLOUR).all()
    assert decoded(encoded(frames[0], "MPO", **many)).notes == ("pages_not_read: 3",)


def test_counting_pages_is_bounded_and_stops_in_loops() -> None:
    loop = tiff(8, 1, GREY.tobytes())
    directory = struct.unpack_from("<I", loop, 4)[0]
    assert tiff_pages(loop[:-4] + struct.pack("<I", directory)) == 1
    chain = b"II*\0" + struct.pack("<I", 8) + b"".join(struct.pack("<HI", 0, 8 + 6 * (i + 1)) for i in range(50_000))
    started = time.monotonic()
    assert tiff_pages(chain) == 10_000 and time.monotonic() - started < 2
    assert gif_frames(b"GIF89a" + bytes(7) + (b"," + bytes(11)) * 50_000) == 10_000


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [
        (tiff(16, 1, bytes(1200), sample_format=3), "unsupported_mode", "TIFF with 16 bits per sample, floating point"),
        (tiff(64, 1, bytes(4800), sample_format=3), "unsupported_mode", "TIFF with 64 bits per sample, floating point"),
        (tiff(10, 1, bytes(750)), "unsupported_mode", "TIFF with 10 bits per sample, unsigned integers"),
        (tiff(12, 1, bytes(900), ">"), "unsupported_mode", "TIFF with 12 bits per sample, unsigned integers"),
        (tiff(8, 1, GREY.tobytes())[:-60], "corrupt", "truncated or damaged TIFF directory"),
        (encoded(NOISY, "TIFF", compression="tiff_lzw")[:-500], "corrupt", "truncated or damaged TIFF directory"),
        (b"II*\0\x08\0\0\0", "corrupt", "truncated or damaged TIFF directory"),
        (b"MM\0*", "corrupt", "truncated or damaged TIFF directory"),
        (b"II+\0\x08\0\0\0" + b"\xff" * 40, "corrupt", "truncated or damaged TIFF directory"),
        (b"II*\0\x08\0\0\0" + bytes(8), "corrupt", "has no image size"),
    ],
)
def test_an_unsupported_tiff_is_described(data: bytes, status: str, text: str) -> None:
    found = decoded(data)
    assert found.status == status and text in found.error


def test_the_first_picture_of_an_mpo_is_read() -> None:
    data = encoded(NOISY, "MPO", save_all=True, append_images=[SCENE], quality=95)
    assert (pixels(data) == pixels(encoded(NOISY, "JPEG", quality=95))).all()


@pytest.mark.parametrize("error", [struct.error("x"), RecursionError(), MemoryError(), OverflowError("y"), KeyError(1)])
@pytest.mark.parametrize(
    ("module", "name"),
    [(opening, "upright"), (decode, "brightness_and_sharpness"), (opening, "pages_of"), (opening, "orientation_of")],
)
def test_any_exception_is_the_status_of_one_image(
    monkeypatch: pytest.MonkeyPatch, error: Exception, module: ModuleType, name: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, name, fails)
    found = decoded(encoded(Image.fromarray(COLOUR), "PNG"))
    assert found.status == "corrupt" and found.error.startswith("k: ")


FILES = [
    *(encoded(NOISY.convert(mode), "JPEG", quality=50) for mode in ("RGB", "L", "CMYK")),
    encoded(NOISY, "JPEG", progressive=True, quality=50),
    *(encoded(Image.fromarray(COLOUR).convert(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "1")),
    *(encoded(Image.fromarray(COLOUR), "TIFF", compression=kind) for kind in (None, "tiff_lzw", "tiff_adobe_deflate")),
    tiff(16, 0, bytes(1200)),
    tiff(12, 1, bytes(900)),
    png_16(GREY.astype(int) * 16, 12),
    *(encoded(Image.fromarray(COLOUR), kind) for kind in ("GIF", "BMP", "WEBP", "PPM")),
    encoded(Image.fromarray(COLOUR), "GIF", save_all=True, append_images=[Image.fromarray(COLOUR[::-1])]),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=8), st.integers(0, 16)), max_size=6),
    st.none() | st.integers(0, 1 << 20),
)
def test_mutated_files_are_pixels_or_a_status(
    data: bytes, changes: list[tuple[int, bytes, int]], stop: int | None
) -> None:
    for offset, new, removed in changes:
        offset %= len(data) + 1
        data = data[:offset] + new + data[offset + removed :]
    found = decoded(data if stop is None else data[: stop % (len(data) + 1)])
    if found.status == OK:
        assert found.only_input is not None and found.only_input.shape == (20, 30, 3)
    else:
        assert found.status in BAD_STATUSES and found.only_input is None and found.error


@pytest.mark.parametrize(("bits", "form", "kind"), [(8, 2, "i1"), (16, 2, "<i2"), (32, 2, "<i4"), (32, 1, "<u4")])
def test_integers_without_a_scale_are_refused_by_their_type(bits: int, form: int, kind: str) -> None:
    """Independent of their values, so that images of small and large values are treated alike."""
    data = np.full((8, 8), 100, kind).tobytes()
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 8)]
    tags += [(279, 4, len(data)), (339, 3, form)]
    entries = b"".join(struct.pack("<HHII", tag, code, 1, value) for tag, code, value in tags)
    tiff = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    found = decode_member(Member("k", "u", data=tiff), RULES, Preprocess((8, 8)))
    assert found.status == "unsupported_mode" and f"{bits} bits per sample" in found.error
