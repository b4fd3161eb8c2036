"""Counts the pages or frames of a file, up to a limit, since a file may claim any number."""

from PIL import Image

from raydetect.images import tiff

MAX_FRAMES = 10_000


def pages_of(picture: Image.Image, data: bytes) -> int:
    """Counts the pages of a TIFF, frames of an animation or pictures of an MPO; at least 1."""
    if picture.format == "TIFF":
        return max(1, tiff.pages(data))
    if picture.format == "GIF":
        return max(1, gif_frames(data))
    return max(1, int(getattr(picture, "n_frames", 1)))  # from the header


def gif_frames(data: bytes) -> int:
    """Counts the frames of a GIF by its blocks without decoding them, unlike Pillow."""
    frames, position = 0, 13 + _table(data, 10)
    while frames < MAX_FRAMES and position < len(data):
        kind = data[position]
        if kind == 0x2C:
            frames += 1
            position = _after_blocks(data, position + 11 + _table(data, position + 9))
        elif kind == 0x21:
            position = _after_blocks(data, position + 2)
        elif kind == 0x3B:
            break
        else:
            position += 1  # skip other bytes, as Pillow does
    return frames


def _table(data: bytes, position: int) -> int:
    """Returns the size in bytes of the colour table announced by a flags byte."""
    flags = data[position] if position < len(data) else 0
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, position: int) -> int:
    while position < len(data) and data[position]:
        position += data[position] + 1
    return position + 1
