"""zip files; large ones are read in parts, since the directory at the end lists all members."""

import bz2
import copy
import io
import zipfile
import zlib
from collections.abc import Iterator

from raydetect.archives.base import listed_file
from raydetect.archives.directory import ContainerDirectory, MemberReader
from raydetect.archives.formats.zip_names import CheckedZip
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
WINDOWS = (0, 10)  # DOS and NTFS: some programs write backslashes between folders


def read_zip(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    """Yields the members of a zip shard, in order of their position in the file.

    Raises:
        ArchiveError: the directory cannot be read.
        StorageError: the storage failed.
    """
    with storage.open(shard.uri, listed_file(shard)) as handle:
        directory = ZipDirectory(handle, shard.uri)
        yield from MemberReader(directory, source, naming, left_out).members(shard.span)


class ZipDirectory(ContainerDirectory):
    """The files of a zip."""

    scheme = "zip"

    def __init__(self, handle: StoredFile, uri: str) -> None:
        """Reads the directory at the end.

        Raises:
            ArchiveError: the directory is damaged, missing or too large.
        """
        self.uri = uri
        checked = CheckedZip(handle, uri)
        try:
            self._opened = zipfile.ZipFile(checked)
        except RaydetectError:
            raise
        except Exception as error:  # the library raises anything on invalid bytes
            raise ArchiveError(f"{uri}: not a zip with a readable directory ({error}). {REPAIR}") from None
        checked.reads_directory = False
        if checked.has_false_flags:
            self.scheme = ""  # fsspec's filesystem cannot read it
        infos = sorted(self._opened.infolist(), key=lambda info: info.header_offset)
        self._infos = {info.header_offset: info for info in infos}
        self.entries = [_entry(info) for info in infos if not _is_folder(info)]

    def read(self, entry: Entry) -> bytes:
        """Reads a member.

        Raises:
            MemberError: the member is damaged, or its size differs from the directory's entry.
            StorageError: the storage failed.
        """
        try:
            data = _read(self._opened, self._infos[entry.place], entry.size + 1)
        except RaydetectError:
            raise
        except Exception as error:  # the library raises anything on invalid bytes
            raise MemberError("corrupt", f"cannot be unpacked ({error}). Pack it again.") from None
        if len(data) != entry.size:
            raise MemberError(
                "corrupt", f"does not have the {entry.size:,} bytes stated in the directory. Pack it again."
            )
        return data

    def finish(self, left_out: LeftOutCount) -> None:
        """Does nothing: a zip ends with its directory."""


def _read(opened: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> bytes:
    """Reads at most `size` bytes of a member, in memory limited by `size`."""
    if info.compress_type == zipfile.ZIP_BZIP2:
        return _read_bzip2(opened, info, size)
    with opened.open(info) as member:
        if info.compress_type != zipfile.ZIP_LZMA:
            return member.read(size)
        data = io.BytesIO()  # the library decompresses all that it reads, so read little at a time
        while data.tell() < size and (piece := member.read(min(PIECE_BYTES, size - data.tell()))):
            data.write(piece)
        return data.getvalue()


def _read_bzip2(opened: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> bytes:
    """Reads like `_read`, but decompresses here with a limit, as the library has none for bzip2."""
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
