"""zip: the directory at the end names every member, so a large one can be read in parts."""

import bz2
import copy
import io
import zipfile
import zlib
from collections.abc import Iterator

from raydetect.archives.base import listed_file
from raydetect.archives.directory import Directory, MemberReader
from raydetect.archives.formats.zip_names import LookedAt
from raydetect.archives.path_patterns import Naming
from raydetect.archives.samples import Entry
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError, MemberError, RaydetectError
from raydetect.left_out import LeftOutCount
from raydetect.records import Member, Shard
from raydetect.storage import Storage, StoredFile

SUFFIXES = (".zip",)
REPAIR = "Upload it again."
ENCRYPTED = 0x1
PIECE_BYTES, UNPACKED_BYTES = 4096, 1 << 20
WINDOWS = (0, 10)  # DOS and NTFS: packers that write backslashes between folders


def read_zip(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    """Members of a zip shard, in order of their place in the file.

    Raises:
        ArchiveError: the directory cannot be read.
        StorageError: the storage failed.
    """
    with storage.open(shard.uri, listed_file(shard)) as handle:
        directory = ZipDirectory(handle, shard.uri)
        yield from MemberReader(directory, source, naming, left_out).members(shard.span)


class ZipDirectory(Directory):
    """The files of a zip."""

    scheme = "zip"

    def __init__(self, handle: StoredFile, uri: str) -> None:
        """Reads the directory at the end.

        Raises:
            ArchiveError: it is damaged, or not there.
        """
        self.uri = uri
        looked_at = LookedAt(handle, uri)
        try:
            self._opened = zipfile.ZipFile(looked_at)
        except RaydetectError:
            raise
        except Exception as error:  # whatever hostile bytes make the library raise
            raise ArchiveError(f"{uri}: not a zip with a readable directory ({error}). {REPAIR}") from None
        looked_at.reads_directory = False
        if looked_at.has_false_flags:
            self.scheme = ""  # fsspec's filesystem refuses it
        infos = sorted(self._opened.infolist(), key=lambda info: info.header_offset)
        self._infos = {info.header_offset: info for info in infos}
        self.entries = [_entry(info) for info in infos if not _is_folder(info)]

    def read(self, entry: Entry) -> bytes:
        """The bytes of a member.

        Raises:
            MemberError: it is damaged, or larger than its directory says.
            StorageError: the storage failed.
        """
        try:
            data = _read(self._opened, self._infos[entry.place], entry.size + 1)
        except RaydetectError:
            raise
        except Exception as error:  # whatever hostile bytes make the library raise
            raise MemberError("corrupt", f"cannot be unpacked ({error}). Pack it again.") from None
        if len(data) != entry.size:
            raise MemberError("corrupt", f"is not of the {entry.size:,} bytes that its directory says. Pack it again.")
        return data

    def finish(self, left_out: LeftOutCount) -> None:
        """A zip ends with its directory."""


def _read(opened: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> bytes:
    """At most `size` bytes of a member, in no more memory whatever it unpacks to."""
    if info.compress_type == zipfile.ZIP_BZIP2:
        return _read_bzip2(opened, info, size)
    with opened.open(info) as member:
        if info.compress_type != zipfile.ZIP_LZMA:
            return member.read(size)
        data = io.BytesIO()  # the library unpacks all that it reads, so that is little
        while data.tell() < size and (piece := member.read(min(PIECE_BYTES, size - data.tell()))):
            data.write(piece)
        return data.getvalue()


def _read_bzip2(opened: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> bytes:
    """As `_read`: a few bytes may become any number, so the library reads them as they are and does not unpack them."""
    packed = copy.copy(info)
    packed.compress_type, packed.file_size = zipfile.ZIP_STORED, info.compress_size
    del packed.CRC
    data, unpacker = io.BytesIO(), bz2.BZ2Decompressor()
    with opened.open(packed) as member:
        while data.tell() < size and not unpacker.eof:
            piece = member.read(PIECE_BYTES) if unpacker.needs_input else b""
            if not piece and unpacker.needs_input:
                break
            data.write(unpacker.decompress(piece, min(UNPACKED_BYTES, size - data.tell())))
    if zlib.crc32(data.getbuffer()) != info.CRC:
        raise zipfile.BadZipFile("bad CRC-32")
    return data.getvalue()


def _entry(info: zipfile.ZipInfo) -> Entry:
    name = info.filename.replace("\\", "/") if info.create_system in WINDOWS else info.filename
    if info.flag_bits & ENCRYPTED:
        error = "is encrypted. Pack it without a password."
        return Entry(name, info.header_offset, info.file_size, info.filename, "corrupt", error)
    return Entry(name, info.header_offset, info.file_size, info.filename)


def _is_folder(info: zipfile.ZipInfo) -> bool:
    name = info.filename.replace("\\", "/") if info.create_system in WINDOWS else info.filename
    return name.endswith("/")
