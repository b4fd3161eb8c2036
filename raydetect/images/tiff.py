"""Reads TIFF directories without decoding and with bounds, for files that Pillow cannot open or misreads."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raydetect.errors import MemberError

MAX_PAGES = 10_000
MAX_TAGS, FIRST_TAGS = 4096, 8  # per directory; for counting pages only the first of the sorted tags are needed
MAX_VALUES = 8  # per tag; further samples per pixel do not matter here
UNSIGNED = {1: "B", 3: "H", 4: "L", 13: "L", 16: "Q"}  # TIFF type: struct code
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, ORIENTATION, SAMPLES, TILE_WIDTH, TILE_HEIGHT = 266, 274, 277, 322, 323
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
STRIP_BYTES, COLOUR_MAP, TILE_BYTES = 279, 320, 325
READ = {
    SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, ORIENTATION, SAMPLES, TILE_WIDTH, TILE_HEIGHT,
    EXTRA_SAMPLES, SAMPLE_FORMAT,
}  # fmt: skip
SAMPLE_FORMATS = {1: "unsigned integers", 2: "signed integers", 3: "floating point", 4: "undefined"}
COMPRESSIONS = {
    1: "none", 2: "CCITT RLE", 3: "CCITT G3", 4: "CCITT G4", 5: "LZW", 6: "old JPEG", 7: "JPEG", 8: "deflate",
    32773: "PackBits", 32946: "deflate", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34925: "LZMA",
    50000: "Zstandard", 50001: "WebP",
}  # fmt: skip
PHOTOMETRICS = {
    0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 4: "transparency mask", 5: "separated", 6: "YCbCr",
    8: "CIELAB", 32803: "colour filter array", 34892: "linear raw",
}  # fmt: skip


class DamagedTiffError(Exception):
    """The data are truncated or not a TIFF."""


@dataclass(frozen=True, slots=True)
class TiffDirectory:
    """One image file directory.

    Attributes:
        values: values by tag, for tags in `READ` with unsigned integers; at most `MAX_VALUES` each.
        value_offsets: by tag, the offset of the field with its value or the offset of its values.
        next_offset: offset of the next directory, 0 = none.
    """

    values: dict[int, tuple[int, ...]]
    value_offsets: dict[int, int]
    next_offset: int

    def first(self, tag: int, default: int) -> int:
        """Returns the first value of a tag."""
        return self.values.get(tag, (default,))[0]


class Reader:
    """Reads directories of TIFF data, including EXIF blocks; both byte orders, 32 and 64 bits."""

    def __init__(self, data: bytes) -> None:
        """Reads the header.

        Raises:
            DamagedTiffError: the data are not a TIFF, or its header is truncated.
        """
        self.data = data
        if data[:2] not in (b"II", b"MM"):
            raise DamagedTiffError("it does not begin with a TIFF header")
        self.order = "<" if data[:2] == b"II" else ">"
        (magic,) = self._unpack("H", 2)
        if magic not in (42, 43):
            raise DamagedTiffError("it does not begin with a TIFF header")
        self.big = magic == 43
        (self.start,) = self._unpack("Q", 8) if self.big else self._unpack("L", 4)

    def directory(self, offset: int, max_tags: int = MAX_TAGS) -> TiffDirectory:
        """Reads the directory at an offset, ignoring errors in tags that are not in `READ`.

        Raises:
            DamagedTiffError: the directory is truncated, or values lie outside the file.
        """
        count, entries, step = self._extent(offset)
        values: dict[int, tuple[int, ...]] = {}
        value_offsets: dict[int, int] = {}
        for i in range(min(count, max_tags)):
            entry = entries + i * step
            tag, kind, number = self._unpack("HHQ" if self.big else "HHL", entry)
            inline = entry + (12 if self.big else 8)
            value_offsets.setdefault(tag, inline)
            if tag in READ and kind in UNSIGNED and number:
                values.setdefault(tag, self._values(kind, number, inline))
        return TiffDirectory(values, value_offsets, self._next_offset(entries + count * step))

    def numbers(self, offset: int, wanted: int) -> np.ndarray | None:
        """Reads all values of a tag of the directory at an offset; None if it has none of unsigned integers.

        Raises:
            DamagedTiffError: the directory is truncated, or the values lie outside the file.
        """
        count, entries, step = self._extent(offset)
        for entry in range(entries, entries + min(count, MAX_TAGS) * step, step):
            tag, kind, number = self._unpack("HHQ" if self.big else "HHL", entry)
            if tag == wanted and kind in UNSIGNED:
                start, size = entry + (12 if self.big else 8), SIZES[kind]
                if number * size > (8 if self.big else 4):
                    (start,) = self._unpack("Q" if self.big else "L", start)
                if start + number * size > len(self.data):
                    raise DamagedTiffError("values of a directory lie beyond the end")
                return np.frombuffer(self.data, f"{self.order}u{size}", number, start)
        return None

    def offsets(self) -> Iterator[int]:
        """Yields the offsets of the directories in order; stops where the chain is damaged or forms a loop."""
        offset, seen = self.start, set[int]()
        while offset and offset not in seen and len(seen) < MAX_PAGES:
            seen.add(offset)
            try:
                count, entries, step = self._extent(offset)
            except DamagedTiffError:
                return
            yield offset
            offset = self._next_offset(entries + count * step)

    def _extent(self, offset: int) -> tuple[int, int, int]:
        """Returns (number of entries, offset of the first, bytes per entry)."""
        (count,) = self._unpack("Q" if self.big else "H", offset)
        entries, step = offset + (8 if self.big else 2), 20 if self.big else 12
        if entries + count * step > len(self.data):
            raise DamagedTiffError(f"a directory of {count} entries is truncated")
        return count, entries, step

    def _next_offset(self, offset: int) -> int:
        try:
            return int(self._unpack("Q" if self.big else "L", offset)[0])
        except DamagedTiffError:  # some writers omit the last link
            return 0

    def _values(self, kind: int, number: int, inline: int) -> tuple[int, ...]:
        size, inline_size = SIZES[kind] * number, 8 if self.big else 4
        offset = inline
        if size > inline_size:
            (offset,) = self._unpack("Q" if self.big else "L", inline)
            if offset + size > len(self.data):
                raise DamagedTiffError("values of a directory lie beyond the end")
        return self._unpack(str(min(number, MAX_VALUES)) + UNSIGNED[kind], offset)

    def _unpack(self, form: str, offset: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(self.order + form, self.data, offset)
        except (struct.error, OverflowError):
            raise DamagedTiffError("it is truncated") from None


def is_tiff(data: bytes) -> bool:
    """Whether data start with a TIFF header."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def refusal(data: bytes) -> MemberError:
    """Returns the reason why Pillow cannot open a TIFF: unsupported_mode with a description, or corrupt."""
    try:
        reader = Reader(data)
        page = reader.directory(reader.start)
    except DamagedTiffError as error:
        return MemberError("corrupt", f"truncated or damaged TIFF directory ({error}). Write it again at its source.")
    if WIDTH not in page.values or HEIGHT not in page.values:
        return MemberError("corrupt", "damaged TIFF directory: it has no image size. Write it again at its source.")
    message = f"{_described(page)}: not supported. Convert it to 8 or 16 bits per sample{_instead(page)}."
    return MemberError("unsupported_mode", message)


def _instead(page: TiffDirectory) -> str:
    """What a view can state so that rasters are read as they are."""
    settings = ["view.bands"] if page.first(SAMPLES, 1) not in (1, 3) else []
    if page.first(SAMPLE_FORMAT, 1) != 1 or page.first(BITS, 1) not in (1, 8, 16):
        settings.append("view.range")
    return f", or state {' and '.join(settings)} in the fit" if settings else ""


def _described(page: TiffDirectory) -> str:
    samples, bits = page.first(SAMPLES, 1), page.values.get(BITS, (1,))
    numbers = SAMPLE_FORMATS.get(page.first(SAMPLE_FORMAT, 1), f"sample format {page.first(SAMPLE_FORMAT, 1)}")
    colour, packed = page.first(PHOTOMETRIC, 0), page.first(COMPRESSION, 1)
    each = str(bits[0]) if len(set(bits)) == 1 else ", ".join(map(str, bits))
    return (
        f"TIFF with {each} bits per sample, {numbers}, {samples} sample{'s' if samples > 1 else ''} per pixel, "
        f"{PHOTOMETRICS.get(colour, f'photometric interpretation {colour}')}, "
        f"compression {COMPRESSIONS.get(packed, str(packed))}"
    )


def has_scale(page: TiffDirectory) -> bool:
    """Whether samples have a fixed scale: true except for signed integers and integers of more than 16 bits."""
    return (page.first(SAMPLE_FORMAT, 1) != 2 and page.first(BITS, 1) <= 16) or page.first(SAMPLE_FORMAT, 1) == 3


def tile_size(page: TiffDirectory) -> tuple[int, int]:
    """Returns (width, height) of tiles in px, (0, 0) if there are none; a tile may be larger than its image."""
    return page.first(TILE_WIDTH, 0), page.first(TILE_HEIGHT, 0)


def holes(data: bytes) -> bool:
    """Whether strips or tiles of the first picture are not stored, as in a sparse file."""
    try:
        reader = Reader(data)
        found = (reader.numbers(reader.start, tag) for tag in (STRIP_BYTES, TILE_BYTES))
        return any(sizes is not None and not sizes.all() for sizes in found)
    except DamagedTiffError:
        return True


def colours(data: bytes) -> np.ndarray | None:
    """The palette of the first picture, uint8 (P, 3); None if it has none that is whole."""
    try:
        reader = Reader(data)
        found = reader.numbers(reader.start, COLOUR_MAP)
    except DamagedTiffError:
        return None
    return None if found is None or len(found) % 3 else (found.reshape(3, -1).T // 256).astype(np.uint8)


def first_page(data: bytes) -> TiffDirectory | None:
    """Reads the first directory; None if it cannot be read."""
    try:
        reader = Reader(data)
        return reader.directory(reader.start)
    except DamagedTiffError:
        return None


def with_black_as_zero(data: bytes, page: TiffDirectory) -> bytes:
    """Changes the photometric interpretation to one that Pillow can open; the caller must invert the pixels."""
    offset = page.value_offsets[PHOTOMETRIC]
    black_is_zero = struct.pack(Reader(data).order + "H", 1)
    return data[:offset] + black_is_zero + data[offset + 2 :]


def pages(data: bytes) -> int:
    """Counts images without thumbnails, up to `MAX_PAGES`."""
    try:
        reader = Reader(data)
        return sum(_is_page(reader, offset) for offset in reader.offsets())
    except DamagedTiffError:
        return 1


def _is_page(reader: Reader, offset: int) -> bool:
    try:
        return not reader.directory(offset, FIRST_TAGS).first(SUBFILE, 0) & 1
    except DamagedTiffError:
        return True
