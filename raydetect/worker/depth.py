"""Grey of more than eight bits to eight, by one fixed scale for all images: a table, applied row by row."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from raydetect.errors import MemberError

LEVELS = 65536
STRIP = 1 << 18  # values that are looked up at once: indexes take eight bytes each
PNG_START = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 1000


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


def eight_bits(picture: Image.Image, depth: GreyDepth) -> Image.Image:
    """Mode L of a picture in one of Pillow's 16-bit modes, or in mode I with values of 16 bits.

    Raises:
        MemberError: unsupported_mode: values of more bits.
    """
    values_HW = np.asarray(picture)
    if values_HW.dtype.itemsize > 2 and (values_HW.min() < 0 or values_HW.max() >= LEVELS):
        raise MemberError("unsupported_mode", "32-bit integer pixels have no fixed 8-bit scale. Convert them first.")
    bits = depth.bits
    if depth.maybe_bits is not None and _in_lower_bits(values_HW, depth.maybe_bits):
        bits = depth.maybe_bits
    table = scale_table(bits, depth.inverted)
    out_HW = np.empty(values_HW.shape, np.uint8)
    for rows in _strips(values_HW):
        out_HW[rows] = table[values_HW[rows]]
    return Image.fromarray(out_HW)


def scale_table(bits: int, inverted: bool) -> np.ndarray:
    """uint8 by value: round(255 * value / (2^bits - 1)), more than white is white."""
    white = (1 << bits) - 1
    values = np.minimum(np.arange(LEVELS), white)
    values = white - values if inverted else values
    return ((2 * 255 * values + white) // (2 * white)).astype(np.uint8)


def significant_bits(data: bytes) -> int | None:
    """Bits of the sBIT chunk of a grey 16-bit PNG, None when it has none that matters; never raises."""
    if not data.startswith(PNG_START) or data[24:26] != b"\x10\0":  # depth 16, colour type grey
        return None
    place = len(PNG_START)
    for _ in range(MAX_CHUNKS):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind == b"sBIT" and size == 1 and place + 8 < len(data):
            bits = data[place + 8]
            return bits if 0 < bits < 16 else None
        if kind in (b"IDAT", b"IEND", b""):
            return None
        place += 12 + size
    return None


def _in_lower_bits(values_HW: np.ndarray, bits: int) -> bool:
    """Whether no value needs more bits, and one at least is none that a writer of upper bits makes."""
    if values_HW.max() >= 1 << bits:
        return False
    upper = _upper_values(bits)
    return not all(upper[values_HW[rows]].all() for rows in _strips(values_HW))


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


def _strips(values_HW: np.ndarray) -> Iterator[slice]:
    height, width = values_HW.shape
    step = max(1, STRIP // max(1, width))
    return (slice(start, start + step) for start in range(0, height, step))
