"""How many pages or frames a file has; bounded, since a file may claim any number."""

from PIL import Image

from raydetect.images import tiff

MAX_FRAMES = 10_000


def pages_of(picture: Image.Image, data: bytes) -> int:
    """Pages of a TIFF, frames of an animation, pictures of an MPO; at least 1."""
    if picture.format == "TIFF":
        return max(1, tiff.pages(data))
    if picture.format == "GIF":
        return max(1, gif_frames(data))
    return max(1, int(getattr(picture, "n_frames", 1)))  # told by the header


def gif_frames(data: bytes) -> int:
    """Frames of a GIF, counted by its blocks without decoding them (Pillow would decode)."""
    frames, place = 0, 13 + _table(data, 10)
    while frames < MAX_FRAMES and place < len(data):
        kind = data[place]
        if kind == 0x2C:
            frames += 1
            place = _after_blocks(data, place + 11 + _table(data, place + 9))
        elif kind == 0x21:
            place = _after_blocks(data, place + 2)
        elif kind == 0x3B:
            break
        else:
            place += 1  # as Pillow does: anything else is passed over
    return frames


def _table(data: bytes, place: int) -> int:
    """Bytes of the colour table that a flags byte announces."""
    flags = data[place] if place < len(data) else 0
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, place: int) -> int:
    while place < len(data) and data[place]:
        place += data[place] + 1
    return place + 1
