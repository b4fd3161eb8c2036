"""The headers of a tar, read as tar itself does: strictly, and over several tars one behind the other."""

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
LONG = (GLOBAL, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, *GNU_NAMES)  # headers whose length is free
MAX_GLOBAL_BYTES = 1 << 20  # of all headers that hold for what follows, since they are kept
DRAIN_BYTES = 1 << 20
Keep = Callable[[tarfile.TarFile, tarfile.TarInfo], None]


class _StrictTar(tarfile.TarFile):
    """With what its headers told beside members."""

    bytes_after_end = 0
    is_several = False
    global_bytes = 0


class _StrictTarInfo(tarfile.TarInfo):
    """The standard library takes a damaged header, or none, after a member for the end; here it is an error.

    A tar ends with blocks of zeros, so one that was cut between two members is told from a whole one. What follows the
    zeros is another tar, which GNU tar reads with --ignore-zeros, or bytes that are counted.

    A header that is too long for what it says (a name, mostly) is passed over, and its member has no name.

    Attributes:
        passed_bytes: of headers before this one that were passed over.
    """

    passed_bytes = 0

    @classmethod
    def fromtarfile(cls, tar: Any) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return cls._of_next_tar(tar)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged member header ({error})") from None
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("cut between two members: it has no end-of-archive block") from None

    def _proc_member(self, tar: Any) -> "_StrictTarInfo":
        if self.type == GLOBAL:
            tar.global_bytes += self.size
            if tar.global_bytes > MAX_GLOBAL_BYTES:
                raise tarfile.ReadError(f"global headers of more than {MAX_GLOBAL_BYTES:,} bytes")
        elif self.type in LONG and self.size > MAX_NAME_BYTES:
            return self._passed_over(tar)
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]

    def _passed_over(self, tar: Any) -> "_StrictTarInfo":
        tar.fileobj.seek(tar.fileobj.tell() + self._block(self.size))  # type: ignore[attr-defined]
        try:
            found = self.fromtarfile(tar)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"nothing follows a header of {self.size:,} bytes") from error
        found.offset, found.passed_bytes = self.offset, self.size
        return found

    def _proc_sparse(self, tar: Any) -> "_StrictTarInfo":
        """Passes over the map of a sparse member, which is not read and whose map may be as long as the tar."""
        found: Any = self
        _, is_extended, size = found._sparse_structs
        while is_extended:
            is_extended = bool(tar.fileobj.read(BLOCK)[504])
        found.sparse, found.offset_data = [], tar.fileobj.tell()
        tar.offset = found.offset_data + found._block(self.size)
        found.size = size
        return self

    def _proc_gnusparse_10(self, member: Any, headers: Any, tar: Any) -> None:
        member.sparse = []

    @classmethod
    def _of_next_tar(cls, tar: Any) -> "_StrictTarInfo":
        while True:
            place, block = tar.fileobj.tell(), tar.fileobj.read(BLOCK)
            if not block:
                raise tarfile.EOFHeaderError("end of file")  # type: ignore[attr-defined]
            if block.strip(b"\0"):
                break
        try:
            found: Any = cls.frombuf(block, tar.encoding, tar.errors)
        except tarfile.HeaderError:
            tar.bytes_after_end = len(block) + _drained(tar.fileobj)
            raise tarfile.EOFHeaderError("end of the last tar") from None  # type: ignore[attr-defined]
        tar.is_several = True
        found.offset = place
        return found._proc_member(tar)  # type: ignore[no-any-return]


def _drained(stream: Any) -> int:
    total = 0
    while block := stream.read(DRAIN_BYTES):
        total += len(block)
    return total


@dataclass(slots=True)
class TarHeaders:
    """What one pass over the headers of a tar found.

    Attributes:
        entries: every file, in order.
        broken: the sentence of an ArchiveError when the tar breaks after them, else "".
        bytes_after_end: that are no tar.
        is_several: whether tars follow each other.
    """

    entries: list[Entry] = field(default_factory=list)
    broken: str = ""
    bytes_after_end: int = 0
    is_several: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether fsspec's own filesystem reads all of it: one whole tar."""
        return not (self.is_several or self.broken or self.bytes_after_end)

    def finish(self, left_out: LeftOutCount) -> None:
        """Counts what follows the tar.

        Raises:
            ArchiveError: it breaks.
        """
        if self.bytes_after_end:
            left_out.add("bytes_after_end", f"{self.bytes_after_end:,} bytes")
        if self.broken:
            raise ArchiveError(self.broken)


def read_headers(
    stream: IO[bytes], uri: str, mode: str, stop: float = float("inf"), keep: Keep | None = None
) -> TarHeaders:
    """One pass over the headers.

    Args:
        stream: at the first header.
        uri: of the tar, for messages.
        mode: "r:" of a stream that can seek, "r|" of one that cannot.
        stop: place of the first header that is not read.
        keep: is given (tar, header) of every file while the stream stands at its bytes.

    Raises:
        StorageError: the storage failed.
    """
    found, last, count = TarHeaders(), "its start", NameCount(uri)
    try:
        with _StrictTar.open(
            fileobj=stream, mode=mode, tarinfo=_StrictTarInfo, encoding="utf-8", errors="surrogateescape"
        ) as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None and info.offset < stop:
                tar.members.clear()  # those of the library, a kilobyte each
                last = info.name
                if not info.isdir():
                    entry = _entry(info)
                    count.add(FILE_BYTES + len(entry.name))
                    found.entries.append(entry)
                    if keep is not None:
                        keep(tar, info)
            found.bytes_after_end, found.is_several = tar.bytes_after_end, tar.is_several
    except ArchiveError as error:
        found.broken = str(error)
    except RaydetectError:
        raise
    except Exception as error:  # whatever hostile bytes make the library raise
        reason = " ".join(str(error).split()) or type(error).__name__
        found.broken = f"{uri}: broken after {last!r} ({reason}). {REPAIR}"
    return found


def _entry(info: Any) -> Entry:
    if info.passed_bytes:
        name = f"{info.name}...@{info.offset}"
        message = (
            f"its header is of {info.passed_bytes:,} bytes, more than {MAX_NAME_BYTES:,}, so it has no name. Rename it."
        )
        return Entry(name, info.offset_data, info.size, name, "unsafe_name", message, is_named=False)
    found = Entry(info.name, info.offset_data, info.size, info.name)
    if info.issparse():
        return replace(found, status="corrupt", error="is a sparse member. Pack it without --sparse.")
    if not info.isreg():
        return replace(found, status="unsafe_name", error="is a link or device, not a file. Pack the file.")
    return found
