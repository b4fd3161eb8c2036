"""Opening, listing, reading and writing files by URL."""

import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from raydetect.config import StorageOptions
from raydetect.errors import ChangedError, MissingError, SpecError, StorageError
from raydetect.storage.error_translation import changed, translate
from raydetect.storage.globs import linear_glob
from raydetect.storage.local_files import remove_leftovers, write_local
from raydetect.storage.stored_file import StoredFile
from raydetect.storage.uris import check_uri, normalise_uri

log = logging.getLogger("raydetect.storage")
READ_BLOCK_BYTES = 8 << 20
RANGE_BYTES = 64 << 20
LISTERS = 16
MAX_FOLDERS_AT_ONCE = 256
S3_ATTEMPTS = 3  # botocore's, with growing pauses; s3fs then tries each request up to five times
SYSTEM_FOLDERS = ("lost+found", "$RECYCLE.BIN", "System Volume Information")  # often closed to all but the system


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One listed file.

    Attributes:
        uri: as the storage names it.
        size_bytes: of the file; -1 when it is not known.
        fingerprint: changes when the file is overwritten: its ETag, or a hash of size and time where there is none.
        modified: seconds since 1970, None where the storage does not tell.
        kind: "file", "link" (to a folder, which is not followed) or "other" (a FIFO, socket or device): those are
            never opened.
    """

    uri: str
    size_bytes: int
    fingerprint: str
    modified: float | None = None
    kind: str = "file"

    def is_same(self, other: "FileInfo") -> bool:
        """Whether a file is as it was listed."""
        return self.fingerprint == other.fingerprint


@dataclass(frozen=True, slots=True)
class Storage:
    """Opens, lists, reads and writes files by URL with one set of options. Cheap to build and to pickle.

    No method but `glob` takes a name for a pattern: `out [line 4]` is a folder of that name.
    """

    options: StorageOptions = field(default_factory=StorageOptions)

    def filesystem(self, uri: str) -> tuple[AbstractFileSystem, str]:
        """The fsspec filesystem of a URI and the path in it.

        Raises:
            SpecError: a scheme that is not supported or whose package is not installed.
        """
        if "://" not in uri:
            uri = normalise_uri(uri)
        check_uri(uri)
        scheme = uri.partition("://")[0]
        try:
            fs = fsspec.filesystem(scheme, **self.fsspec_options(uri))
        except (ImportError, ValueError) as error:
            raise SpecError(f"{uri}: {scheme} storage is not available ({error}).") from None
        return fs, fs._strip_protocol(uri)

    def fsspec_options(self, uri: str) -> dict[str, Any]:
        """Keyword arguments with which `fsspec.open(uri, **options)` reaches the same storage."""
        if not uri.startswith("s3://"):
            return {}
        options = self.options
        client: dict[str, Any] = {"region_name": options.region} if options.region else {}
        retries = {"max_attempts": S3_ATTEMPTS, "mode": "standard"}
        made: dict[str, Any] = {
            "anon": options.anon,
            "use_listings_cache": False,
            "max_concurrency": 1,  # s3fs does not repeat a cut body when it reads a file in parts at once
            "config_kwargs": {"retries": retries, "connect_timeout": 10, "read_timeout": 60},
            "client_kwargs": client,
        }
        named = {
            "endpoint_url": options.endpoint_url,
            "key": options.key and options.key.get_secret_value(),
            "secret": options.secret and options.secret.get_secret_value(),
            "token": options.token and options.token.get_secret_value(),
            "profile": options.profile,
        }
        return made | {name: value for name, value in named.items() if value is not None}

    def open(self, uri: str, listed: FileInfo | None = None) -> StoredFile:
        """A seekable binary file for reading; sequential reads fetch ahead in blocks.

        Args:
            uri: of the file.
            listed: the file that is meant. On S3 every request then names its ETag; elsewhere size and time are
                compared here and when the file is closed.

        Raises:
            ChangedError: another file is there than was listed.
            UnreadableError: this file cannot be read.
            StorageError: the storage cannot be reached.
        """
        fs, path = self.filesystem(uri)
        try:
            inner = fs.open(path, "rb", block_size=READ_BLOCK_BYTES)
            found = getattr(inner, "details", None) or fs.info(path)
        except Exception as error:
            raise translate(uri, "read", error) from error
        if listed is not None and not listed.is_same(_file_info(uri, found)):
            self.refuse_changed(listed)
        size = found.get("size") if listed is None or listed.size_bytes < 0 else listed.size_bytes

        def check_end() -> None:
            if listed is not None and not uri.startswith("s3://"):
                self.refuse_changed(listed)

        return StoredFile(inner, uri, None if size is None else int(size), check_end)

    def read(self, uri: str, listed: FileInfo | None = None) -> bytes:
        """The whole file, in one request.

        Args:
            uri: of the file.
            listed: the file that is meant. On S3 the request names its ETag; elsewhere it is looked up again after.

        Raises:
            ChangedError, UnreadableError, StorageError: as for `open`.
        """
        fs, path = self.filesystem(uri)
        try:
            data = _read_version(fs, path, listed) if listed and uri.startswith("s3://") else bytes(fs.cat_file(path))
        except Exception as error:
            found = translate(uri, "read", error)
            if listed is None or not isinstance(found, ChangedError):
                raise found from error
            self.refuse_changed(listed)
            data = self.read(uri)
        if listed is not None and (len(data) != listed.size_bytes or not uri.startswith("s3://")):
            self.refuse_changed(listed)
            if len(data) != listed.size_bytes:
                raise StorageError(f"{uri}: the storage sent {len(data):,} of {listed.size_bytes:,} bytes. Try again.")
        return data

    def refuse_changed(self, listed: FileInfo) -> None:
        """Looks a file up again: alone, and if that differs as a listing has it, where some stores tell another ETag.

        Raises:
            ChangedError: it is another one now, or gone.
            StorageError: the storage cannot be reached.
        """
        fs, path = self.filesystem(listed.uri)
        for look_up in (lambda: fs.info(path), lambda: _listed_alone(fs, path)):
            try:
                found = look_up()
            except FileNotFoundError:
                continue
            except Exception as error:
                raise translate(listed.uri, "look up", error) from error
            if listed.is_same(_file_info(listed.uri, found)):
                return
        raise changed(listed.uri)

    def read_range(self, uri: str, start: int, stop: int) -> bytearray:
        """The bytes from `start` up to `stop`, in parts, so that a broken transfer repeats little.

        Raises:
            StorageError: it is missing, shorter, or cannot be reached.
        """
        fs, path = self.filesystem(uri)
        data = bytearray()
        try:
            for begin in range(start, stop, RANGE_BYTES):
                data += fs.cat_file(path, start=begin, end=min(begin + RANGE_BYTES, stop))
        except Exception as error:
            raise translate(uri, "read", error) from error
        if len(data) != stop - start:
            raise StorageError(f"{uri}: ends before byte {stop}; {len(data)} of {stop - start} bytes came.")
        return data

    def write(self, uri: str, data: bytes) -> None:
        """Writes the whole file or nothing: readers see the old bytes or the new ones, never a part.

        On a local disk it is there after a power cut too when this returns.

        Raises:
            StorageError: it cannot be written.
        """
        fs, path = self.filesystem(uri)
        try:
            if uri.startswith("file://"):
                write_local(Path(path), data)
            else:
                fs.pipe_file(path, data)
        except Exception as error:
            raise translate(uri, "write", error) from error

    def exists(self, uri: str) -> bool:
        """Whether a file or folder is there.

        Raises:
            StorageError: the storage cannot be reached or refuses.
        """
        return self._found(uri) is not None

    def info(self, uri: str) -> FileInfo | None:
        """Size and fingerprint of one file; None when it is a folder or not there."""
        found = self._found(uri)
        return None if found is None or found["type"] == "directory" else _file_info(uri, found)

    def _found(self, uri: str) -> dict[str, Any] | None:
        fs, path = self.filesystem(uri)
        try:
            return dict(fs.info(path))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise translate(uri, "look up", error) from error

    def list(self, uri: str) -> Iterator[FileInfo]:
        """Every file below a folder, sorted by URI; one listing pass.

        Raises:
            MissingError: nothing is there.
            StorageError: it cannot be reached.
        """
        fs, path = self.filesystem(uri)
        try:
            fs.invalidate_cache()
            found = _find(fs, path)
        except FileNotFoundError:
            found = {}
        except Exception as error:
            raise translate(uri, "list", error) from error
        if not found and not self.exists(uri):
            where = "the path" if uri.startswith("file://") else "the bucket and the path"
            raise MissingError(f"{uri}: nothing is there. Check {where}.")
        yield from _files(uri, found)

    def glob(self, uri: str) -> Iterator[FileInfo]:
        """Every file that a pattern names, and every file below the folders that it names, sorted by URI.

        Raises:
            SpecError: it has too many wildcards.
            StorageError: it cannot be listed.
        """
        fs, path = self.filesystem(uri)
        wide, is_meant = linear_glob(path)
        try:
            fs.invalidate_cache()
            if "file" in fs.protocol:
                fixed, pattern = _before_wildcards(path)
                _refuse_closed_folders(fixed, float("inf") if "**" in pattern else pattern.count("/"))
            named = {name: entry for name, entry in fs.glob(wide, detail=True).items() if is_meant(name)}
            found = {name: entry for name, entry in named.items() if entry["type"] != "directory"}
            for name in sorted(named.keys() - found.keys()):
                found |= _find(fs, name)
        except FileNotFoundError:
            found = {}
        except Exception as error:
            raise translate(uri, "list", error) from error
        yield from _files(uri, found)

    def remove_leftovers(self, uri: str) -> None:
        """Removes what killed processes left of unfinished files below a folder of a local disk.

        On S3 a killed upload shows nowhere; a lifecycle rule of the bucket ends what it holds.
        """
        if uri.startswith("file://"):
            count = remove_leftovers(Path(self.filesystem(uri)[1]))
            if count:
                log.warning("%s: removed %d unfinished files of killed processes", uri, count)

    def delete(self, uri: str) -> None:
        """Removes one file if it is there."""
        fs, path = self.filesystem(uri)
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as error:
            raise translate(uri, "delete", error) from error

    def delete_folder(self, uri: str) -> None:
        """Removes a folder and all below it, if it is there."""
        if not self.exists(uri):
            return
        for file in self.list(uri):  # one by one: not every S3 store knows the request for many
            self.delete(file.uri)
        if uri.startswith("file://"):
            shutil.rmtree(uri.removeprefix("file://"))


def _read_version(fs: Any, path: str, listed: FileInfo) -> bytes:
    """An S3 object whose ETag is the listed one, without asking for its size first."""
    if not listed.size_bytes:
        return b""
    file = fs.open(path, "rb", size=listed.size_bytes, cache_type="none")
    file.details = {"name": path, "size": listed.size_bytes, "ETag": f'"{listed.fingerprint}"', "type": "file"}
    file.read_kw = {**file.read_kw, "IfMatch": f'"{listed.fingerprint}"'}
    with file:
        return bytes(file.read())


def _listed_alone(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    for entry in fs.ls(fs._parent(path), detail=True, refresh=True):
        if entry["name"] == path:
            return dict(entry)
    raise FileNotFoundError(path)


def _find(fs: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Every file below a folder. Object stores list keys one page after the other, so folders are listed at once."""
    if "file" in fs.protocol:
        _refuse_closed_folders(path)
    if "s3" not in fs.protocol:
        return dict(fs.find(path, detail=True))
    entries = fs.ls(path, detail=True)
    folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
    if not 1 < len(folders) <= MAX_FOLDERS_AT_ONCE:
        return dict(fs.find(path, detail=True))
    found = {entry["name"]: entry for entry in entries if entry["type"] != "directory"}
    with ThreadPoolExecutor(LISTERS) as pool:
        for below in pool.map(lambda folder: fs.find(folder, detail=True), folders):
            found |= below
    return found


def _before_wildcards(path: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the pattern in it."""
    place = min(path.find(letter) for letter in "*?[" if letter in path)
    folder = path[:place].rpartition("/")[0]
    return folder, path[len(folder) + 1 :]


def _refuse_closed_folders(path: str, depth: float = float("inf")) -> None:
    """On a local disk a folder that may not be listed is an error; fsspec would pass over it and all that is in it."""
    for folder, below, _ in os.walk(path, onerror=_refuse_folder):
        if folder.count("/") - path.count("/") >= depth:
            below.clear()


def _refuse_folder(error: OSError) -> None:
    name = os.path.basename(str(error.filename or ""))
    if not isinstance(error, FileNotFoundError) and not name.startswith(".") and name not in SYSTEM_FOLDERS:
        raise error


def _files(uri: str, found: dict[str, dict[str, Any]]) -> Iterator[FileInfo]:
    scheme = uri.partition("://")[0]
    for name in sorted(found):
        entry = found[name]
        if entry["type"] != "directory" and not (scheme == "s3" and name.endswith("/")):
            yield _file_info(name if "://" in name else f"{scheme}://{name}", entry)


def _file_info(uri: str, found: dict[str, Any]) -> FileInfo:
    size = int(found.get("size") or 0)
    etag = found.get("ETag") or found.get("etag")
    changed_at = found.get("mtime") or found.get("LastModified") or found.get("created") or ""
    if isinstance(changed_at, datetime):
        changed_at = changed_at.timestamp()
    mark = str(etag).strip('"') if etag else hashlib.sha256(f"{size}:{changed_at}".encode()).hexdigest()[:16]
    return FileInfo(uri, size, mark, changed_at if isinstance(changed_at, float) else None, _kind(found))


def _kind(found: dict[str, Any]) -> str:
    """A link that leads nowhere counts as a file, which then cannot be read; what is no file would wait for ever."""
    mode = found.get("mode")
    if found.get("islink") and os.path.isdir(found["name"]):
        return "link"
    return "file" if mode is None or stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode) else "other"
