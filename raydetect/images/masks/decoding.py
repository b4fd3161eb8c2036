"""Decodes mask files to defect pixels.

Masks follow the EXIF rule of the images. Levels are palette indices, or the largest colour channel; alpha is dropped.
If no level reaches half of full scale (128, or 32768 for 16 bits), or a lossless file has at most 16 different levels,
the levels are class ids and everything except 0 is a defect. Otherwise pixels of at least half of full scale are
defects, so that JPEG artefacts around edges and soft borders below it are not.
"""

import numpy as np
from PIL import Image

from raydetect.errors import MemberError
from raydetect.images.bit_depth import LEVELS, SIXTEEN_BIT
from raydetect.images.decode import Pixels
from raydetect.images.memory_budget import PIXEL_BUDGET
from raydetect.images.opening import JPEGS, DecodeRules, Loaded, loaded_image
from raydetect.images.orientation import SIDEWAYS, apply_orientation
from raydetect.images.rasters.opening import raster_for_showing
from raydetect.images.rasters.picture import BAND_PIXELS, RasterPicture
from raydetect.images.resize import upright_size
from raydetect.images.tiff import COMPRESSION
from raydetect.views.view import Box

MAX_IDS = 16
LOSSY = (6, 7, 50001)  # compressions of TIFF: old JPEG, JPEG, WebP
COLOURS = {"RGB": 3, "RGBA": 3, "RGBX": 3, "L": 1, "LA": 1, "P": 1, "PA": 1, "1": 1}  # number of channels without alpha


def decode_mask(data: bytes, image: Pixels, rules: DecodeRules) -> np.ndarray:
    """Decodes a mask to defect pixels, bool (H, W), in the orientation of its image.

    A mask without its own orientation gets that of the image if it has the size of the stored, unrotated image.

    Args:
        data: the mask file.
        image: its decoded image.
        rules: decoding rules of the image's source.

    Raises:
        MemberError: the mask cannot be decoded.
    """
    with loaded_image(data, rules) as loaded:
        defects_HW = _defects(loaded, data)
    orientation = _turned_with(image, loaded.orientation, defects_HW.shape[::-1])
    return np.asarray(apply_orientation(Image.fromarray(defects_HW), orientation))


def sampled_mask(
    data: bytes, image: Pixels, rules: DecodeRules, canvas: tuple[int, int], box: Box
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decodes a mask to the pixels of a map by nearest neighbour; large TIFFs are read in bands of rows.

    Args:
        data: the mask file.
        image: its decoded image.
        rules: decoding rules of the image's source.
        canvas: (height, width) in px of the map.
        box: (left, upper, right, lower) of the map in px of the upright image.

    Returns:
        Defect pixels, bool of the shape `canvas`, and (width, height) of the mask in the orientation of its image; no
        defect if that is not the size of the image.

    Raises:
        MemberError: the mask cannot be decoded.
    """
    raster = raster_for_showing(data, rules, None)
    if raster is None:
        defects_HW = decode_mask(data, image, rules)
        size: tuple[int, int] = (defects_HW.shape[1], defects_HW.shape[0])
        if defects_HW.shape != (image.height, image.width):
            return np.zeros(canvas, bool), size
        return np.asarray(Image.fromarray(defects_HW).resize(canvas[::-1], Image.Resampling.NEAREST, box)), size
    with raster.opened() as picture:
        stored = upright_size(picture.size, picture.orientation)
        picture.turn(_turned_with(image, picture.orientation, stored))
        if picture.size != (image.width, image.height):
            return np.zeros(canvas, bool), picture.size
        with PIXEL_BUDGET.reserve(BAND_PIXELS + picture.block_pixels, rules.max_pixels):
            levels_HW, seen = _sampled(picture, canvas, box)
    exact = raster.page is not None and raster.page.first(COMPRESSION, 1) not in LOSSY
    return _is_defect(levels_HW, seen, picture.kind.full_scale, exact), picture.size


def _turned_with(image: Pixels, orientation: int, size: tuple[int, ...]) -> int:
    """The orientation of a mask of `size` as stored: its own, or that of its image if it was not turned like it."""
    alone = orientation == 1 and image.orientation in SIDEWAYS
    return image.orientation if alone and size == image.stored_size != (image.width, image.height) else orientation


def _sampled(picture: RasterPicture, canvas: tuple[int, int], box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Returns the levels at the pixels of a map, (H, W), and which levels the whole mask has, bool by level."""
    width, height = picture.size
    columns, rows = _nearest(box[0], box[2], canvas[1], width), _nearest(box[1], box[3], canvas[0], height)
    levels_HW = np.zeros(canvas, np.uint16)
    seen = np.zeros(LEVELS, bool)
    step = max(1, BAND_PIXELS // width)
    for top in range(0, height, step):
        band_HW = picture.mask_levels((0, top, width, min(top + step, height)))
        seen |= np.bincount(band_HW.reshape(-1), minlength=LEVELS).astype(bool)
        first, last = np.searchsorted(rows, (top, top + step))
        levels_HW[first:last] = band_HW[rows[first:last] - top][:, columns]
    return levels_HW, seen


def _nearest(start: float, stop: float, count: int, length: int) -> np.ndarray:
    """The pixels that Pillow takes by nearest neighbour along one side; it adds up 64-bit steps from a 32-bit box."""
    start, stop = float(np.float32(start)), float(np.float32(stop))
    step = (stop - start) / count
    return np.clip(np.cumsum(np.r_[start + step * 0.5, np.full(count - 1, step)]).astype(np.int64), 0, length - 1)


def _is_defect(levels_HW: np.ndarray, seen: np.ndarray, full_scale: int, exact: bool) -> np.ndarray:
    """Which levels are a defect, given those of the whole mask."""
    half = (full_scale + 1) // 2
    are_ids = not seen[half:].any() or (exact and int(seen.sum()) <= MAX_IDS)
    defects_HW: np.ndarray = levels_HW != 0 if are_ids else levels_HW >= half
    return defects_HW


def mask_pixels(data: bytes, rules: DecodeRules) -> np.ndarray:
    """Decodes a mask without an image to its pixels, bool (H, W), in its own orientation.

    Raises:
        MemberError: the mask cannot be decoded.
    """
    with loaded_image(data, rules) as loaded:
        return np.asarray(apply_orientation(Image.fromarray(_defects(loaded, data)), loaded.orientation))


def _defects(loaded: Loaded, data: bytes) -> np.ndarray:
    levels_HW, full_scale = _levels(loaded)
    half = (full_scale + 1) // 2
    if levels_HW.max() < half or (_lossless(loaded.picture, data) and _few(levels_HW)):
        return levels_HW != 0
    return levels_HW >= half


def _levels(loaded: Loaded) -> tuple[np.ndarray, int]:
    """Returns (levels (H, W), full scale)."""
    picture = loaded.picture
    if picture.mode in SIXTEEN_BIT:
        levels_HW = np.asarray(picture)
        white = (1 << loaded.depth.bits) - 1
        return (white - levels_HW if loaded.depth.inverted else levels_HW), white
    if picture.mode == "F":
        raise MemberError("unsupported_mode", "pixels of mode F have no fixed scale. Write the mask as 8-bit PNG.")
    if picture.mode not in COLOURS:
        picture = picture.convert("RGB")
    values = np.asarray(picture, np.uint8)
    if picture.mode == "1":
        values = values * np.uint8(255)
    return (values if values.ndim == 2 else values[..., : COLOURS[picture.mode]].max(-1)), 255


def _few(levels_HW: np.ndarray) -> bool:
    """Whether there are at most `MAX_IDS` levels; levels of more than 16 bits count as one."""
    seen = np.zeros(LEVELS, bool)
    for row in levels_HW:
        seen[np.clip(row, 0, LEVELS - 1)] = True
    return int(seen.sum()) <= MAX_IDS


def _lossless(picture: Image.Image, data: bytes) -> bool:
    if picture.format == "WEBP":
        return b"VP8L" in data[:64]
    if picture.format == "TIFF":
        return picture.info.get("compression") not in ("jpeg", "tiff_jpeg", "webp")
    return picture.format not in (*JPEGS, "AVIF")
