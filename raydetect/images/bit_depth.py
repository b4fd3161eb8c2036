"""Converts grey of more than 8 bits to 8 bits with one fixed scale, by a lookup table applied in strips."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from raydetect.errors import MemberError

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
LEVELS = 65536
STRIP = 1 << 18  # values processed at a time


@dataclass(frozen=True, slots=True)
class GreyDepth:
    """Interpretation of the values of a grey image.

    Attributes:
        bits: number of significant bits; white is 2^bits - 1.
        inverted: whether white is zero.
        maybe_bits: significant bits of a PNG's sBIT chunk, None = all. The standard has them in the upper bits, many
            cameras use the lower bits; the values decide.
    """

    bits: int = 16
    inverted: bool = False
    maybe_bits: int | None = None


FULL_DEPTH = GreyDepth()


def resolved_depth(picture: Image.Image, depth: GreyDepth) -> GreyDepth:
    """Resolves the depth of a grey picture from its values; returns that of other pictures unchanged.

    Raises:
        MemberError: unsupported_mode: there are values of more than 16 bits.
    """
    if picture.mode not in SIXTEEN_BIT:
        return depth
    if picture.mode == "I" and not all(_fits(values) for values in _strips(picture)):
        raise MemberError("unsupported_mode", "32-bit integer pixels have no fixed 8-bit scale. State view.range.")
    if depth.maybe_bits is None:
        return depth
    in_lower = _in_lower_bits(picture, depth.maybe_bits)
    return GreyDepth(depth.maybe_bits if in_lower else depth.bits, depth.inverted)


def eight_bits(picture: Image.Image, depth: GreyDepth) -> Image.Image:
    """Converts a picture in a 16-bit mode of Pillow, or in mode I with 16-bit values, to mode L.

    Args:
        picture: a small picture, such as a band of a large one, since it is copied.
        depth: the resolved depth.
    """
    values_HW = np.asarray(picture)
    return Image.fromarray(np.take(scale_table(depth.bits, depth.inverted), values_HW))


@functools.cache
def scale_table(bits: int, inverted: bool) -> np.ndarray:
    """Lookup table of uint8 by 16-bit value: round(255 * value / (2^bits - 1)), clipped at white."""
    white = (1 << bits) - 1
    values = np.minimum(np.arange(LEVELS), white)
    values = white - values if inverted else values
    table = ((2 * 255 * values + white) // (2 * white)).astype(np.uint8)
    table.flags.writeable = False  # shared by the cache
    return table


def _in_lower_bits(picture: Image.Image, bits: int) -> bool:
    """Whether all values fit into the lower bits and at least one cannot be written by an encoder of upper bits."""
    upper, all_upper = _upper_values(bits), True
    for values_HW in _strips(picture):
        if values_HW.max() >= 1 << bits:
            return False
        all_upper = all_upper and bool(upper[values_HW].all())
    return not all_upper


def _upper_values(bits: int) -> np.ndarray:
    """Table of bool by 16-bit value: whether an encoder that follows the standard can write it."""
    samples = np.arange(1 << bits)
    shifted = samples << (16 - bits)
    repeated, filled = shifted.copy(), bits
    while filled < 16:  # repeat the upper bits in the lower ones
        repeated |= shifted >> filled
        filled += bits
    scaled = (samples * 65535 * 2 + (1 << bits) - 1) // (2 * ((1 << bits) - 1))
    table = np.zeros(LEVELS, bool)
    for values in (shifted, repeated, scaled):
        table[values] = True
    return table


def _strips(picture: Image.Image) -> Iterator[np.ndarray]:
    width, height = picture.size
    step = max(1, STRIP // width)
    return (np.asarray(picture.crop((0, top, width, min(top + step, height)))) for top in range(0, height, step))


def _fits(values_HW: np.ndarray) -> bool:
    return bool(values_HW.min() >= 0 and values_HW.max() < LEVELS)
