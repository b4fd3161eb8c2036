"""Reads the headers of a tar strictly, like tar itself, including those of concatenated tars."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import IO, Any

from raydetect.archives.formats.zip import REPAIR
from raydetect.archives.name_limits import FILE_BYTES, MAX_NAME_BYTES, NameCount
from raydetect.archives.samples import Entry
from raydetect.errors import ArchiveError, RaydetectError
from raydetect.left_out import LeftOutCount

BLOCK = 512
GLOBAL, GNU_NAMES = tarfile.XGLTYPE, (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
LONG = (GLOBAL, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, *GNU_NAMES)  # headers of variable length
MAX_GLOBAL_BYTES = 1 << 20  # total of global headers, which stay in memory
DRAIN_BYTES = 1 << 20
Keep = Callable[[tarfile.TarFile, tarfile.TarInfo], None]


class _StrictTar(tarfile.TarFile):
    """A tar with facts from its headers beyond the members."""

    bytes_after_end = 0
    is_several = False
    global_bytes = 0


class _StrictTarInfo(tarfile.TarInfo):
    """Raises on a damaged or missing header after a member, which the standard library treats as the end.

    A tar ends with blocks of zeros, which distinguishes a complete tar from one truncated between two members. After
    the zeros comes another tar, which GNU tar reads with --ignore-zeros, or other bytes, which are counted.

    Headers of more than `MAX_NAME_BYTES` (mostly of long names) are skipped, so that their member has no name.

    Attributes:
        skipped_bytes: size of a skipped header before this one; 0 if none was skipped.
    """

    skipped_bytes = 0

    @classmethod
    def fromtarfile(cls, tar: Any) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return cls._of_next_tar(tar)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged member header ({error})") from None
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("truncated between two members: no end-of-archive block") from None

    def _proc_member(self, tar: Any) -> "_StrictTarInfo":
        if self.type == GLOBAL:
            tar.global_bytes += self.size
            if tar.global_bytes > MAX_GLOBAL_BYTES:
                raise tarfile.ReadError(f"global headers of more than {MAX_GLOBAL_BYTES:,} bytes")
        elif self.type in LONG and self.size > MAX_NAME_BYTES:
            return self._after_skipping(tar)
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]

    def _after_skipping(self, tar: Any) -> "_StrictTarInfo":
        tar.fileobj.seek(tar.fileobj.tell() + self._block(self.size))  # type: ignore[attr-defined]
        try:
            member = self.fromtarfile(tar)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"nothing follows a header of {self.size:,} bytes") from error
        member.offset, member.skipped_bytes = self.offset, self.size
        return member

    def _proc_sparse(self, tar: Any) -> "_StrictTarInfo":
        """Skips the map of a sparse member, which is never read and may be as long as the tar."""
        member: Any = self
        _, is_extended, size = member._sparse_structs
        while is_extended:
            is_extended = bool(tar.fileobj.read(BLOCK)[504])
        member.sparse, member.offset_data = [], tar.fileobj.tell()
        tar.offset = member.offset_data + member._block(self.size)
        member.size = size
        return self

    def _proc_gnusparse_10(self, member: Any, headers: Any, tar: Any) -> None:
        member.sparse = []

    @classmethod
    def _of_next_tar(cls, tar: Any) -> "_StrictTarInfo":
        while True:
            offset, block = tar.fileobj.tell(), tar.fileobj.read(BLOCK)
            if not block:
                raise tarfile.EOFHeaderError("end of file")  # type: ignore[attr-defined]
            if block.strip(b"\0"):
                break
        try:
            member: Any = cls.frombuf(block, tar.encoding, tar.errors)
        except tarfile.HeaderError:
            tar.bytes_after_end = len(block) + _remaining_bytes(tar.fileobj)
            raise tarfile.EOFHeaderError("end of the last tar") from None  # type: ignore[attr-defined]
        tar.is_several = True
        member.offset = offset
        return member._proc_member(tar)  # type: ignore[no-any-return]


def _remaining_bytes(stream: Any) -> int:
    total = 0
    while block := stream.read(DRAIN_BYTES):
        total += len(block)
    return total


@dataclass(slots=True)
class TarHeaders:
    """The result of one pass over the headers of a tar.

    Attributes:
        entries: all files, in order.
        broken: message of an ArchiveError if the tar is damaged after the entries, else "".
        bytes_after_end: number of bytes after the end of the last tar.
        is_several: whether the file consists of concatenated tars.
    """

    entries: list[Entry] = field(default_factory=list)
    broken: str = ""
    bytes_after_end: int = 0
    is_several: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether fsspec's filesystem can read all of it: one intact tar without bytes after it."""
        return not (self.is_several or self.broken or self.bytes_after_end)

    def finish(self, left_out: LeftOutCount) -> None:
        """Counts bytes after the tar.

        Raises:
            ArchiveError: the tar is damaged.
        """
        if self.bytes_after_end:
            left_out.add("bytes_after_end", f"{self.bytes_after_end:,} bytes")
        if self.broken:
            raise ArchiveError(self.broken)


def read_headers(
    stream: IO[bytes], uri: str, mode: str, stop: float = float("inf"), keep: Keep | None = None
) -> TarHeaders:
    """Reads the headers of a tar.

    Args:
        stream: the tar, positioned at the first header.
        uri: URI of the tar, for messages.
        mode: "r:" for a seekable stream, "r|" for others.
        stop: byte offset of the first header that is not read.
        keep: called with (tar, header) of every file while the stream is positioned at its data.

    Raises:
        StorageError: the storage failed.
    """
    headers, last, count = TarHeaders(), "its start", NameCount(uri)
    try:
        with _StrictTar.open(
            fileobj=stream, mode=mode, tarinfo=_StrictTarInfo, encoding="utf-8", errors="surrogateescape"
        ) as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None and info.offset < stop:
                tar.members.clear()  # the library keeps a kilobyte for each
                last = info.name
                if not info.isdir():
                    entry = _entry(info)
                    count.add(FILE_BYTES + len(entry.name))
                    headers.entries.append(entry)
                    if keep is not None:
                        keep(tar, info)
            headers.bytes_after_end, headers.is_several = tar.bytes_after_end, tar.is_several
    except ArchiveError as error:
        headers.broken = str(error)
    except RaydetectError:
        raise
    except Exception as error:  # the library raises anything on invalid bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        headers.broken = f"{uri}: broken after {last!r} ({reason}). {REPAIR}"
    return headers


def _entry(info: Any) -> Entry:
    if info.skipped_bytes:
        name = f"{info.name}...@{info.offset}"
        size = f"{info.skipped_bytes:,} bytes, more than {MAX_NAME_BYTES:,}"
        message = f"its header has {size}, so its name was not read. Shorten the name."
        return Entry(name, info.offset_data, info.size, name, "unsafe_name", message, is_named=False)
    entry = Entry(info.name, info.offset_data, info.size, info.name)
    if info.issparse():
        return replace(entry, status="corrupt", error="is a sparse member. Pack it without --sparse.")
    if not info.isreg():
        return replace(entry, status="unsafe_name", error="is a link or device, not a file. Pack the file.")
    return entry
