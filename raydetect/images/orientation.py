"""Reads and applies image orientation, from EXIF or, if that has none, from XMP.

Implemented for all formats here, because Pillow's readers raise for damaged metadata and rotate TIFFs on their own.
"""

import re
from typing import Any

from PIL import Image

from raydetect.images.tiff import ORIENTATION, Reader

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = frozenset({5, 6, 7, 8})
PREFIX = b"Exif\0\0"
XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def orientation_of(picture: Image.Image) -> tuple[int, bool]:
    """Returns (orientation 1 to 8, whether the EXIF is damaged); 1 if it is missing or invalid.

    Args:
        picture: a loaded picture, so that all metadata are read; a TIFF need not be loaded.
    """
    try:
        value = _stored(picture)
    except Exception:  # the block may contain anything; reported as a note
        return 1, True
    if value is None:
        value = _of_xmp(picture)
    return (value if value in TURNS else 1), False


def apply_orientation(picture: Image.Image, orientation: int) -> Image.Image:
    """Applies an orientation to a picture."""
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def upright(picture: Image.Image) -> Image.Image:
    """Applies the orientation of a picture from the Python API; Pillow already rotates TIFFs on loading."""
    picture.load()
    return apply_orientation(picture, orientation_of(picture)[0])


def _stored(picture: Image.Image) -> int | None:
    tags: Any = getattr(picture, "tag_v2", None)
    if tags is not None:
        value = tags.get(ORIENTATION)
        return None if value is None else int(value)
    block = picture.info.get("exif")
    if block is None and "Raw profile type exif" in picture.info:
        block = bytes.fromhex("".join(picture.info["Raw profile type exif"].split("\n")[3:]))
    while block and block.startswith(PREFIX):
        block = block[len(PREFIX) :]
    if not block:
        return None
    reader = Reader(block)
    page = reader.directory(reader.start)
    return page.values[ORIENTATION][0] if ORIENTATION in page.values else None


def _of_xmp(picture: Image.Image) -> int:
    text = picture.info.get("XML:com.adobe.xmp") or picture.info.get("xmp") or b""
    return orientation_in_xmp(text)


def orientation_in_xmp(text: str | bytes) -> int:
    """Returns the digit of the orientation in an XMP packet, which may be invalid; 1 if it has none."""
    match = XMP.search(text.encode() if isinstance(text, str) else bytes(text))
    return int(match.group(1)) if match else 1
