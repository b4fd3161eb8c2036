"""Encoded bytes to uint8 RGB pixels at the detector's input size, with a stated rule for every pixel format.

Rules: grey is repeated to RGB; palettes are looked up; alpha is dropped (colours as stored); CMYK is converted by
Pillow's formula without colour profiles. Grey of 16 bits is divided by 65535 / 255, of 12 bits by 4095 / 255, and
rounded: fixed scales, so equal raw values stay equal in every image. White is 255, also where a TIFF says that white is
zero. A 16-bit grey PNG with an sBIT chunk follows the standard (significant bits are the upper ones) unless its values
show that they are the lower ones; then it is scaled by those. Of 16-bit colour Pillow keeps the upper byte. Floats, and
integers beyond 16 bits, have no fixed scale: `unsupported_mode`.

A JPEG is decoded with libjpeg's warnings heard (`jpeg.py` says what can be noticed and what not): a damaged scan is
`corrupt`; a whole one without its end marker is fine. EXIF orientation is applied, once and for every format alike,
unless the source says `ignore`: then pixels come as they are stored. Whatever a decoder raises is the status of that
image alone.

Two facts make no image bad and are noted: `exif_ignored` (the EXIF is damaged, so the image is not turned), and
`pages_not_read: N` (of several pages or frames the first is taken).

Resizing is Pillow's antialiased bilinear, aspect ratio not kept.

Memory: a process decodes at most as many pixels at a time as the larger of `source.max_pixels` and 2^26 (`space.py`),
and threads wait for each other above that. A decoded pixel takes at most, in bytes with what its decoder holds: bilevel
and grey 2, 16-bit grey 4 (of PPM 6), palettes, colour and LA 5, RGBA and CMYK 8, a TIFF in one strip 2 more, a turned
image 4 more, progressive JPEG 12, AVIF 12 (of more than 8 bits 16), WebP 16.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from raydetect.errors import MemberError
from raydetect.images.opening import DecodeRules, loaded_image, short
from raydetect.images.orientation import SIDEWAYS
from raydetect.records import OK, Member


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
        notes: what does not make the image bad and must be told: "exif_ignored", "pages_not_read: 3".
        orientation: the EXIF orientation that was applied; 1 = the image is as stored.
        sha256: of the encoded bytes, hex; "" when they could not be read.
    """

    image_HWC: np.ndarray | None
    width: int | None = None
    height: int | None = None
    brightness: float | None = None
    sharpness: float | None = None
    status: str = OK
    error: str = ""
    notes: tuple[str, ...] = ()
    orientation: int = 1
    sha256: str = ""

    def facts(self) -> dict[str, Any]:
        """What a row holds of the picture itself."""
        known = {name: getattr(self, name) for name in ("width", "height", "brightness", "sharpness", "sha256")}
        return {**known, "note": "; ".join(note.replace("; ", ", ") for note in self.notes)}

    @property
    def stored_size(self) -> tuple[int | None, int | None]:
        """(width, height) in px before it was turned."""
        return (self.height, self.width) if self.orientation in SIDEWAYS else (self.width, self.height)


def decode_image(data: bytes, rules: DecodeRules, longest_px: int | None = None) -> Image.Image:
    """RGB picture of encoded bytes at its own size, or not longer than `longest_px` on either side.

    Raises:
        MemberError: empty, too_many_pixels, not_an_image, unsupported_mode or corrupt.
    """
    try:
        with loaded_image(data, rules) as loaded:
            picture = loaded.rgb()
            if longest_px is not None:
                picture.thumbnail((longest_px, longest_px))
            return picture
    except MemberError:
        raise
    except Exception as error:
        raise MemberError("corrupt", f"its pixels cannot be converted ({short(error)}).") from None


def decode_member(member: Member, rules: DecodeRules, image_size: tuple[int, int]) -> Pixels:
    """Pixels of a member at (height, width) `image_size`; every failure becomes a status."""
    if member.status != OK:
        return Pixels(None, status=member.status, error=member.error, notes=member.notes)
    found = _pixels(member, rules, image_size)
    return replace(found, notes=(*member.notes, *found.notes), sha256=hashlib.sha256(member.data).hexdigest())


def _pixels(member: Member, rules: DecodeRules, image_size: tuple[int, int]) -> Pixels:
    try:
        return _decoded(member.data, rules, image_size)
    except MemberError as error:
        return Pixels(None, status=error.status, error=f"{member.key}: {error}")
    except Exception as error:  # one image never ends a job, whatever a library raises for it
        return Pixels(None, status="corrupt", error=f"{member.key}: its pixels cannot be converted ({short(error)}).")


def _decoded(data: bytes, rules: DecodeRules, image_size: tuple[int, int]) -> Pixels:
    with loaded_image(data, rules) as loaded:
        picture = loaded.resized(image_size)
        width, height = loaded.size
    brightness, sharpness = brightness_and_sharpness(np.asarray(picture.convert("L")))
    return Pixels(
        np.asarray(picture, dtype=np.uint8),
        width,
        height,
        brightness,
        sharpness,
        notes=loaded.notes,
        orientation=loaded.orientation,
    )


def brightness_and_sharpness(grey_HW: np.ndarray) -> tuple[float, float]:
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
