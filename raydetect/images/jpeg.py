"""JPEG bytes to pixels, with libjpeg's warnings heard: a damaged scan is an error, never a picture with grey in it.

TurboJPEG decodes (through `simplejpeg`), with the accurate DCT and upsampling of libjpeg: the pixels are Pillow's.
Where TurboJPEG refuses a file that is no worse for it (unusual subsampling, mostly), the caller decodes with Pillow and
hears nothing of libjpeg: a hole in such a file is not noticed, and without its end marker it counts as cut. The checks
of this module that need no decoding are made anyway.

JPEG has no checksum. What is noticed: a scan that ends too early, holds too much, breaks its code or its restart
markers; scans of a progressive or non-interleaved image that are missing; long runs of zero bytes that no encoder
writes. Damage after which the code falls into step again, with the right number of blocks, cannot be noticed.
"""

import re
from collections.abc import Iterator

import numpy as np
import simplejpeg

from raydetect.errors import MemberError

COLOURS = {"RGB": ("RGBX", 4), "L": ("GRAY", 1), "CMYK": ("CMYK", 4)}
END = b"\xff\xd9"
SOI, EOI, SOS, DHT, APP0, APP1, APP14 = 0xD8, 0xD9, 0xDA, 0xC4, 0xE0, 0xE1, 0xEE
BARE = {0x01, SOI, EOI, *range(0xD0, 0xD8)}  # markers without a body
FRAMES = {*range(0xC0, 0xD0)} - {DHT, 0xC8, 0xCC}
PROGRESSIVE, HUFFMAN = {0xC2, 0xC6}, {0xC0, 0xC1, 0xC2}
NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # inside a scan: neither a stuffed 0xff nor a restart marker
MAX_SEGMENTS = 10_000
MAX_ATTEMPTS = 4
ZERO_RUN, SECTOR = bytes(64), bytes(512)
MAX_PADDING = 32  # bytes before the end marker; cameras pad there
MAX_LAST_ZEROS = 2  # a scan itself may end in so many
FETCHED = 8  # bytes that the decoder may have taken into its bit buffer before it counts what is left over
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


class NotByTurboError(Exception):
    """TurboJPEG does not do this kind of JPEG; that says nothing of its health."""


def decode_jpeg(data: bytes, size: tuple[int, int], mode: str) -> np.ndarray:
    """Pixels uint8 (H, W, C) of a JPEG: of RGB with a fourth byte, as Pillow keeps them; of CMYK as stored, inverted.

    Args:
        data: the file.
        size: (width, height) in px that its header says, as Pillow read it.
        mode: RGB, L or CMYK: Pillow's mode of it.

    Raises:
        MemberError: corrupt: libjpeg fails or warns, or parts of the scan are missing.
        NotByTurboError: it must be decoded otherwise.
    """
    whole = ended(data)
    check_scans(whole)
    pixels, heard = _attempt(whole, size, mode)
    for repair_hint in (_mended, *(_without_padding,) * MAX_ATTEMPTS):
        if pixels is not None:
            return pixels
        # libjpeg tells its first warning only: what is harmless is mended, so that a second one is heard
        mended = repair_hint(whole, heard)
        if mended != whole:
            whole = mended
            pixels, heard = _attempt(whole, size, mode)
    if pixels is None:
        raise _damaged(heard)
    return pixels


def ended(data: bytes) -> bytes:
    """The file with an end marker at its end; libjpeg warns of a scan that is cut, not of one that is whole.

    Zeros there are what a disk filled up with, not data: where no marker follows nothing says otherwise.
    """
    if data.endswith(END):
        return data
    bare = data.rstrip(b"\0")
    return (data if len(data) - len(bare) <= MAX_LAST_ZEROS else bare) + END


def check_scans(data: bytes) -> None:
    """Finds without decoding what libjpeg passes over in silence.

    Raises:
        MemberError: corrupt: scans are missing, or a part of one is zeroed.
    """
    first = next((start for marker, start, _ in segments(data) if marker == SOS), None)
    if first is None:
        return
    zeros = data.find(ZERO_RUN, first)
    if zeros >= 0 or not _one_scan(data):
        _walk_scans(data, zeros)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop of the whole segment) of every well-formed segment in order, scans without their data.

    Between segments anything else is passed over, as libjpeg does. Ends at the end marker or where the bytes break off.
    """
    place = 2
    for _ in range(MAX_SEGMENTS):
        found = NEXT_MARKER.search(data, place)
        if found is None:
            return
        start, marker = found.start(), data[found.end() - 1]
        if marker == EOI:
            return
        stop = found.end()
        if marker not in BARE:
            stop += int.from_bytes(data[stop : stop + 2], "big")
            if stop < found.end() + 2 or stop > len(data):
                return
        yield marker, start, stop
        place = stop


def without_exif(data: bytes) -> bytes:
    """The same JPEG without its EXIF blocks."""
    parts, place = [], 0
    for marker, start, stop in segments(data):
        if marker == SOS:
            break
        if marker == APP1 and data[start + 4 : start + 8] == b"Exif":
            parts.append(data[place:start])
            place = stop
    return b"".join((*parts, data[place:]))


def sample_bits(data: bytes) -> int | None:
    """Bits per sample that its frame header says, None when it has none."""
    frame = next((start for marker, start, _ in segments(data) if marker in FRAMES), None)
    return None if frame is None else _byte(data, frame + 4)


def _byte(data: bytes, place: int) -> int:
    return data[place] if place < len(data) else 0


def _one_scan(data: bytes) -> bool:
    """Whether a single scan holds all of a sequential image, as almost all do."""
    components = 0
    for marker, start, _ in segments(data):
        if marker in FRAMES:
            if marker in PROGRESSIVE:
                return False
            components = _byte(data, start + 9)
        if marker == SOS:
            return _byte(data, start + 4) >= components
    return True


class _Scans:
    """What the scans of an image brought so far."""

    def __init__(self) -> None:
        self.progressive = self.huffman = False
        self.zero_codes: dict[int, int] = {}  # AC table: symbol whose code is all zeros
        self.there: dict[int, set[int]] = {}  # component: coefficients that are there to their last bit
        self.detailed: set[int] = set()  # components with a scan of other coefficients than the mean

    def frame(self, marker: int, body: bytes) -> None:
        """Start of frame."""
        self.progressive, self.huffman = marker in PROGRESSIVE, marker in HUFFMAN
        self.there = {component: set() for component in body[6::3]}

    def tables(self, body: bytes) -> None:
        """Huffman tables: the first symbol of each has the code of zeros."""
        while len(body) > 17:
            count = sum(body[1:17])
            if body[0] >> 4 and count:
                self.zero_codes[body[0] & 15] = body[17] if len(body) > 17 else 0
            body = body[17 + count :]

    @property
    def unfinished(self) -> bool:
        """Whether scans are missing. An encoder may leave out all detail of a component (of colours), not a part."""
        if any(0 not in there for there in self.there.values()):
            return True
        if not self.progressive:
            return False
        return not self.detailed or any(len(self.there.get(component, ())) < 64 for component in self.detailed)

    def scan(self, body: bytes) -> bytes | None:
        """Notes a scan; the run of zeros that can only be damage in it, None when any may be right.

        Where the code of zeros is a coefficient, a run of them is blocks full of -1 without an end. Bits that refine
        coefficients are zeros more often, so there the run is a sector of a disk. Zeros that end blocks are flat.
        """
        count = body[0] if body else 0
        if len(body) < 4 + 2 * count:
            return None
        first, last, bits = body[1 + 2 * count : 4 + 2 * count]
        high, low = bits >> 4, bits & 15
        for component in body[1 : 1 + 2 * count : 2]:
            if low == 0 or not self.progressive:
                self.there.setdefault(component, set()).update(range(first, min(last, 63) + 1))
            if first > 0:
                self.detailed.add(component)
        tables = {table & 15 for table in body[2 : 2 + 2 * count : 2]}
        if not self.huffman or (self.progressive and first == 0):
            return None
        if self.progressive and high:
            return SECTOR
        return ZERO_RUN if any(self.zero_codes.get(table, 0) & 15 for table in tables) else None


def _walk_scans(data: bytes, zeros: int) -> None:
    """Goes through all scans; `zeros` is where the first long run of zeros after the first scan's start is, or -1.

    Raises:
        MemberError: corrupt.
    """
    scans, started, run = _Scans(), 0, None
    for marker, start, stop in (*segments(data), (EOI, len(data), len(data))):
        if run is not None and 0 <= zeros <= start and _holds(data, run, started, start):
            raise _damaged("a part of it is zeroed")
        run = None
        if marker in FRAMES:
            scans.frame(marker, data[start + 4 : stop])
        elif marker == DHT:
            scans.tables(data[start + 4 : stop])
        elif marker == SOS:
            run, started = scans.scan(data[start + 4 : stop]), stop
    if scans.unfinished:
        raise _damaged("scans are missing at the end")


def _holds(data: bytes, run: bytes, start: int, stop: int) -> bool:
    """Whether a scan that starts there holds the run before its end marker or the next segment."""
    end = data.find(END, start, stop)
    return data.find(run, start, stop if end < 0 else end) >= 0


def _attempt(data: bytes, size: tuple[int, int], mode: str) -> tuple[np.ndarray | None, str]:
    """(pixels, "") or (None, what libjpeg said)."""
    colour, depth = COLOURS[mode]
    width, height = size
    try:
        # the header first: a file must not make libjpeg allocate more than Pillow's reading of it was judged by
        found = simplejpeg.decode_jpeg_header(data)
        if (found[0], found[1]) != (height, width):
            return None, f"its headers say {width} x {height} and {found[1]} x {found[0]} px"
        if (found[2] in ("CMYK", "YCCK")) != (mode == "CMYK"):
            return None, f"its headers say {mode} and {found[2]}"
        space = np.empty(height * width * depth, np.uint8)
        return simplejpeg.decode_jpeg(data, colour, buffer=space, strict=True), ""
    except KeyError as error:
        raise NotByTurboError(str(error)) from None
    except ValueError as error:
        heard = " ".join(str(error).split()).removeprefix("Corrupt JPEG data: ")
        if heard.startswith("tj"):  # a refusal of TurboJPEG's own, not a word of libjpeg
            raise NotByTurboError(heard) from None
        return None, heard


def _mended(data: bytes, heard: str) -> bytes:
    """The file with a header that gives no cause for harmless warnings: nothing between segments, known versions.

    What follows the first scan's header is as it was: there a warning is never harmless.
    """
    parts = [data[:2]]
    for marker, start, stop in segments(data):
        part = bytearray(data[start:stop])
        if marker == APP0 and part[4:9] == b"JFIF\0" and len(part) > 9:
            part[9] = 1  # "unknown JFIF revision number"
        if marker == APP14 and part[4:9] == b"Adobe" and len(part) >= 16 and "Adobe" in heard:
            part[15] = 1  # an unknown colour transform is taken for YCbCr; libjpeg does the same
        if marker == SOS:
            if "SOS parameters" in heard:
                part[-3:] = b"\0\x3f\0"
            return b"".join((*parts, bytes(part), data[stop:]))
        parts.append(bytes(part))
    return data


def _without_padding(data: bytes, heard: str) -> bytes:
    """The file without a few equal bytes before its end marker, when they are all that libjpeg warns of.

    How much the decoder fetched ahead depends on the bytes after it, so another few may be left over then. It must not
    have used any: a zeroed end of a scan is also a run of equal bytes.
    """
    message = EXTRANEOUS.fullmatch(heard)
    if message is None or int(message.group(1)) > MAX_PADDING:
        return data
    extra = int(message.group(1))
    end = data.find(END, next(stop for marker, _, stop in segments(data) if marker == SOS))
    run = end - len(data[:end].rstrip(data[end - 1 : end]))
    return data[: end - extra] + data[end:] if extra <= run <= extra + FETCHED else data


def _damaged(heard: str) -> MemberError:
    return MemberError("corrupt", f"the JPEG's scan is damaged ({heard}). Write it again at its source.")
