"""Decodes images to uint8 RGB pixels at the detector's input size, with a fixed rule for every pixel format.

Grey is repeated to RGB, palettes are looked up, alpha is dropped (colours as stored), and CMYK is converted with
Pillow's formula without colour profiles. Grey of 16 bits is divided by 65535 / 255, of 12 bits by 4095 / 255, and
rounded: fixed scales, so equal raw values stay equal in all images. White is 255, also in TIFFs where white is zero.
A 16-bit grey PNG with an sBIT chunk follows the standard (the upper bits are significant) unless its values show that
the lower bits are used; then it is scaled by those. Of 16-bit colour, Pillow keeps the upper byte. Floats and integers
of more than 16 bits have no fixed scale: `unsupported_mode`.

Warnings of libjpeg are errors (`jpeg.py` lists detectable damage): a JPEG with a damaged scan is `corrupt`; a complete
one without end marker is fine. EXIF orientation is applied exactly once for every format, unless the source says
`ignore`; then pixels are returned as stored. Any exception of a decoder becomes the status of that image only.

Two facts are noted without making an image bad: `exif_ignored` (damaged EXIF, so orientation is not applied) and
`pages_not_read: N` (only the first of several pages or frames is read).

Images are resized with Pillow's antialiased bilinear filter, without keeping the aspect ratio. Large JPEGs are decoded
at a reduced DCT scale first if the detector's artifact says so (`preprocess.py`).

Memory: a process decodes at most max(`source.max_pixels`, 2^26) pixels at a time (`memory_budget.py`); further threads
wait. Peak bytes per pixel including the decoder's memory: bilevel and grey 2, 16-bit grey 4 (PPM 6), palette, colour
and LA 5, RGBA and CMYK 8, a TIFF in one strip 2 more, a rotated image 4 more, progressive JPEG 12, AVIF 12 (more than
8 bits: 16), WebP 16. A reduced JPEG in one scan counts with its reduced pixels and 32 rows; a progressive one in full,
as its decoder holds all frequencies.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

from raydetect.errors import MemberError
from raydetect.images.opening import DecodeRules, loaded_image, short
from raydetect.images.orientation import SIDEWAYS
from raydetect.images.preprocess import Preprocess
from raydetect.records import OK, Member

GROUP = 4  # images in a task of a pool: small images are decoded faster than threads take turns


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded member, or the reason why it could not be decoded.

    Attributes:
        image_HWC: uint8 RGB at the detector's input size; None if not ok.
        width: width of the file's image in px after orientation; None if the header could not be read.
        height: likewise.
        brightness: mean luminance in [0, 1] at the input size; None if not ok.
        sharpness: standard deviation of that luminance's Laplacian divided by the mean luminance; None if not ok.
        status: "ok" or one of records.BAD_STATUSES.
        error: one sentence if not ok.
        notes: facts to report that do not make the image bad: "exif_ignored", "pages_not_read: 3".
        orientation: the EXIF orientation that was applied; 1 = as stored.
        sha256: sha256 of the encoded bytes in hex; "" if they could not be read.
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
        """Returns the columns of a row that describe the image itself."""
        fields = {name: getattr(self, name) for name in ("width", "height", "brightness", "sharpness", "sha256")}
        return {**fields, "note": "; ".join(note.replace("; ", ", ") for note in self.notes)}

    @property
    def stored_size(self) -> tuple[int | None, int | None]:
        """(width, height) in px as stored, before orientation."""
        return (self.height, self.width) if self.orientation in SIDEWAYS else (self.width, self.height)


def decode_image(data: bytes, rules: DecodeRules, longest_px: int | None = None) -> Image.Image:
    """Decodes an image to RGB at its own size, or shrunk to at most `longest_px` per side; JPEGs always in full.

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


def decode_member(member: Member, rules: DecodeRules, preprocess: Preprocess) -> Pixels:
    """Decodes a member to the input of a detector; every failure becomes a status."""
    if member.status != OK:
        return Pixels(None, status=member.status, error=member.error, notes=member.notes)
    pixels = _pixels(member, rules, preprocess)
    return replace(pixels, notes=(*member.notes, *pixels.notes), sha256=hashlib.sha256(member.data).hexdigest())


def _pixels(member: Member, rules: DecodeRules, preprocess: Preprocess) -> Pixels:
    try:
        return _decoded(member.data, rules, preprocess)
    except MemberError as error:
        return Pixels(None, status=error.status, error=f"{member.key}: {error}")
    except Exception as error:  # one image must never end a job, whatever a library raises
        return Pixels(None, status="corrupt", error=f"{member.key}: its pixels cannot be converted ({short(error)}).")


def _decoded(data: bytes, rules: DecodeRules, preprocess: Preprocess) -> Pixels:
    with loaded_image(data, rules, preprocess) as loaded:
        picture = loaded.resized(preprocess.image_size)
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
    """Returns (mean luminance in [0, 1], standard deviation of the four-neighbour Laplacian divided by that mean).

    The division makes sharpness depend on the lens and not on the light; it is 0 for a black image. Sums are integers,
    so results are identical to the bit on every machine. Border pixels have no Laplacian.

    Args:
        grey_HW: uint8 luminance.
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


def decode_all(members: Iterable[Member], rules: DecodeRules, preprocess: Preprocess, threads: int) -> Iterator[Pixels]:
    """Decodes members in order on `threads` threads (Pillow releases the GIL)."""
    if threads <= 1:
        yield from (decode_member(member, rules, preprocess) for member in members)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from decode_on(pool, list(members), rules, preprocess)


def decode_on(
    pool: Executor, members: Sequence[Member], rules: DecodeRules, preprocess: Preprocess
) -> Iterator[Pixels]:
    """Decodes members in order on a pool, all of them at once, a few per task."""

    def decode(group: Sequence[Member]) -> list[Pixels]:
        return [decode_member(member, rules, preprocess) for member in group]

    groups = [members[i : i + GROUP] for i in range(0, len(members), GROUP)]
    return chain.from_iterable(pool.map(decode, groups))
