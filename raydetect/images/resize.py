"""Pictures to 8-bit RGB and to the detector's input size.

They are converted and turned a band of rows at a time, and grey ones are resized as grey, so that nothing as large as
the picture is wider than it must be. The pixels are those of the whole picture converted, turned and resized.
"""

from collections.abc import Iterator

from PIL import Image

from raydetect.errors import MemberError
from raydetect.images.bit_depth import SIXTEEN_BIT, GreyDepth, eight_bits, settled
from raydetect.images.orientation import SIDEWAYS, turned

BAND_PIXELS = 1 << 18
CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
GREY = ("1", "L", "LA", *SIXTEEN_BIT)
FROM_THE_END = frozenset({3, 4, 7, 8})  # orientations whose first rows are the last rows, or columns, that are stored


def whole(picture: Image.Image, depth: GreyDepth, orientation: int) -> Image.Image:
    """The picture as it is to be seen, in 8-bit RGB.

    Args:
        picture: loaded, as it is stored.
        depth: how grey of 16 bits is meant.
        orientation: how it is to be turned, as EXIF says it.

    Raises:
        MemberError: unsupported_mode.
    """
    return _upright(picture, depth, orientation, "RGB")


def resized(picture: Image.Image, depth: GreyDepth, orientation: int, size: tuple[int, int]) -> Image.Image:
    """As `whole`, at another (width, height): antialiased bilinear, aspect ratio not kept.

    Raises:
        MemberError: unsupported_mode.
    """
    mode = "L" if picture.mode in GREY else "RGBX" if picture.mode == "RGBX" else "RGB"
    upright = _upright(picture, depth, orientation, mode)
    if upright.size != size:
        upright = upright.resize(size, Image.Resampling.BILINEAR)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def upright_size(picture: Image.Image, orientation: int) -> tuple[int, int]:
    """(width, height) in px of the picture as it is to be seen."""
    width, height = picture.size
    return (height, width) if orientation in SIDEWAYS else (width, height)


def _upright(picture: Image.Image, depth: GreyDepth, orientation: int, mode: str) -> Image.Image:
    if picture.mode == mode and orientation == 1:
        return picture
    if picture.mode not in (*CONVERTED, *SIXTEEN_BIT):
        message = f"pixels of mode {picture.mode} have no fixed 8-bit scale. Convert them first."
        raise MemberError("unsupported_mode", message)
    depth = settled(picture, depth)
    found = Image.new(mode, upright_size(picture, orientation))
    for top, box in _bands(picture.size, orientation):
        found.paste(turned(_converted(picture.crop(box), depth, mode), orientation), (0, top))
    return found


def _bands(size: tuple[int, int], orientation: int) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """(first row of the upright picture, its box as stored: left, upper, right, lower) of every band, from the top."""
    width, height = size
    sideways = orientation in SIDEWAYS
    length, across = (width, height) if sideways else (height, width)
    step = max(1, BAND_PIXELS // across)
    for top in range(0, length, step):
        start, stop = top, min(top + step, length)
        if orientation in FROM_THE_END:
            start, stop = length - stop, length - start
        yield top, (start, 0, stop, height) if sideways else (0, start, width, stop)


def _converted(picture: Image.Image, depth: GreyDepth, mode: str) -> Image.Image:
    """A band in 8 bits, by the rule of its pixel format."""
    if picture.mode == mode:
        return picture
    if picture.mode in SIXTEEN_BIT:
        return eight_bits(picture, depth).convert(mode)
    return (picture.convert("RGBA") if picture.mode in ("PA", "La") else picture).convert(mode)
