"""zip: the directory at the end names every member, so a large one can be read in parts."""

import zipfile
from collections.abc import Iterator

from raydetect.archives.base import listed_file
from raydetect.archives.directory import Directory, MemberReader
from raydetect.archives.formats.zip_names import WithoutFalseFlags
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
        try:
            self._opened = self._open(handle)
        except RaydetectError:
            raise
        except Exception as error:  # whatever hostile bytes make the library raise
            raise ArchiveError(f"{uri}: not a zip with a readable directory ({error}). {REPAIR}") from None
        infos = sorted(self._opened.infolist(), key=lambda info: info.header_offset)
        self._infos = {info.header_offset: info for info in infos}
        self.entries = [_entry(info) for info in infos if not _is_folder(info)]

    def _open(self, handle: StoredFile) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(handle)
        except UnicodeDecodeError:
            self.scheme = ""  # fsspec's filesystem refuses it as well
            handle.seek(0)
            wrapped = WithoutFalseFlags(handle)
            opened = zipfile.ZipFile(wrapped)
            wrapped.reads_directory = False
            return opened

    def read(self, entry: Entry) -> bytes:
        """The bytes of a member.

        Raises:
            MemberError: it is damaged, or larger than its directory says.
            StorageError: the storage failed.
        """
        try:
            with self._opened.open(self._infos[entry.place]) as member:
                data = member.read(entry.size + 1)
        except RaydetectError:
            raise
        except Exception as error:  # whatever hostile bytes make the library raise
            raise MemberError("corrupt", f"cannot be unpacked ({error}). Pack it again.") from None
        if len(data) != entry.size:
            raise MemberError("corrupt", f"is not of the {entry.size:,} bytes that its directory says. Pack it again.")
        return data

    def finish(self, left_out: LeftOutCount) -> None:
        """A zip ends with its directory."""


def _entry(info: zipfile.ZipInfo) -> Entry:
    name = info.filename.replace("\\", "/") if info.create_system in WINDOWS else info.filename
    if info.flag_bits & ENCRYPTED:
        error = "is encrypted. Pack it without a password."
        return Entry(name, info.header_offset, info.file_size, info.filename, "corrupt", error)
    return Entry(name, info.header_offset, info.file_size, info.filename)


def _is_folder(info: zipfile.ZipInfo) -> bool:
    name = info.filename.replace("\\", "/") if info.create_system in WINDOWS else info.filename
    return name.endswith("/")
