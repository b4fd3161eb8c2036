"""tar, tar.gz and tar.zst: the first pass reads the headers, the second the images.

All names are needed before the first image, because the last of several members with the same name is used, and
sidecars may be anywhere. In a local tar the first pass seeks from header to header. A remote tar of at most SPOOL_BYTES
is first copied to a temporary file, so that it is downloaded once; larger ones, and parts of a tar with an index, are
downloaded twice.
"""

import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from raydetect.archives.base import listed_file
from raydetect.archives.directory import ContainerDirectory, MemberReader
from raydetect.archives.formats.decompression import is_compressed, unpacked
from raydetect.archives.formats.tar_headers import TarHeaders, read_headers
from raydetect.archives.formats.tar_index import byte_range_of, compare, read_index
from raydetect.archives.formats.zip import REPAIR
from raydetect.archives.path_patterns import Naming
from raydetect.archives.samples import MAX_SIDECAR_BYTES, Entry, is_sidecar
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError, MemberError, RaydetectError, StorageError
from raydetect.left_out import LeftOutCount
from raydetect.records import Member, Shard
from raydetect.storage import Storage, StoredFile

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
COPY_BYTES = 1 << 20
SPOOL_BYTES = 2 << 30
KEPT_SIDECAR_BYTES = 64 << 20
ITS_START = "its start"
OTHERS = {b"BZh": "bzip2", b"PK\3\4": "a zip", b"\xfd7zX": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
SEEKABLE = ("file://", "memory://")


def read_tar(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    """Yields the members of a tar shard.

    Raises:
        ArchiveError: the tar is damaged, or its index does not match.
        StorageError: the storage failed.
    """
    with storage.open(shard.uri, listed_file(shard)) as stored:
        if shard.span is not None:
            directory = _part(shard, shard.span, stored, storage)
            yield from MemberReader(directory, source, naming, left_out).members(shard.span)
            return
        with _seekable(stored) as handle:
            directory = tar_directory(handle, shard.uri)
            yield from MemberReader(directory, source, naming, left_out).members(None)


def tar_directory(handle: IO[bytes], uri: str) -> ContainerDirectory:
    """Returns the directory of a tar; its first bytes show the compression.

    Args:
        handle: the seekable file, positioned at its first byte.
        uri: URI of the tar.

    Raises:
        ArchiveError: the file is not a tar or has an unsupported compression.
    """
    start = handle.read(4)
    handle.seek(0)
    other = next((name for magic, name in OTHERS.items() if start.startswith(magic)), None)
    if other is not None:
        raise ArchiveError(
            f"{uri}: is not a tar but {other}, according to its first bytes. Pack it as tar, tar.gz, tar.zst or zip."
        )
    return CompressedTar(handle, uri, start) if is_compressed(start) else PlainTar(handle, uri)


@contextmanager
def _seekable(stored: StoredFile) -> Iterator[IO[bytes]]:
    """Yields the file itself if seeking is cheap or the file is very large, else a temporary copy on the local disk."""
    size = stored.size_bytes
    if stored.uri.startswith(SEEKABLE) or (size is not None and size > SPOOL_BYTES):
        yield stored  # type: ignore[misc]
        return
    with tempfile.TemporaryFile(prefix="raydetect-tar-") as copy:
        try:
            shutil.copyfileobj(stored, copy, COPY_BYTES)
        except OSError as error:  # from the disk; errors of the storage are StorageErrors
            folder = tempfile.gettempdir()
            message = (
                f"{folder}: cannot hold a copy of {stored.uri} ({error.strerror}). Free some space, or set TMPDIR."
            )
            raise StorageError(message) from None
        copy.seek(0)
        yield copy


class PlainTar(ContainerDirectory):
    """An uncompressed tar."""

    def __init__(self, handle: IO[bytes], uri: str, headers: TarHeaders | None = None) -> None:
        """Reads the headers unless they are given."""
        headers = headers or read_headers(handle, uri, "r:")
        self.uri, self.entries = uri, headers.entries
        self.scheme = "tar" if uri.endswith(".tar") and headers.is_plain else ""
        self._handle, self._headers, self._good = handle, headers, ITS_START

    def read(self, entry: Entry) -> bytes:
        """Reads a member.

        Raises:
            ArchiveError: the tar is truncated inside the member.
            StorageError: the storage failed.
        """
        self._handle.seek(entry.place)
        data = self._handle.read(entry.size)
        if len(data) != entry.size:
            raise _broken(self.uri, self._good, f"{entry.name!r} has {len(data):,} of {entry.size:,} bytes")
        self._good = repr(entry.name)
        return data

    def finish(self, left_out: LeftOutCount) -> None:
        """Counts bytes after the tar.

        Raises:
            ArchiveError: the tar is damaged after its last member.
        """
        self._headers.finish(left_out)


class CompressedTar(ContainerDirectory):
    """A compressed tar, decompressed once for the headers and again for the images, in bounded memory.

    The first pass keeps up to KEPT_SIDECAR_BYTES of sidecars, because they may come after their image.
    """

    def __init__(self, handle: IO[bytes], uri: str, start: bytes) -> None:
        """Reads the headers."""
        self._kept: dict[int, bytes] = {}
        self._kept_bytes = 0
        self._headers = read_headers(unpacked(handle, start), uri, "r|", keep=self._keep)
        self.uri, self.entries = uri, self._headers.entries
        self.scheme = "tar" if uri.endswith(".tar.gz") and self._headers.is_plain else ""
        handle.seek(0)
        self._plain, self._at, self._last = unpacked(handle, start), 0, -1
        self._last_data, self._good = b"", ITS_START

    def read(self, entry: Entry) -> bytes:
        """Reads a member.

        Raises:
            MemberError: the member is a sidecar that was not kept.
            ArchiveError: the tar is damaged at the member.
            StorageError: the storage failed.
        """
        if entry.place in self._kept:
            return self._kept[entry.place]
        if entry.place == self._last:
            return self._last_data
        if entry.place < self._at or is_sidecar(entry.name):
            message = f"the sidecars of this tar exceed {KEPT_SIDECAR_BYTES >> 20} MiB, so not all were kept"
            raise MemberError("too_many_bytes", message)
        try:
            self._skip(entry.place - self._at)
            self._last_data, self._last = self._plain.read(entry.size), entry.place
        except RaydetectError:
            raise
        except Exception as error:  # decompressors raise anything on invalid bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise _broken(self.uri, self._good, reason) from None
        self._at = entry.place + len(self._last_data)
        if len(self._last_data) != entry.size:
            raise _broken(self.uri, self._good, "it ends early")
        self._good = repr(entry.name)
        return self._last_data

    def finish(self, left_out: LeftOutCount) -> None:
        """Counts bytes after the tar.

        Raises:
            ArchiveError: the tar is damaged after its last member.
        """
        self._headers.finish(left_out)

    def _skip(self, count: int) -> None:
        while count:
            skipped = len(self._plain.read(min(count, COPY_BYTES)))
            if not skipped:
                raise EOFError("it ends early")
            count -= skipped

    def _keep(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        room = KEPT_SIDECAR_BYTES - self._kept_bytes
        if info.isreg() and is_sidecar(info.name) and info.size <= min(MAX_SIDECAR_BYTES, room):
            self._kept[info.offset_data] = (tar.extractfile(info) or io.BytesIO()).read()
            self._kept_bytes += info.size


def _broken(uri: str, good: str, reason: str) -> ArchiveError:
    return ArchiveError(f"{uri}: broken after {good} ({reason}). {REPAIR}")


def _part(shard: Shard, span: tuple[int, int], handle: StoredFile, storage: Storage) -> ContainerDirectory:
    """Returns the files of a tar from its index, checked against the headers in the byte range of this part."""
    components = read_index(shard.index_uri, storage)
    byte_range = byte_range_of(components, span)
    headers = TarHeaders()
    if byte_range.begin != byte_range.stop:
        handle.seek(int(byte_range.begin))
        headers = read_headers(handle, shard.uri, "r:", byte_range.stop)  # type: ignore[arg-type]
    if not headers.broken:
        headers.entries = compare(byte_range, components, headers.entries, shard.uri, shard.index_uri)
    return PlainTar(handle, shard.uri, headers)  # type: ignore[arg-type]
