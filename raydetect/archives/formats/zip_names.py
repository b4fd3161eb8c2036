"""The directory at the end of a zip, looked at before the library takes it: it must not name more than can be held in
memory, and names that are flagged as UTF-8 and are not lose their flag. Those are then read as code page 437, all bytes
of which are letters; the library refuses a whole zip for one such name."""

import io
import struct
from typing import Any

from raydetect.archives.name_limits import FILE_BYTES, NameCount
from raydetect.errors import ArchiveError

ENTRY, ENTRY_BYTES = b"PK\x01\x02", 46  # of the directory at the end: signature, and length before the name
HEADER, HEADER_BYTES = b"PK\x03\x04", 30  # likewise of the header before each member
FLAGS, LENGTHS = struct.Struct("<H"), struct.Struct("<HHH")
FLAGS_AT, LENGTHS_AT = 8, 28  # bytes into an entry: its flags; lengths of its name, extra field and comment
HEADER_FLAGS_AT, HEADER_NAME_AT = 6, 26  # likewise into a header: its flags; length of its name
IS_UTF8 = 0x800
MAX_DIRECTORY_BYTES = 512 << 20
INFO_BYTES = 500  # that the library holds of a file beside its name


class LookedAt(io.RawIOBase):
    """A zip whose directory is small enough, and in which no name that is no UTF-8 is flagged as such.

    Attributes:
        reads_directory: whether what is read may be the directory.
        has_false_flags: whether a name of the directory lost its flag.
    """

    def __init__(self, handle: Any, uri: str) -> None:
        """Around an open file, which stays open."""
        self._handle, self._uri, self.reads_directory, self.has_false_flags = handle, uri, True, False

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
        """Bytes of the file; of headers, and of the directory while `reads_directory`, with false flags taken away.

        Raises:
            ArchiveError: the directory is too large.
        """
        size = -1 if size is None else size
        if self.reads_directory and size > MAX_DIRECTORY_BYTES:
            message = f"is of {size:,} bytes, more than {MAX_DIRECTORY_BYTES:,}. Pack fewer files into one zip."
            raise ArchiveError(f"{self._uri}: its directory {message}")
        data = bytes(self._handle.read(size))
        if self.reads_directory and data.startswith(ENTRY):
            bare = without_false_flags(data, NameCount(self._uri))
            self.has_false_flags = bare != data
            return bare
        if self.has_false_flags and size == HEADER_BYTES == len(data) and data.startswith(HEADER):
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


def without_false_flags(directory: bytes, count: NameCount) -> bytes:
    """A directory in which only names that are UTF-8 are flagged so.

    Raises:
        ArchiveError: it names too much.
    """
    made, place = bytearray(directory), 0
    while directory.startswith(ENTRY, place) and place + ENTRY_BYTES <= len(directory):
        (flags,) = FLAGS.unpack_from(directory, place + FLAGS_AT)
        name_bytes, extra_bytes, comment_bytes = LENGTHS.unpack_from(directory, place + LENGTHS_AT)
        count.add(FILE_BYTES + INFO_BYTES + 2 * name_bytes + extra_bytes + comment_bytes)
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
