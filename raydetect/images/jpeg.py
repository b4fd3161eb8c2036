"""Decodes JPEGs and treats libjpeg's warnings as errors, so that a damaged scan is never decoded to grey areas.

Decodes with TurboJPEG (through `simplejpeg`) using libjpeg's accurate DCT and upsampling, so the pixels equal
Pillow's. Some valid files are not supported by TurboJPEG (mostly unusual subsampling). The caller decodes them with
Pillow, which hides libjpeg's warnings: a gap in such a file is not detected, and without end marker it counts as
truncated. The checks of this module that need no decoding apply to them too.

At a reduced DCT scale (`preprocess.py`) every code of the scans is still read, so the same damage is found.

JPEG has no checksum. Detected: a scan that is too short or too long, invalid codes or restart markers; missing scans
of a progressive or non-interleaved image; long runs of zero bytes that no encoder writes. Not detected: damage after
which the entropy decoder resynchronises with the right number of blocks.
"""

import re
from collections.abc import Iterator

import numpy as np
import simplejpeg

from raydetect.errors import MemberError
from raydetect.images.preprocess import reduced

COLOURS = {"RGB": ("RGBX", 4), "L": ("GRAY", 1), "CMYK": ("CMYK", 4)}
END = b"\xff\xd9"
SOI, EOI, SOS, DHT, APP0, APP1, APP14 = 0xD8, 0xD9, 0xDA, 0xC4, 0xE0, 0xE1, 0xEE
BARE = {0x01, SOI, EOI, *range(0xD0, 0xD8)}  # markers without a body
FRAMES = {*range(0xC0, 0xD0)} - {DHT, 0xC8, 0xCC}
PROGRESSIVE, HUFFMAN = {0xC2, 0xC6}, {0xC0, 0xC1, 0xC2}
DCT = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # frames of frequencies that libjpeg decodes; a lossless frame has none
NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # inside a scan: neither a stuffed 0xff nor a restart marker
MAX_SEGMENTS = 10_000
MAX_ATTEMPTS = 4
ZERO_RUN, SECTOR = bytes(64), bytes(512)
MAX_PADDING = 32  # padding bytes of cameras before the end marker
MAX_LAST_ZEROS = 2  # zero bytes with which a valid scan may end
FETCHED = 8  # bytes that the decoder may have prefetched into its bit buffer before it counts extraneous bytes
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


class UnsupportedByTurboError(Exception):
    """TurboJPEG does not support this kind of JPEG, which may be valid."""


def decode_jpeg(data: bytes, size: tuple[int, int], mode: str, reduction: int = 1) -> np.ndarray:
    """Decodes a JPEG to uint8 (H, W, C): RGB with a fourth byte as in Pillow, CMYK as stored (inverted).

    H and W are those of `size` divided by `reduction` and rounded up.

    Args:
        data: the file.
        size: (width, height) in px from the header, as read by Pillow.
        mode: Pillow's mode: RGB, L or CMYK.
        reduction: 1, 2, 4 or 8; more than 1 only for frames in `DCT`.

    Raises:
        MemberError: corrupt: libjpeg fails or warns, or parts of the scan are missing.
        UnsupportedByTurboError: another decoder is needed.
    """
    content = with_end_marker(data)
    check_scans(content)
    pixels, warning = _attempt(content, size, mode, reduction)
    for repair in (_with_clean_header, *(_without_padding,) * MAX_ATTEMPTS):
        if pixels is not None:
            return pixels
        # libjpeg reports only its first warning, so the causes of harmless ones are removed to see the next
        repaired = repair(content, warning)
        if repaired != content:
            content = repaired
            pixels, warning = _attempt(content, size, mode, reduction)
    if pixels is None:
        raise _damaged(warning)
    return pixels


def with_end_marker(data: bytes) -> bytes:
    """Adds a missing end marker, so that libjpeg warns only if the scan itself is truncated.

    Trailing zeros that no marker follows are removed, as they come from disk blocks.
    """
    if data.endswith(END):
        return data
    stripped = data.rstrip(b"\0")
    return (data if len(data) - len(stripped) <= MAX_LAST_ZEROS else stripped) + END


def check_scans(data: bytes) -> None:
    """Finds damage that libjpeg does not report, without decoding.

    Raises:
        MemberError: corrupt: scans are missing, or a part of one is zeroed.
    """
    first, is_only = _first_scan(data)
    if first is None:
        return
    zeros = data.find(ZERO_RUN, first)
    if zeros >= 0 or not is_only:
        _walk_scans(data, zeros)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, start, stop) of every well-formed segment in order; scans without their data.

    Skips other bytes between segments, as libjpeg does. Stops at the end marker or where the data are truncated.
    """
    position = 2
    for _ in range(MAX_SEGMENTS):
        match = NEXT_MARKER.search(data, position)
        if match is None:
            return
        start, marker = match.start(), data[match.end() - 1]
        if marker == EOI:
            return
        stop = match.end()
        if marker not in BARE:
            stop += int.from_bytes(data[stop : stop + 2], "big")
            if stop < match.end() + 2 or stop > len(data):
                return
        yield marker, start, stop
        position = stop


def without_exif(data: bytes) -> bytes:
    """Removes the EXIF segments of a JPEG."""
    parts, kept = [], 0
    for marker, start, stop in segments(data):
        if marker == SOS:
            break
        if marker == APP1 and data[start + 4 : start + 8] == b"Exif":
            parts.append(data[kept:start])
            kept = stop
    return b"".join((*parts, data[kept:]))


def sample_bits(data: bytes) -> int | None:
    """Returns the bits per sample in the frame header; None if there is no frame header."""
    frame = _frame(data)
    return None if frame is None else _byte(data, frame[1] + 4)


def has_dct(data: bytes) -> bool:
    """Whether the image is stored as frequencies, so that it can be decoded at a reduced scale."""
    frame = _frame(data)
    return frame is not None and frame[0] in DCT


def _frame(data: bytes) -> tuple[int, int] | None:
    """Returns (marker, start) of the first frame header."""
    return next(((marker, start) for marker, start, _ in segments(data) if marker in FRAMES), None)


def _byte(data: bytes, position: int) -> int:
    return data[position] if position < len(data) else 0


def one_scan(data: bytes) -> bool:
    """Whether the image is sequential with all components in a single scan, as most are; it is decoded row by row."""
    return _first_scan(data)[1]


def _first_scan(data: bytes) -> tuple[int | None, bool]:
    """Returns (start of the first scan, whether it is the only one of a sequential image)."""
    components, is_progressive = 0, False
    for marker, start, _ in segments(data):
        if marker in FRAMES:
            is_progressive = marker in PROGRESSIVE
            components = _byte(data, start + 9)
        if marker == SOS:
            return start, not is_progressive and _byte(data, start + 4) >= components
    return None, not is_progressive


class _Scans:
    """Tracks which coefficients the scans of an image contain so far."""

    def __init__(self) -> None:
        self.progressive = self.huffman = False
        self.zero_codes: dict[int, int] = {}  # by AC table: the symbol whose code is all zeros
        self.complete: dict[int, set[int]] = {}  # by component: coefficients received to the last bit
        self.with_ac: set[int] = set()  # components with a scan of AC coefficients

    def frame(self, marker: int, body: bytes) -> None:
        """Reads a frame header."""
        self.progressive, self.huffman = marker in PROGRESSIVE, marker in HUFFMAN
        self.complete = {component: set() for component in body[6::3]}

    def tables(self, body: bytes) -> None:
        """Reads Huffman tables; the first symbol of each has the code of all zeros."""
        while len(body) > 17:
            count = sum(body[1:17])
            if body[0] >> 4 and count:
                self.zero_codes[body[0] & 15] = body[17] if len(body) > 17 else 0
            body = body[17 + count :]

    @property
    def unfinished(self) -> bool:
        """Whether scans are missing. An encoder may omit all AC coefficients of a (colour) component, but not some."""
        if any(0 not in coefficients for coefficients in self.complete.values()):
            return True
        if not self.progressive:
            return False
        return not self.with_ac or any(len(self.complete.get(component, ())) < 64 for component in self.with_ac)

    def scan(self, body: bytes) -> bytes | None:
        """Reads a scan header; returns the run of zero bytes that only damage explains, None if any run may be valid.

        If the code of all zeros is a coefficient, a run of zeros would be endless blocks full of -1. Bits that refine
        coefficients are zero more often, so there the run is a disk sector. If the code ends a block, zeros are valid
        flat blocks.
        """
        count = body[0] if body else 0
        if len(body) < 4 + 2 * count:
            return None
        first, last, bits = body[1 + 2 * count : 4 + 2 * count]
        high, low = bits >> 4, bits & 15
        for component in body[1 : 1 + 2 * count : 2]:
            if low == 0 or not self.progressive:
                self.complete.setdefault(component, set()).update(range(first, min(last, 63) + 1))
            if first > 0:
                self.with_ac.add(component)
        tables = {table & 15 for table in body[2 : 2 + 2 * count : 2]}
        if not self.huffman or (self.progressive and first == 0):
            return None
        if self.progressive and high:
            return SECTOR
        return ZERO_RUN if any(self.zero_codes.get(table, 0) & 15 for table in tables) else None


def _walk_scans(data: bytes, zeros: int) -> None:
    """Checks all scans; `zeros` is the position of the first long run of zeros after the first scan starts, or -1.

    Raises:
        MemberError: corrupt.
    """
    scans, scan_start, run = _Scans(), 0, None
    for marker, start, stop in (*segments(data), (EOI, len(data), len(data))):
        if run is not None and 0 <= zeros <= start and _contains(data, run, scan_start, start):
            raise _damaged("part of it is zeroed")
        run = None
        if marker in FRAMES:
            scans.frame(marker, data[start + 4 : stop])
        elif marker == DHT:
            scans.tables(data[start + 4 : stop])
        elif marker == SOS:
            run, scan_start = scans.scan(data[start + 4 : stop]), stop
    if scans.unfinished:
        raise _damaged("scans are missing at the end")


def _contains(data: bytes, run: bytes, start: int, stop: int) -> bool:
    """Whether the scan data from `start` contain the run before the end marker or the next segment."""
    end = data.find(END, start, stop)
    return data.find(run, start, stop if end < 0 else end) >= 0


def _attempt(data: bytes, size: tuple[int, int], mode: str, reduction: int) -> tuple[np.ndarray | None, str]:
    """Decodes with TurboJPEG; returns (pixels, "") or (None, libjpeg's message)."""
    colour, depth = COLOURS[mode]
    width, height = size
    try:
        # check the header first: libjpeg must not allocate more than was allowed for the size read by Pillow
        header = simplejpeg.decode_jpeg_header(data)
        if (header[0], header[1]) != (height, width):
            return None, f"its headers disagree: {width} x {height} and {header[1]} x {header[0]} px"
        if (header[2] in ("CMYK", "YCCK")) != (mode == "CMYK"):
            return None, f"its headers disagree: {mode} and {header[2]}"
        width, height = reduced(size, reduction)
        buffer = np.empty(height * width * depth, np.uint8)
        least = (height, width, reduction) if reduction > 1 else (0, 0, 1)  # the smallest scale that gives this size
        return simplejpeg.decode_jpeg(data, colour, False, False, *least, buffer, True), ""
    except KeyError as error:
        raise UnsupportedByTurboError(str(error)) from None
    except ValueError as error:
        message = " ".join(str(error).split()).removeprefix("Corrupt JPEG data: ")
        if message.startswith("tj"):  # an error of TurboJPEG itself, not a message of libjpeg
            raise UnsupportedByTurboError(message) from None
        return None, message


def _with_clean_header(data: bytes, warning: str) -> bytes:
    """Removes causes of harmless warnings from the header: bytes between segments and unknown versions.

    Everything after the header of the first scan is unchanged, as warnings about it are never harmless.
    """
    parts = [data[:2]]
    for marker, start, stop in segments(data):
        part = bytearray(data[start:stop])
        if marker == APP0 and part[4:9] == b"JFIF\0" and len(part) > 9:
            part[9] = 1  # "unknown JFIF revision number"
        if marker == APP14 and part[4:9] == b"Adobe" and len(part) >= 16 and "Adobe" in warning:
            part[15] = 1  # libjpeg treats an unknown colour transform as YCbCr
        if marker == SOS:
            if "SOS parameters" in warning:
                part[-3:] = b"\0\x3f\0"
            return b"".join((*parts, bytes(part), data[stop:]))
        parts.append(bytes(part))
    return data


def _without_padding(data: bytes, warning: str) -> bytes:
    """Removes a few equal bytes before the end marker if libjpeg warns only about them.

    How many bytes the decoder prefetches depends on what follows, so a few may remain for the next attempt. None of
    them may have been decoded, as a zeroed end of a scan is also a run of equal bytes.
    """
    match = EXTRANEOUS.fullmatch(warning)
    if match is None or int(match.group(1)) > MAX_PADDING:
        return data
    extra = int(match.group(1))
    end = data.find(END, next(stop for marker, _, stop in segments(data) if marker == SOS))
    run = end - len(data[:end].rstrip(data[end - 1 : end]))
    return data[: end - extra] + data[end:] if extra <= run <= extra + FETCHED else data


def _damaged(reason: str) -> MemberError:
    return MemberError("corrupt", f"the JPEG's scan is damaged ({reason}). Write it again at its source.")
