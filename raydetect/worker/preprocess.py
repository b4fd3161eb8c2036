"""Encoded bytes to uint8 RGB pixels at the detector's input size, with a stated rule for every pixel format.

Rules: grey is repeated to RGB; palettes are looked up; alpha is dropped (colours as stored); 16-bit grey is
divided by 257, a fixed scale, so equal raw values stay equal in every image; CMYK is converted by Pillow's
formula without colour profiles; of several pages or frames the first is taken; EXIF orientation is applied
unless the source says `ignore`. Resizing is Pillow's antialiased bilinear, aspect ratio not kept.
"""

import io
import math
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from raydetect.errors import MemberError
from raydetect.records import OK, Member
from raydetect.spec import SourceSpec

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# What Pillow warns of becomes a status or is judged by source.max_pixels. Set once: the filters are not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class DecodeRules:
    """What of the source's words decoding needs."""

    max_pixels: int
    apply_exif: bool

    @classmethod
    def of(cls, source: SourceSpec) -> "DecodeRules":
        """The rules that a source states."""
        return cls(source.max_pixels, source.exif_orientation == "apply")


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded member, or the reason why there is none.

    Attributes:
        image_HWC: uint8 RGB at the detector's input size; None when not ok.
        width: stored width in px after orientation, None when the header could not be read.
        height: likewise.
        brightness: mean luminance in [0, 1] at the input size, None when not ok.
        sharpness: standard deviation of that luminance's Laplacian over its mean, None when not ok.
        status: "ok" or one of records.BAD_STATUSES.
        error: one sentence when not ok.
    """

    image_HWC: np.ndarray | None
    width: int | None = None
    height: int | None = None
    brightness: float | None = None
    sharpness: float | None = None
    status: str = OK
    error: str = ""

    def facts(self) -> dict[str, Any]:
        """What a row holds of the picture itself."""
        return {name: getattr(self, name) for name in ("width", "height", "brightness", "sharpness")}


def decode_image(data: bytes, rules: DecodeRules) -> Image.Image:
    """RGB picture of encoded bytes at its own size.

    Raises:
        MemberError: empty, too_many_pixels, not_an_image, unsupported_mode or corrupt.
    """
    if not data:
        raise MemberError("empty", "the file has zero bytes. Write it again at its source.")
    picture = _open(data, rules.max_pixels)
    try:
        picture.load()
        turned = ImageOps.exif_transpose(picture) if rules.apply_exif else picture
    except Exception as error:
        raise MemberError("corrupt", f"{picture.format} data cannot be decoded ({_short(error)}).") from None
    return to_rgb(turned)


def decode_member(member: Member, rules: DecodeRules, image_size: tuple[int, int]) -> Pixels:
    """Pixels of a member at (height, width) `image_size`; every failure becomes a status."""
    if member.status != OK:
        return Pixels(None, status=member.status, error=member.error)
    try:
        picture = decode_image(member.data, rules)
    except MemberError as error:
        return Pixels(None, status=error.status, error=f"{member.key}: {error}")
    width, height = picture.size
    if (height, width) != image_size:
        picture = picture.resize(image_size[::-1], Image.Resampling.BILINEAR)
    brightness, sharpness = light_and_edges(np.asarray(picture.convert("L")))
    return Pixels(np.asarray(picture, dtype=np.uint8), width, height, brightness, sharpness)


def light_and_edges(grey_HW: np.ndarray) -> tuple[float, float]:
    """(mean luminance in [0, 1], standard deviation of its four-neighbour Laplacian over that mean).

    Dividing by the mean makes sharpness tell of the lens and not of the light; of a black picture it is 0. Sums are
    integers, so the same picture gives the same bits everywhere. The outermost pixels have no Laplacian.

    Args:
        grey_HW: uint8.
    """
    brightness = int(grey_HW.sum(dtype=np.int64)) / (255.0 * grey_HW.size)
    wide_HW = grey_HW.astype(np.int32)
    across_HW = wide_HW[1:-1, :-2] + wide_HW[1:-1, 2:] + wide_HW[:-2, 1:-1] + wide_HW[2:, 1:-1]
    edges_HW = across_HW - 4 * wide_HW[1:-1, 1:-1]
    count = edges_HW.size
    if not count or not brightness:
        return brightness, 0.0
    total, squares = int(edges_HW.sum(dtype=np.int64)), int((edges_HW * edges_HW).sum(dtype=np.int64))
    return brightness, math.sqrt(max(0, count * squares - total * total)) / (255.0 * count * brightness)


def decode_all(
    members: Iterable[Member], rules: DecodeRules, image_size: tuple[int, int], threads: int
) -> Iterator[Pixels]:
    """Pixels of every member, in order, decoded on `threads` threads (Pillow frees the interpreter lock)."""

    def work(member: Member) -> Pixels:
        return decode_member(member, rules, image_size)

    if threads <= 1:
        yield from map(work, members)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, members)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        start = data[:8].hex(" ")
        raise MemberError("not_an_image", f"no image format begins with the bytes {start}.") from None
    except Image.DecompressionBombError as error:
        raise MemberError("too_many_pixels", f"{_short(error)}.") from None
    except Exception as error:
        raise MemberError("corrupt", f"the image header cannot be read ({_short(error)}).") from None
    width, height = picture.size
    if width * height > max_pixels:
        raise MemberError(
            "too_many_pixels",
            f"{width} x {height} px is more than source.max_pixels = {max_pixels:,}. Raise it if the image is genuine.",
        )
    return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, by the rule of its pixel format.

    Raises:
        MemberError: unsupported_mode.
    """
    mode = picture.mode
    if mode == "RGB":
        return picture
    if mode in SIXTEEN_BIT:
        return _sixteen_to_eight(picture).convert("RGB")
    if mode in ("1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        return picture.convert("RGBA").convert("RGB") if mode in ("PA", "La") else picture.convert("RGB")
    raise MemberError("unsupported_mode", f"pixels of mode {mode} have no fixed 8-bit scale. Convert them first.")


def _sixteen_to_eight(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise MemberError("unsupported_mode", "32-bit integer pixels have no fixed 8-bit scale. Convert them first.")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
