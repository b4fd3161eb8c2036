"""Names in a zip that are flagged as UTF-8 and are not: without the flag they are read as code page 437, all bytes of
which are letters. The library refuses a whole zip for one such name."""

import io
import struct
from typing import Any

ENTRY, ENTRY_BYTES = b"PK\x01\x02", 46  # of the directory at the end: signature, and length before the name
HEADER, HEADER_BYTES = b"PK\x03\x04", 30  # likewise of the header before each member
FLAGS, LENGTHS = struct.Struct("<H"), struct.Struct("<HHH")
FLAGS_AT, LENGTHS_AT = 8, 28  # bytes into an entry: its flags; lengths of its name, extra field and comment
HEADER_FLAGS_AT, HEADER_NAME_AT = 6, 26  # likewise into a header: its flags; length of its name
IS_UTF8 = 0x800


class WithoutFalseFlags(io.RawIOBase):
    """A zip in which no name that is no UTF-8 is flagged as such."""

    def __init__(self, handle: Any) -> None:
        """Around an open file, which stays open."""
        self._handle, self.reads_directory = handle, True

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return int(self._handle.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves there."""
        return int(self._handle.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        """Bytes of the file; of headers, and of the directory while `reads_directory`, with the flags taken away."""
        data = bytes(self._handle.read(-1 if size is None else size))
        if self.reads_directory and data.startswith(ENTRY):
            return without_false_flags(data)
        if size == HEADER_BYTES == len(data) and data.startswith(HEADER):
            return self._header(data)
        return data

    def _header(self, data: bytes) -> bytes:
        """A header, whose name comes next."""
        (flags,) = FLAGS.unpack_from(data, HEADER_FLAGS_AT)
        (name_bytes,) = FLAGS.unpack_from(data, HEADER_NAME_AT)
        place = self.tell()
        name = bytes(self._handle.read(name_bytes))
        self.seek(place)
        if not flags & IS_UTF8 or _is_utf8(name):
            return data
        made = bytearray(data)
        FLAGS.pack_into(made, HEADER_FLAGS_AT, flags & ~IS_UTF8)
        return bytes(made)


def without_false_flags(directory: bytes) -> bytes:
    """A directory in which only names that are UTF-8 are flagged so; ends where the entries do."""
    made, place = bytearray(directory), 0
    while directory.startswith(ENTRY, place) and place + ENTRY_BYTES <= len(directory):
        (flags,) = FLAGS.unpack_from(directory, place + FLAGS_AT)
        name_bytes, extra_bytes, comment_bytes = LENGTHS.unpack_from(directory, place + LENGTHS_AT)
        name = directory[place + ENTRY_BYTES : place + ENTRY_BYTES + name_bytes]
        if flags & IS_UTF8 and not _is_utf8(name):
            FLAGS.pack_into(made, place + FLAGS_AT, flags & ~IS_UTF8)
        place += ENTRY_BYTES + name_bytes + extra_bytes + comment_bytes
    return bytes(made)


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
