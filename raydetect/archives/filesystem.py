"""The fsspec filesystem for `member://NAME::URL`, a file in a container that fsspec's own filesystems cannot open.

NAME is percent-encoded, so it may contain any bytes. The container is a tar with any supported compression,
concatenated tars, a zip, or a local folder with file names that are not UTF-8. If several files have the same name,
the last one is opened. `tarzst://` is the former name of the scheme; its URLs contain names without encoding.
"""

import io
import logging
import os
import tempfile
from typing import Any
from urllib.parse import unquote_to_bytes

import fsspec
from fsspec.archive import AbstractArchiveFileSystem

from raydetect.archives.directory import ContainerDirectory
from raydetect.archives.formats.decompression import is_compressed, unpacked
from raydetect.archives.formats.tar import COPY_BYTES, PlainTar
from raydetect.archives.formats.zip import ZipDirectory
from raydetect.archives.samples import Entry, tidy
from raydetect.errors import RaydetectError

log = logging.getLogger("raydetect.archives")
ZIP = b"PK"
IN_MEMORY_BYTES = 64 << 20
MAX_OPENED_BYTES = 2 << 30


class MemberFileSystem(AbstractArchiveFileSystem):  # type: ignore[misc]
    """Read-only filesystem of the files in a container."""

    root_marker = ""
    protocol = ("member", "tarzst")
    cachable = False

    def __init__(
        self,
        fo: Any,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Opens the container at `fo`, a path or URL (fsspec's chaining passes it)."""
        super().__init__(**kwargs)
        self._folder = fo if target_protocol in (None, "file") and isinstance(fo, str) and os.path.isdir(fo) else None
        self._entries: dict[str, Entry] = {}
        self._directory: ContainerDirectory | None = None
        if self._folder is None:
            self._file = fsspec.open(fo, protocol=target_protocol, **(target_options or {})).open()
            self._directory = _directory(self._file, str(fo))
            self._entries = {tidy(entry.raw): entry for entry in self._directory.entries}

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        text = str(path)
        for protocol in cls.protocol:
            text = text.removeprefix(f"{protocol}://")
        return text

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        """Opens a file.

        Raises:
            FileNotFoundError: no file has this name.
            OSError: the file cannot be read.
        """
        raw = self._strip_protocol(path)
        if self._folder is not None:
            return open(os.path.join(os.fsencode(self._folder), unquote_to_bytes(raw)), "rb")
        names = (unquote_to_bytes(raw).decode("utf-8", "surrogateescape"), raw)
        entry = next((self._entries[tidy(name)] for name in names if tidy(name) in self._entries), None)
        if mode != "rb" or entry is None or self._directory is None:
            raise FileNotFoundError(path)
        if entry.size > MAX_OPENED_BYTES:
            raise OSError(f"{path}: has {entry.size:,} bytes; files of more than {MAX_OPENED_BYTES:,} cannot be opened")
        try:
            return io.BytesIO(self._directory.read(entry))
        except RaydetectError as error:
            raise OSError(f"{path}: {error}") from error

    def _get_dirs(self) -> None:
        """Sets an empty listing: files are opened by name only."""
        self.dir_cache: dict[str, Any] = {}


def _directory(file: Any, uri: str) -> ContainerDirectory:
    """Returns the directory of a container. A compressed tar is decompressed first, so that it can be sought."""
    start = file.read(4)
    file.seek(0)
    if start.startswith(ZIP):
        return ZipDirectory(file, uri)
    if not is_compressed(start):
        return PlainTar(file, uri)
    plain = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, prefix="raydetect-")  # noqa: SIM115 (kept by the directory)
    stream = unpacked(file, start)
    try:
        while piece := stream.read1(COPY_BYTES):
            plain.write(piece)
    except RaydetectError:
        raise
    except Exception as error:  # files before the damage can still be opened
        log.warning("%s: is damaged (%s); only files before the damage can be opened", uri, error)
    plain.seek(0)
    return PlainTar(plain, uri)
