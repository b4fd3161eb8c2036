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
from raydetect.images.opening import JPEGS, DecodeRules, Loaded, loaded_image
from raydetect.images.orientation import SIDEWAYS, apply_orientation

MAX_IDS = 16
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
    orientation, size = loaded.orientation, defects_HW.shape[::-1]
    if orientation == 1 and image.orientation in SIDEWAYS and size == image.stored_size != (image.width, image.height):
        orientation = image.orientation
    return np.asarray(apply_orientation(Image.fromarray(defects_HW), orientation))


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
