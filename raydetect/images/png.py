"""The chunks of a PNG, read without decoding."""

from collections.abc import Iterator

PNG_START = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 1000  # before the pixels
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
TURNING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts that may say how the image is to be turned


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, stop of the whole chunk) of every chunk in order; ends where the bytes break off."""
    place = len(PNG_START)
    while place + 12 <= len(data):
        stop = place + 12 + int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], place, stop
        place = stop


def significant_bits(data: bytes) -> int | None:
    """Bits of the sBIT chunk of a grey 16-bit PNG, None when it has none that matters; never raises."""
    if not data.startswith(PNG_START) or data[24:26] != b"\x10\0":  # depth 16, colour type grey
        return None
    for _, (kind, start, stop) in zip(range(MAX_CHUNKS), chunks(data), strict=False):
        if kind == b"sBIT" and stop - start == 13 and stop <= len(data):
            bits = data[start + 8]
            return bits if 0 < bits < 16 else None
        if kind in (b"IDAT", b"IEND"):
            return None
    return None


def without_texts(data: bytes) -> tuple[bytes, bool]:
    """The same PNG without texts and colour profile, and whether one of them may have said how it is to be turned."""
    parts, kept, may_turn = [], 0, False
    for kind, start, stop in chunks(data):
        if kind in TEXTS:
            parts.append(data[kept:start])
            kept = stop
            may_turn = may_turn or data.startswith(TURNING, start + 8)
    return b"".join((*parts, data[kept:])), may_turn
