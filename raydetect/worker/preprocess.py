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
"""

import hashlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from raydetect.archives.base import begins_as_image
from raydetect.errors import MemberError
from raydetect.records import OK, Member
from raydetect.spec import SourceSpec
from raydetect.worker import tiff
from raydetect.worker.depth import GreyDepth, eight_bits, significant_bits
from raydetect.worker.exif import SIDEWAYS, orientation_of, turned
from raydetect.worker.jpeg import NotByTurboError, decode_jpeg, sample_bits, without_exif
from raydetect.worker.pages import pages_of

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF", *(("AVIF",) if features.check("avif") else ()))
JPEGS, JPEG_START = ("JPEG", "MPO"), b"\xff\xd8"
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
FULL_DEPTH = GreyDepth()
EXIF_IGNORED, PAGES_NOT_READ = "exif_ignored", "pages_not_read"
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """A decoded picture as its file stores it.

    Attributes:
        picture: in Pillow's mode of it, not turned.
        depth: how its values are meant when they are grey of 16 bits.
        orientation: how it is to be turned; 1 also where the source says `ignore`.
        notes: as `Pixels.notes`.
    """

    picture: Image.Image
    depth: GreyDepth
    orientation: int
    notes: tuple[str, ...]

    def rgb(self) -> Image.Image:
        """The picture as it is to be seen, in 8-bit RGB.

        Raises:
            MemberError: unsupported_mode.
        """
        return turned(to_rgb(self.picture, self.depth), self.orientation)


def decode_image(data: bytes, rules: DecodeRules) -> Image.Image:
    """RGB picture of encoded bytes at its own size.

    Raises:
        MemberError: empty, too_many_pixels, not_an_image, unsupported_mode or corrupt.
    """
    loaded = load_image(data, rules)
    try:
        return loaded.rgb()
    except MemberError:
        raise
    except Exception as error:
        raise MemberError("corrupt", f"its pixels cannot be converted ({_short(error)}).") from None


def load_image(data: bytes, rules: DecodeRules) -> Loaded:
    """The picture of encoded bytes as it is stored, and what is known of it.

    Raises:
        MemberError: as `decode_image`.
    """
    if not data:
        raise MemberError("empty", "the file has zero bytes. Write it again at its source.")
    opened = _open(data, rules.max_pixels)
    picture = opened.picture
    try:
        before = orientation_of(picture) if picture.format == "TIFF" else None  # load() forgets it
        picture = _with_pixels(opened)
        orientation, damaged = before or orientation_of(picture)
        if not rules.apply_exif:
            orientation, damaged = 1, False
        elif opened.exif_removed:
            damaged = True
        notes = [EXIF_IGNORED] if damaged else []
        unread = pages_of(opened.picture, opened.data) - 1
    except MemberError:
        raise
    except Exception as error:
        raise MemberError("corrupt", f"{picture.format} data cannot be decoded ({_short(error)}).") from None
    if unread:
        notes.append(f"{PAGES_NOT_READ}: {unread}")
    return Loaded(picture, opened.depth, orientation, tuple(notes))


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
        return Pixels(None, status="corrupt", error=f"{member.key}: its pixels cannot be converted ({_short(error)}).")


def _decoded(data: bytes, rules: DecodeRules, image_size: tuple[int, int]) -> Pixels:
    loaded = load_image(data, rules)
    picture = loaded.rgb()
    width, height = picture.size
    if (height, width) != image_size:
        picture = picture.resize(image_size[::-1], Image.Resampling.BILINEAR)
    brightness, sharpness = light_and_edges(np.asarray(picture.convert("L")))
    return Pixels(
        np.asarray(picture, dtype=np.uint8),
        width,
        height,
        brightness,
        sharpness,
        notes=loaded.notes,
        orientation=loaded.orientation,
    )


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


@dataclass(frozen=True, slots=True)
class _Opened:
    """A picture whose header is read and judged; `data` is what it was opened from."""

    picture: Image.Image
    data: bytes
    depth: GreyDepth = FULL_DEPTH
    exif_removed: bool = False


def _open(data: bytes, max_pixels: int) -> _Opened:
    try:
        opened = _opened_tiff(data) if tiff.is_tiff(data) else _opened(data)
    except MemberError:
        raise
    except Image.DecompressionBombError as error:
        raise MemberError("too_many_pixels", f"{_short(error)}.") from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:
        if tiff.is_tiff(data):
            raise tiff.refusal(data) from None
        raise MemberError("corrupt", f"the image header cannot be read ({_short(error)}).") from None
    width, height = opened.picture.size
    if width * height > max_pixels:
        raise MemberError(
            "too_many_pixels",
            f"{width} x {height} px is more than source.max_pixels = {max_pixels:,}. Raise it if the image is genuine.",
        )
    return opened


def _opened(data: bytes) -> _Opened:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise
    except Exception:
        bare = _without_exif(data)
        if bare == data:
            raise
        return _Opened(Image.open(io.BytesIO(bare), formats=FORMATS), bare, exif_removed=True)
    return _Opened(picture, data, GreyDepth(maybe_bits=significant_bits(data)))


def _without_exif(data: bytes) -> bytes:
    """The same image without the EXIF for which Pillow may not open it; formats that it opens anyway as they are."""
    if data.startswith(JPEG_START):
        return without_exif(data)
    if data[8:12] in (b"avif", b"avis"):
        return data.replace(b"Exif", b"none")  # the item under a name that nobody reads
    return data


def _opened_tiff(data: bytes) -> _Opened:
    page = tiff.first_page(data)
    bits = 8 if page is None else page.first(tiff.BITS, 1)
    inverted = page is not None and page.values.get(tiff.PHOTOMETRIC) == (0,)
    if page is not None and not tiff.has_scale(page):
        raise tiff.refusal(data)
    grey = bits in (12, 16) and page is not None and page.first(tiff.SAMPLES, 1) == 1
    if grey and inverted and page is not None:
        data = tiff.with_black_as_zero(data, page)
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    # load() would turn it, with the source's words or against them
    picture.__dict__["getexif"] = Image.Exif
    return _Opened(picture, data, GreyDepth(bits, inverted) if grey else FULL_DEPTH)


def _unidentified(data: bytes) -> MemberError:
    if tiff.is_tiff(data):
        return tiff.refusal(data)
    bits = sample_bits(data) if data.startswith(JPEG_START) else None
    if bits not in (None, 8):
        return MemberError("unsupported_mode", f"JPEG with {bits} bits per sample: is not read. Convert it to 8 bits.")
    if begins_as_image(data[:16]):
        said = "its first bytes are those of an image, and what follows is none of at least 1 x 1 px. Write it again."
        return MemberError("not_an_image", said)
    return MemberError("not_an_image", f"no image format begins with the bytes {data[:8].hex(' ')}.")


def _with_pixels(opened: _Opened) -> Image.Image:
    """The same picture, or a new one of the same header, with its pixels decoded and as stored."""
    picture = opened.picture
    if picture.format in JPEGS:
        try:
            pixels_HWC = decode_jpeg(opened.data, picture.size, picture.mode)
        except NotByTurboError:
            picture.load()
            return picture
        stored = pixels_HWC[..., 0] if picture.mode == "L" else pixels_HWC
        made = Image.fromarray(255 - stored if picture.mode == "CMYK" else stored, picture.mode)
        made.info, made.format = picture.info, picture.format
        return made
    picture.load()
    # a TIFF that is not turned still has the size of the turned one
    return picture if picture.im.size == picture.size else picture.copy()


def depth_of(picture: Image.Image) -> GreyDepth:
    """How grey of 16 bits is meant in a picture that Pillow opened; what it does not keep (sBIT) is not known."""
    tags: Any = getattr(picture, "tag_v2", None)
    bits = None if tags is None else tags.get(tiff.BITS)
    if bits not in ((12,), (16,)):
        return FULL_DEPTH
    return GreyDepth(bits[0], tags.get(tiff.PHOTOMETRIC) == 0)


def to_rgb(picture: Image.Image, depth: GreyDepth = FULL_DEPTH) -> Image.Image:
    """The picture in 8-bit RGB, by the rule of its pixel format.

    Args:
        picture: loaded.
        depth: how grey of 16 bits is meant.

    Raises:
        MemberError: unsupported_mode.
    """
    mode = picture.mode
    if mode == "RGB":
        return picture
    if mode in SIXTEEN_BIT:
        return eight_bits(picture, depth).convert("RGB")
    if mode in ("1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        return picture.convert("RGBA").convert("RGB") if mode in ("PA", "La") else picture.convert("RGB")
    raise MemberError("unsupported_mode", f"pixels of mode {mode} have no fixed 8-bit scale. Convert them first.")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
