"""Reads the chunks of a PNG without decoding."""

from collections.abc import Iterator

PNG_START = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 1000  # searched before the pixels
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
TURNING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts that may contain the orientation


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (kind, start, stop) of every chunk in order; stops where the data are truncated."""
    position = len(PNG_START)
    while position + 12 <= len(data):
        stop = position + 12 + int.from_bytes(data[position : position + 4], "big")
        yield data[position + 4 : position + 8], position, stop
        position = stop


def has_deep_colour(data: bytes) -> bool:
    """Whether data start as a PNG of 16 bits in colour, or in grey with alpha."""
    return data.startswith(PNG_START) and data[24:26] in (b"\x10\2", b"\x10\4", b"\x10\6")


def significant_bits(data: bytes) -> int | None:
    """Returns the bits in the sBIT chunk of a 16-bit grey PNG; None if it has none below 16. Never raises."""
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
    """Removes texts and colour profile; returns the PNG and whether one of them may contain the orientation."""
    parts, kept, may_turn = [], 0, False
    for kind, start, stop in chunks(data):
        if kind in TEXTS:
            parts.append(data[kept:start])
            kept = stop
            may_turn = may_turn or data.startswith(TURNING, start + 8)
    return b"".join((*parts, data[kept:])), may_turn
