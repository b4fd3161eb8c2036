"""`view.bands` and `view.range` for pictures that are decoded in memory: PNG, JPEG, BMP, WebP, AVIF, PPM.

Values are those that are stored: of 8 bits, or of 16 in PNG and in grey PPM. A range takes no notice of sBIT, gamma or
colour profiles, and px with a transparent colour (tRNS) are as others. Grey of fewer than 8 bits is widened to 0..255
first. AVIF of more bits is decoded to 8. Of PNGs with 16-bit colour, or 16-bit grey with alpha, Pillow keeps the upper
byte, so rasterio reads them. Palettes, CMYK and PPM that is rescaled have no values of bands: `unsupported_mode`.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

from raydetect.config import ViewSpec
from raydetect.images.bit_depth import SIXTEEN_BIT
from raydetect.images.opening import Loaded
from raydetect.images.png import has_deep_colour
from raydetect.images.rasters.kinds import Kind, bands_of, unsupported
from raydetect.images.rasters.library import is_installed, missing, opened_dataset, read_window

STRIP = 1 << 18  # px converted at a time
COLOUR = (False, False, False)  # which bands are alpha
BANDS = {"1": (False,), "L": (False,), "LA": (False, True), "RGB": COLOUR, "RGBX": COLOUR, "RGBA": (*COLOUR, True)}
GREY_AND_ALPHA = 2  # bands of a PNG
PALETTES = ("P", "PA")


def of_view(loaded: Loaded, data: bytes, spec: ViewSpec) -> Loaded:
    """Returns a picture with the levels of a view's bands and range; the same if the view states neither.

    Args:
        loaded: the decoded picture.
        data: its file.
        spec: the view.

    Raises:
        MemberError: unsupported_mode, corrupt.
    """
    if not spec.reads_bands:
        return loaded
    if has_deep_colour(data):
        return replace(loaded, picture=_read_again(data, loaded.picture.size, spec))
    picture = loaded.picture
    _refuse(picture, data, spec)
    bands = bands_of(spec, BANDS.get(picture.mode, (False,)))
    if set(bands) == {1} and len(picture.getbands()) == 1 and spec.range is None:
        return loaded  # grey, by its fixed scale
    return replace(loaded, picture=_chosen(picture, Kind(bands, range=spec.range)))


def _refuse(picture: Image.Image, data: bytes, spec: ViewSpec) -> None:
    """Refuses a picture whose values are not those of bands.

    Raises:
        MemberError: unsupported_mode.
    """
    if picture.mode in PALETTES:
        raise unsupported("its values are indices of a palette, which have no bands. Convert it to RGB.")
    if picture.mode not in (*BANDS, *SIXTEEN_BIT, "F"):
        raise unsupported(
            f"view.bands and view.range do not apply to pixels of mode {picture.mode}. Convert it to RGB."
        )
    highest = _highest(data)
    if spec.range is not None and highest not in (255, 65_535 if picture.mode == "I" else 255):
        raise unsupported(
            f"a PPM with values up to {highest} is rescaled when it is decoded. Convert it to PNG or TIFF."
        )


def _highest(data: bytes) -> int:
    """The highest value that the header of a PGM or PPM states; 255 for other formats."""
    if not re.match(rb"P[2356]\s", data):
        return 255
    words = re.sub(rb"#[^\r\n]*", b"", data[:4096]).split(maxsplit=4)
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else 255


def _chosen(picture: Image.Image, kind: Kind) -> Image.Image:
    """The levels of a picture in memory."""

    def read(top: int, bottom: int) -> np.ndarray:
        strip = picture.crop((0, top, picture.size[0], bottom))
        values_HWC = np.atleast_3d(np.asarray(strip.convert("L") if strip.mode == "1" else strip))
        return np.moveaxis(values_HWC[..., [band - 1 for band in kind.bands]], -1, 0)

    return _levels(read, picture.size, kind)


def _read_again(data: bytes, size: tuple[int, int], spec: ViewSpec) -> Image.Image:
    """The levels of a PNG by all bits of its colours.

    Raises:
        MemberError: unsupported_mode, corrupt.
    """
    if not is_installed():
        raise missing("16-bit colour of a PNG, for a view with bands or range,")
    with opened_dataset(data) as dataset:
        are_alpha = (False, True) if dataset.count == GREY_AND_ALPHA else (*COLOUR, True)[: dataset.count]
        kind = Kind(bands_of(spec, are_alpha), 16, upper_byte=True, range=spec.range)
        return _levels(lambda top, end: read_window(dataset, kind.bands, (0, top, size[0], end)), size, kind)


def _levels(read: Callable[[int, int], np.ndarray], size: tuple[int, int], kind: Kind) -> Image.Image:
    """The levels of values (C, H, W) that are read in strips, from a first row to one before a last."""
    levels, step = Image.new("L" if len(kind.bands) == 1 else "RGB", size), max(1, STRIP // size[0])
    for top in range(0, size[1], step):
        values_CHW = read(top, min(top + step, size[1]))
        levels.paste(Image.fromarray(kind.levels(values_CHW)[0]), (0, top))
    return levels
