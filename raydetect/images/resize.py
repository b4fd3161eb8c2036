"""Converts pictures to upright 8-bit RGB or grey.

To save memory, pictures are converted and rotated in bands of rows, and grey ones stay grey. The pixels are the same as
without bands.
"""

from collections.abc import Iterator

from PIL import Image

from raydetect.errors import MemberError
from raydetect.images.bit_depth import SIXTEEN_BIT, GreyDepth, eight_bits, resolved_depth
from raydetect.images.orientation import SIDEWAYS, apply_orientation
from raydetect.views.windows import UprightPicture

BAND_PIXELS = 1 << 18
CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
GREY = ("1", "L", "LA", *SIXTEEN_BIT)
FROM_THE_END = frozenset({3, 4, 7, 8})  # orientations whose first rows are the last rows or columns stored
FROM_THE_RIGHT = frozenset({2, 3, 6, 7})  # orientations whose first columns are the last columns or rows stored


def to_rgb(picture: Image.Image, depth: GreyDepth, orientation: int) -> Image.Image:
    """Converts a picture to upright 8-bit RGB.

    Args:
        picture: a loaded picture, as stored.
        depth: interpretation of 16-bit grey values.
        orientation: the EXIF orientation to apply.

    Raises:
        MemberError: unsupported_mode.
    """
    return _upright(picture, depth, orientation, "RGB")


def upright(
    picture: Image.Image, depth: GreyDepth, orientation: int, size: tuple[int, int], covered: tuple[float, float]
) -> UprightPicture:
    """Converts a picture to an upright one that windows are cut from; grey stays grey.

    Args:
        picture: a loaded picture, as stored.
        depth: interpretation of 16-bit grey values.
        orientation: the EXIF orientation to apply.
        size: (width, height) in px of the file's image after orientation.
        covered: (width, height) in px of the part of the stored picture that the image covers, from its upper left
            corner. In a reduced JPEG the last column and row may lie partly outside of the image.

    Raises:
        MemberError: unsupported_mode.
    """
    mode = "L" if picture.mode in GREY else "RGBX" if picture.mode == "RGBX" else "RGB"
    turned = _upright(picture, depth, orientation, mode)
    return UprightPicture(turned, size, _covered_box(turned.size, covered, orientation))


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Returns the (width, height) of the upright picture, given those as stored."""
    return size[::-1] if orientation in SIDEWAYS else size


def _covered_box(
    size: tuple[int, int], covered: tuple[float, float], orientation: int
) -> tuple[float, float, float, float]:
    """Returns (left, upper, right, lower) of the covered part in the upright picture of (width, height) `size`."""
    width, height = covered[::-1] if orientation in SIDEWAYS else covered
    left = size[0] - width if orientation in FROM_THE_RIGHT else 0.0
    upper = size[1] - height if orientation in FROM_THE_END else 0.0
    return left, upper, left + width, upper + height


def _upright(picture: Image.Image, depth: GreyDepth, orientation: int, mode: str) -> Image.Image:
    if picture.mode == mode and orientation == 1:
        return picture
    if picture.mode not in (*CONVERTED, *SIXTEEN_BIT):
        message = f"pixels of mode {picture.mode} have no fixed 8-bit scale. Convert them first, or state view.range."
        raise MemberError("unsupported_mode", message)
    depth = resolved_depth(picture, depth)
    upright = Image.new(mode, upright_size(picture.size, orientation))
    for top, box in _bands(picture.size, orientation):
        upright.paste(apply_orientation(_converted(picture.crop(box), depth, mode), orientation), (0, top))
    return upright


def _bands(size: tuple[int, int], orientation: int) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """Yields (first row in the upright picture, (left, upper, right, lower) as stored) of every band, from the top."""
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
    """Converts a band to 8 bits by the rule of its pixel format."""
    if picture.mode == mode:
        return picture
    if picture.mode in SIXTEEN_BIT:
        return eight_bits(picture, depth).convert(mode)
    return (picture.convert("RGBA") if picture.mode in ("PA", "La") else picture).convert(mode)
