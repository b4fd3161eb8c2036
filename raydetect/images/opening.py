"""Opens encoded images: checks the header, then decodes the pixels as stored within the memory budget."""

import io
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from raydetect.archives.base import begins_as_image
from raydetect.config import SourceSpec
from raydetect.errors import MemberError
from raydetect.images import tiff
from raydetect.images.bit_depth import FULL_DEPTH, GreyDepth
from raydetect.images.jpeg import UnsupportedByTurboError, decode_jpeg, has_dct, one_scan, sample_bits, without_exif
from raydetect.images.memory_budget import PIXEL_BUDGET
from raydetect.images.orientation import orientation_of
from raydetect.images.pages import pages_of
from raydetect.images.png import significant_bits, without_texts
from raydetect.images.preprocess import Preprocess, reduced
from raydetect.images.resize import to_rgb, upright, upright_size
from raydetect.views.windows import UprightPicture

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF", *(("AVIF",) if features.check("avif") else ()))
JPEGS, JPEG_START = ("JPEG", "MPO"), b"\xff\xd8"
STORED = {"RGB": "RGBX"}  # Pillow stores RGB with a fourth byte
ROWS_HELD = 32  # rows of a JPEG at its own width that its decoder holds at most, besides the picture
EXIF_IGNORED, PAGES_NOT_READ = "exif_ignored", "pages_not_read"
# Causes of Pillow's warnings become a status or are checked by source.max_pixels. Warning filters are not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
_limit_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class DecodeRules:
    """Settings of a source that affect decoding."""

    max_pixels: int
    apply_exif: bool

    @classmethod
    def of(cls, source: SourceSpec) -> "DecodeRules":
        """Creates the rules of a source."""
        return cls(source.max_pixels, source.exif_orientation == "apply")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A decoded picture as stored in its file.

    Attributes:
        picture: the picture in Pillow's mode, orientation not applied.
        depth: interpretation of 16-bit grey values.
        orientation: the orientation to apply; 1 if the source says `ignore`.
        notes: see `Pixels.notes`.
        stored_size: (width, height) in px of the file's image; the picture of a reduced JPEG is smaller.
        reduction: by how much its sides were divided.
    """

    picture: Image.Image
    depth: GreyDepth
    orientation: int
    notes: tuple[str, ...]
    stored_size: tuple[int, int]
    reduction: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in px of the file's image after orientation."""
        return upright_size(self.stored_size, self.orientation)

    def rgb(self) -> Image.Image:
        """Returns the upright picture in 8-bit RGB.

        Raises:
            MemberError: unsupported_mode.
        """
        return to_rgb(self.picture, self.depth, self.orientation)

    def upright(self) -> UprightPicture:
        """Returns the upright picture, from which windows are cut.

        Raises:
            MemberError: unsupported_mode.
        """
        covered = (self.stored_size[0] / self.reduction, self.stored_size[1] / self.reduction)
        return upright(self.picture, self.depth, self.orientation, self.size, covered)


@contextmanager
def loaded_image(data: bytes, rules: DecodeRules, preprocess: Preprocess | None = None) -> Iterator[Loaded]:
    """Decodes an image as stored; holds its reservation of the memory budget until the block ends.

    Args:
        data: the file.
        rules: decoding rules of its source.
        preprocess: rules of the detector that the image is for, which may reduce a JPEG; None = decode in full.

    Raises:
        MemberError: empty, too_many_pixels, not_an_image, unsupported_mode or corrupt.
    """
    if not data:
        raise MemberError("empty", "the file has zero bytes. Write it again at its source.")
    opened = _open(data, rules.max_pixels)
    if preprocess is not None and opened.picture.format in JPEGS:
        opened = _with_reduction(opened, rules, preprocess)
    with PIXEL_BUDGET.reserve(opened.pixels, rules.max_pixels):
        yield _loaded(opened, rules)


def header_size(data: bytes, rules: DecodeRules) -> tuple[int, int] | None:
    """Returns (width, height) in px of an upright image from its header alone; None if it cannot be read."""
    try:
        picture = _open(data, rules.max_pixels).picture
    except MemberError:
        return None
    return upright_size(picture.size, orientation_of(picture)[0] if rules.apply_exif else 1)


def _loaded(opened: "_Opened", rules: DecodeRules) -> Loaded:
    try:
        try:
            return _decoded(opened, rules)
        except ValueError as error:
            bare = _without_texts(opened.data, error)
            if bare is None:
                raise
            return _decoded(bare, rules)
    except MemberError:
        raise
    except Exception as error:
        raise MemberError("corrupt", f"{opened.picture.format} data cannot be decoded ({short(error)}).") from None


def _decoded(opened: "_Opened", rules: DecodeRules) -> Loaded:
    picture, stored_size = opened.picture, opened.picture.size
    tiff_orientation = orientation_of(picture) if picture.format == "TIFF" else None  # load() discards it
    picture = _with_pixels(opened)
    if opened.reduction == 1:
        stored_size = picture.size
    orientation, damaged = tiff_orientation or orientation_of(picture)
    if not rules.apply_exif:
        orientation, damaged = 1, False
    elif opened.exif_removed:
        damaged = True
    notes = [EXIF_IGNORED] if damaged else []
    unread = pages_of(opened.picture, opened.data) - 1
    if unread:
        notes.append(f"{PAGES_NOT_READ}: {unread}")
    return Loaded(picture, opened.depth, orientation, tuple(notes), stored_size, opened.reduction)


def _with_reduction(opened: "_Opened", rules: DecodeRules, preprocess: Preprocess) -> "_Opened":
    """Decides by how much a JPEG is reduced; all its metadata are read when it is opened."""
    orientation = orientation_of(opened.picture)[0] if rules.apply_exif else 1
    reduction = preprocess.reduction(opened.picture.size, orientation)
    return replace(opened, reduction=reduction) if reduction > 1 and has_dct(opened.data) else opened


@dataclass(frozen=True, slots=True)
class _Opened:
    """A picture whose header is read and checked.

    Attributes:
        picture: the picture without pixels.
        data: the bytes it was opened from.
        depth: see `Loaded.depth`.
        exif_removed: whether unreadable metadata that may contain the orientation were removed.
        tile: (width, height) in px of a TIFF's tiles.
        reduction: by how much the sides of a JPEG will be divided.
    """

    picture: Image.Image
    data: bytes
    depth: GreyDepth = FULL_DEPTH
    exif_removed: bool = False
    tile: tuple[int, int] = (0, 0)
    reduction: int = 1

    @property
    def pixels(self) -> int:
        """Number of pixels that its decoder holds at a time.

        A reduced JPEG in one scan holds its reduced pixels and a few rows; in several, the frequencies of all pixels.
        """
        if self.reduction > 1 and one_scan(self.data):
            size = self.picture.size
            return min(math.prod(size), math.prod(reduced(size, self.reduction)) + ROWS_HELD * size[0])
        return max(math.prod(self.picture.size), math.prod(self.tile))


def _open(data: bytes, max_pixels: int) -> _Opened:
    _let_pillow_open(max_pixels)
    try:
        opened = _opened_tiff(data) if tiff.is_tiff(data) else _opened(data)
    except MemberError:
        raise
    except Image.DecompressionBombError:
        raise too_many("its header says", max_pixels) from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:
        if tiff.is_tiff(data):
            raise tiff.refusal(data) from None
        raise MemberError("corrupt", f"the image header cannot be read ({short(error)}).") from None
    if math.prod(opened.picture.size) > max_pixels:
        raise too_many("{} x {} px is".format(*opened.picture.size), max_pixels)
    if math.prod(opened.tile) > max_pixels:
        raise too_many("a TIFF's tile of {} x {} px is".format(*opened.tile), max_pixels)
    return opened


def too_many(what: str, max_pixels: int) -> MemberError:
    """The status of an image or part of it that has more pixels than its source allows."""
    message = (
        f"{what} more than source.max_pixels = {max_pixels:,}. Raise it if the image is genuine, or store it as a "
        "tiled TIFF, which detectors with view.tile read in windows."
    )
    return MemberError("too_many_pixels", message)


def _let_pillow_open(max_pixels: int) -> None:
    """Raises Pillow's process-wide limit to that of a source; never lowers it."""
    with _limit_lock:
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels


def _opened(data: bytes) -> _Opened:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        found = _without_texts(data, error)
        if found is not None:
            return found
        bare = _without_exif(data)
        if bare == data:
            raise
        return _Opened(Image.open(io.BytesIO(bare), formats=FORMATS), bare, exif_removed=True)
    return _Opened(picture, data, GreyDepth(maybe_bits=significant_bits(data)))


def _without_exif(data: bytes) -> bytes:
    """Removes EXIF that can prevent Pillow from opening an image; other formats are unchanged."""
    if data.startswith(JPEG_START):
        return without_exif(data)
    if data[8:12] in (b"avif", b"avis"):
        return data.replace(b"Exif", b"none")  # rename the item, so that it is ignored
    return data


def _without_texts(data: bytes, error: Exception) -> _Opened | None:
    """Opens a PNG without texts that are too large for Pillow; None if the error has another cause."""
    if "MAX_TEXT" not in str(error):
        return None
    bare, may_turn = without_texts(data)
    picture = Image.open(io.BytesIO(bare), formats=FORMATS)
    return _Opened(picture, bare, GreyDepth(maybe_bits=significant_bits(bare)), may_turn)


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
    # prevents load() from applying the orientation
    picture.__dict__["getexif"] = Image.Exif
    tile = (0, 0) if page is None else tiff.tile_size(page)
    return _Opened(picture, data, GreyDepth(bits, inverted) if grey else FULL_DEPTH, tile=tile)


def _unidentified(data: bytes) -> MemberError:
    if tiff.is_tiff(data):
        return tiff.refusal(data)
    bits = sample_bits(data) if data.startswith(JPEG_START) else None
    if bits not in (None, 8):
        return MemberError(
            "unsupported_mode", f"JPEG with {bits} bits per sample: not supported. Convert it to 8 bits."
        )
    if begins_as_image(data[:16]):
        message = "it starts like an image file, but the rest is not an image of at least 1 x 1 px. Write it again."
        return MemberError("not_an_image", message)
    return MemberError("not_an_image", f"no supported image format starts with the bytes {data[:8].hex(' ')}.")


def _with_pixels(opened: _Opened) -> Image.Image:
    """Decodes the pixels as stored; returns the same picture or a new one with its metadata."""
    picture = opened.picture
    if picture.format in JPEGS:
        try:
            pixels_HWC = decode_jpeg(opened.data, picture.size, picture.mode, opened.reduction)
        except UnsupportedByTurboError:
            if opened.reduction > 1:
                picture.draft(None, tuple(side // opened.reduction for side in picture.size))  # type: ignore[arg-type]
            picture.load()
            return picture
        if picture.mode == "CMYK":
            np.subtract(255, pixels_HWC, out=pixels_HWC)
        mode = STORED.get(picture.mode, picture.mode)
        decoded = Image.frombuffer(mode, pixels_HWC.shape[1::-1], pixels_HWC, "raw", mode, 0, 1)  # no copy
        decoded.info, decoded.format = picture.info, picture.format
        return decoded
    picture.load()
    for name in ("_decoder", "fp"):  # WebP and AVIF keep up to twelve bytes per pixel there
        picture.__dict__.pop(name, None)
    # an unrotated TIFF still reports the size of the rotated one
    return picture if picture.im.size == picture.size else picture.copy()


def depth_of(picture: Image.Image) -> GreyDepth:
    """Returns the depth of 16-bit grey in a picture opened by Pillow, which does not keep sBIT."""
    tags: Any = getattr(picture, "tag_v2", None)
    bits = None if tags is None else tags.get(tiff.BITS)
    if bits not in ((12,), (16,)):
        return FULL_DEPTH
    return GreyDepth(bits[0], tags.get(tiff.PHOTOMETRIC) == 0)


def short(error: Exception) -> str:
    """Shortens the message of a library's error to one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__
