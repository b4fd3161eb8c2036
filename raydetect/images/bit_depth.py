"""Grey of more than eight bits to eight, by one fixed scale for all images: a table, applied strip by strip."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from raydetect.errors import MemberError

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
LEVELS = 65536
STRIP = 1 << 18  # values that are looked at at once


@dataclass(frozen=True, slots=True)
class GreyDepth:
    """How the values of a grey image are meant.

    Attributes:
        bits: significant ones; white is 2^bits - 1.
        inverted: white is zero.
        maybe_bits: of a PNG's sBIT chunk, None = all. They lie in the upper bits by the standard, and by many cameras
            in the lower ones; the values tell.
    """

    bits: int = 16
    inverted: bool = False
    maybe_bits: int | None = None


FULL_DEPTH = GreyDepth()


def settled(picture: Image.Image, depth: GreyDepth) -> GreyDepth:
    """What all values of a grey picture say of its depth; of other pictures as it is.

    Raises:
        MemberError: unsupported_mode: values of more than 16 bits.
    """
    if picture.mode not in SIXTEEN_BIT:
        return depth
    if picture.mode == "I" and not all(_fits(values) for values in _strips(picture)):
        raise MemberError("unsupported_mode", "32-bit integer pixels have no fixed 8-bit scale. Convert them first.")
    if depth.maybe_bits is None:
        return depth
    in_lower = _in_lower_bits(picture, depth.maybe_bits)
    return GreyDepth(depth.maybe_bits if in_lower else depth.bits, depth.inverted)


def eight_bits(picture: Image.Image, depth: GreyDepth) -> Image.Image:
    """Mode L of a picture in one of Pillow's 16-bit modes, or in mode I with values of 16 bits.

    Args:
        picture: small, since it is copied: a band of a large one.
        depth: settled.
    """
    values_HW = np.asarray(picture)
    return Image.fromarray(np.take(scale_table(depth.bits, depth.inverted), values_HW))


@functools.cache
def scale_table(bits: int, inverted: bool) -> np.ndarray:
    """uint8 by value: round(255 * value / (2^bits - 1)), more than white is white."""
    white = (1 << bits) - 1
    values = np.minimum(np.arange(LEVELS), white)
    values = white - values if inverted else values
    table = ((2 * 255 * values + white) // (2 * white)).astype(np.uint8)
    table.flags.writeable = False  # it is shared
    return table


def _in_lower_bits(picture: Image.Image, bits: int) -> bool:
    """Whether no value needs more bits, and one at least is none that a writer of upper bits makes."""
    upper, all_upper = _upper_values(bits), True
    for values_HW in _strips(picture):
        if values_HW.max() >= 1 << bits:
            return False
        all_upper = all_upper and bool(upper[values_HW].all())
    return not all_upper


def _upper_values(bits: int) -> np.ndarray:
    """bool by 16-bit value: what an encoder that follows the standard can have written."""
    samples = np.arange(1 << bits)
    shifted = samples << (16 - bits)
    repeated, filled = shifted.copy(), bits
    while filled < 16:  # the upper bits again and again, below
        repeated |= shifted >> filled
        filled += bits
    scaled = (samples * 65535 * 2 + (1 << bits) - 1) // (2 * ((1 << bits) - 1))
    found = np.zeros(LEVELS, bool)
    for values in (shifted, repeated, scaled):
        found[values] = True
    return found


def _strips(picture: Image.Image) -> Iterator[np.ndarray]:
    width, height = picture.size
    step = max(1, STRIP // width)
    return (np.asarray(picture.crop((0, top, width, min(top + step, height)))) for top in range(0, height, step))


def _fits(values_HW: np.ndarray) -> bool:
    return bool(values_HW.min() >= 0 and values_HW.max() < LEVELS)
