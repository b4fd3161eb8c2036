"""Checks the directory of a zip before the library reads it.

The names must fit in memory. Names that are flagged as UTF-8 but are not valid lose the flag and are read as code page
437, in which all bytes are valid; otherwise the library would reject the whole zip.
"""

import io
import struct
from typing import Any

from raydetect.archives.name_limits import FILE_BYTES, NameCount
from raydetect.errors import ArchiveError

ENTRY, ENTRY_BYTES = b"PK\x01\x02", 46  # directory entry: signature, and length before the name
HEADER, HEADER_BYTES = b"PK\x03\x04", 30  # header before each member: the same
FLAGS, LENGTHS = struct.Struct("<H"), struct.Struct("<HHH")
FLAGS_AT, LENGTHS_AT = 8, 28  # offsets in an entry: flags; lengths of name, extra field and comment
HEADER_FLAGS_AT, HEADER_NAME_AT = 6, 26  # offsets in a header: flags; length of name
IS_UTF8 = 0x800
MAX_DIRECTORY_BYTES = 512 << 20
INFO_BYTES = 500  # memory of the library for a file, without its name


class CheckedZip(io.RawIOBase):
    """A zip file with limited directory size, in which only valid UTF-8 names are flagged as UTF-8.

    Attributes:
        reads_directory: whether the bytes read may be the directory.
        has_false_flags: whether a name in the directory lost its flag.
    """

    def __init__(self, handle: Any, uri: str) -> None:
        """Wraps an open file and does not close it."""
        self._handle, self._uri, self.reads_directory, self.has_false_flags = handle, uri, True, False

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the offset of the next byte."""
        return int(self._handle.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to an offset and returns it."""
        return int(self._handle.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        """Reads bytes; removes false flags from headers, and from the directory while `reads_directory` is set.

        Raises:
            ArchiveError: the directory is too large.
        """
        size = -1 if size is None else size
        if self.reads_directory and size > MAX_DIRECTORY_BYTES:
            message = f"has {size:,} bytes, more than {MAX_DIRECTORY_BYTES:,}. Pack fewer files into one zip."
            raise ArchiveError(f"{self._uri}: its directory {message}")
        data = bytes(self._handle.read(size))
        if self.reads_directory and data.startswith(ENTRY):
            fixed = without_false_flags(data, NameCount(self._uri))
            self.has_false_flags = fixed != data
            return fixed
        if self.has_false_flags and size == HEADER_BYTES == len(data) and data.startswith(HEADER):
            return self._header(data)
        return data

    def _header(self, data: bytes) -> bytes:
        """Removes a false flag from a header; reads ahead to the name."""
        (flags,) = FLAGS.unpack_from(data, HEADER_FLAGS_AT)
        (name_bytes,) = FLAGS.unpack_from(data, HEADER_NAME_AT)
        start = self.tell()
        name = bytes(self._handle.read(name_bytes))
        self.seek(start)
        if not flags & IS_UTF8 or _is_utf8(name):
            return data
        fixed = bytearray(data)
        FLAGS.pack_into(fixed, HEADER_FLAGS_AT, flags & ~IS_UTF8)
        return bytes(fixed)


def without_false_flags(directory: bytes, count: NameCount) -> bytes:
    """Removes the UTF-8 flag from names that are not valid UTF-8.

    Raises:
        ArchiveError: the names need too much memory.
    """
    fixed, start = bytearray(directory), 0
    while directory.startswith(ENTRY, start) and start + ENTRY_BYTES <= len(directory):
        (flags,) = FLAGS.unpack_from(directory, start + FLAGS_AT)
        name_bytes, extra_bytes, comment_bytes = LENGTHS.unpack_from(directory, start + LENGTHS_AT)
        count.add(FILE_BYTES + INFO_BYTES + 2 * name_bytes + extra_bytes + comment_bytes)
        name = directory[start + ENTRY_BYTES : start + ENTRY_BYTES + name_bytes]
        if flags & IS_UTF8 and not _is_utf8(name):
            FLAGS.pack_into(fixed, start + FLAGS_AT, flags & ~IS_UTF8)
        start += ENTRY_BYTES + name_bytes + extra_bytes + comment_bytes
    return bytes(fixed)


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
