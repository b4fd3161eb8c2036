"""Decoding: every pixel format by its stated rule, and every kind of bad image."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import signal

from raydetect.errors import MemberError
from raydetect.records import BAD_STATUSES, OK, Member
from raydetect.spec import SourceSpec
from raydetect.worker.preprocess import DecodeRules, decode_all, decode_image, decode_member, light_and_edges

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
def test_lossless_colour_comes_out_as_it_was(kind: str, options: dict[str, object]) -> None:
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
    """A PNG whose header promises more than its few bytes of data hold."""

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
    begun = time.monotonic()
    found = decode_member(Member("k#x.jpg", "", data=data), RULES, (8, 8))
    assert found.status == status in BAD_STATUSES and found.image_HWC is None
    assert found.error.startswith("k#x.jpg: ") and "\n" not in found.error
    assert time.monotonic() - begun < 2


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2000), st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]))
def test_no_bytes_break_the_decoder(noise: bytes, place: int, kind: str) -> None:
    data = encoded(Image.fromarray(COLOUR), kind)
    place %= len(data)
    found = decode_member(Member("k", "", data=data[:place] + noise + data[place + len(noise) :]), RULES, (8, 8))
    assert found.status == OK or found.status in BAD_STATUSES


def test_resizing_and_order_and_stored_size() -> None:
    files = [encoded(Image.fromarray(np.full((40 + i, 60, 3), i * 9, np.uint8)), "PNG") for i in range(12)]
    members = [Member(str(i), "", data=data) for i, data in enumerate(files)]
    for threads in (1, 3):
        found = list(decode_all(members, RULES, (24, 32), threads))
        assert [p.image_HWC.shape for p in found if p.image_HWC is not None] == [(24, 32, 3)] * 12
        assert [(p.width, p.height) for p in found] == [(60, 40 + i) for i in range(12)]
        assert [int(p.image_HWC.mean()) for p in found if p.image_HWC is not None] == [i * 9 for i in range(12)]


def test_a_bad_member_passes_through_and_a_pixel_limit_is_kept() -> None:
    bad = Member("k", "", status="unsafe_name", error="why")
    assert decode_member(bad, RULES, (8, 8)).status == "unsafe_name"
    small = DecodeRules.of(SourceSpec(uri="memory://x", max_pixels=599))
    with pytest.raises(MemberError, match=r"30 x 20 px is more than source\.max_pixels = 599"):
        decode_image(encoded(Image.fromarray(COLOUR), "PNG"), small)


@pytest.mark.parametrize("shape", [(20, 30), (3, 3), (2, 5), (1, 1), (64, 48)])
def test_light_and_edges_are_those_of_scipy(shape: tuple[int, int]) -> None:
    grey = np.random.default_rng(5).integers(0, 256, shape).astype(np.uint8)
    brightness, sharpness = light_and_edges(grey)
    assert brightness == pytest.approx(float(grey.mean()) / 255, abs=1e-12)
    kernel = np.asarray([[0, 1, 0], [1, -4, 1], [0, 1, 0]]) / 255
    inner = signal.convolve2d(grey.astype(np.float64), kernel, mode="valid") if min(shape) > 2 else np.zeros(1)
    assert sharpness == pytest.approx(float(inner.std()) / brightness, abs=1e-9)
    assert light_and_edges(np.zeros((9, 9), np.uint8)) == (0.0, 0.0)


def test_a_dim_picture_is_less_bright_and_a_blurred_one_less_sharp() -> None:
    plain = Image.fromarray(COLOUR)
    blurred = plain.filter(ImageFilter.GaussianBlur(2))
    made = [decode_member(Member("k", "k", data=encoded(p, "PNG")), RULES, (20, 30)) for p in (plain, blurred)]
    assert made[1].sharpness < 0.3 * made[0].sharpness  # type: ignore[operator]
    assert made[1].brightness == pytest.approx(made[0].brightness, abs=0.02)
    dim = decode_member(Member("k", "k", data=encoded(Image.fromarray(COLOUR // 2), "PNG")), RULES, (20, 30))
    assert dim.brightness == pytest.approx(made[0].brightness / 2, abs=0.01)  # type: ignore[operator]
    assert dim.sharpness == pytest.approx(made[0].sharpness, rel=0.02)
    assert decode_member(Member("k", "k", data=b"x"), RULES, (20, 30)).brightness is None
