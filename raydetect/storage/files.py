"""Opens, lists, reads and writes files by URL."""

import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Iterator
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
from raydetect.storage.listing import before_wildcards, find_files, refuse_closed_folders
from raydetect.storage.local_files import remove_leftovers, require_writable, write_local
from raydetect.storage.stored_file import StoredFile
from raydetect.storage.uris import check_uri, normalise_uri

log = logging.getLogger("raydetect.storage")
READ_BLOCK_BYTES = 8 << 20
RANGE_BYTES = 64 << 20
S3_ATTEMPTS = 3  # of botocore, with exponential backoff; on top, s3fs retries each request up to five times


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One listed file.

    Attributes:
        uri: URI as the storage names it.
        size_bytes: file size; -1 if unknown.
        fingerprint: changes when the file is overwritten: its ETag, or else a hash of size and modification time.
        modified: modification time in seconds since 1970; None if the storage does not report it.
        kind: "file", "link" (to a folder; not followed) or "other" (a FIFO, socket or device). Links and others are
            never opened.
    """

    uri: str
    size_bytes: int
    fingerprint: str
    modified: float | None = None
    kind: str = "file"

    def is_same(self, other: "FileInfo") -> bool:
        """Whether the fingerprints are equal, so the file is unchanged."""
        return self.fingerprint == other.fingerprint


@dataclass(frozen=True, slots=True)
class Storage:
    """Opens, lists, reads and writes files by URL with one set of options. Cheap to create and to pickle.

    Only `glob` interprets wildcards; for all other methods `out [line 4]` is a folder of that name.
    """

    options: StorageOptions = field(default_factory=StorageOptions)

    def filesystem(self, uri: str) -> tuple[AbstractFileSystem, str]:
        """Returns the fsspec filesystem of a URI and the path in it.

        Raises:
            SpecError: the scheme is not supported, or its package is not installed.
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
        """Returns the keyword arguments for `fsspec.open(uri, **options)` to access the same storage."""
        if not uri.startswith("s3://"):
            return {}
        options = self.options
        client: dict[str, Any] = {"region_name": options.region} if options.region else {}
        retries = {"max_attempts": S3_ATTEMPTS, "mode": "standard"}
        fixed: dict[str, Any] = {
            "anon": options.anon,
            "use_listings_cache": False,
            "max_concurrency": 1,  # s3fs does not retry a truncated body when it reads parts in parallel
            "config_kwargs": {"retries": retries, "connect_timeout": 10, "read_timeout": 60},
            "client_kwargs": client,
        }
        optional = {
            "endpoint_url": options.endpoint_url,
            "key": options.key and options.key.get_secret_value(),
            "secret": options.secret and options.secret.get_secret_value(),
            "token": options.token and options.token.get_secret_value(),
            "profile": options.profile,
        }
        return fixed | {name: value for name, value in optional.items() if value is not None}

    def open(self, uri: str, listed: FileInfo | None = None) -> StoredFile:
        """Opens a seekable binary file for reading; sequential reads are buffered in blocks.

        Args:
            uri: the file.
            listed: the expected version of the file. On S3 every request is then conditional on its ETag; elsewhere
                size and time are compared on opening and on closing.

        Raises:
            ChangedError: the file has changed since it was listed.
            UnreadableError: this file cannot be read.
            StorageError: the storage cannot be reached.
        """
        fs, path = self.filesystem(uri)
        try:
            inner = fs.open(path, "rb", block_size=READ_BLOCK_BYTES)
            details = getattr(inner, "details", None) or fs.info(path)
        except Exception as error:
            raise translate(uri, "read", error) from error
        if listed is not None and not listed.is_same(_file_info(uri, details)):
            self.refuse_changed(listed)
        size = details.get("size") if listed is None or listed.size_bytes < 0 else listed.size_bytes

        def check_end() -> None:
            if listed is not None and not uri.startswith("s3://"):
                self.refuse_changed(listed)

        return StoredFile(inner, uri, None if size is None else int(size), check_end)

    def read(self, uri: str, listed: FileInfo | None = None) -> bytes:
        """Reads the whole file in one request.

        Args:
            uri: the file.
            listed: the expected version of the file. On S3 the request is conditional on its ETag; elsewhere the file
                is checked again after reading.

        Raises:
            ChangedError, UnreadableError, StorageError: see `open`.
        """
        fs, path = self.filesystem(uri)
        try:
            data = _read_version(fs, path, listed) if listed and uri.startswith("s3://") else bytes(fs.cat_file(path))
        except Exception as error:
            translated = translate(uri, "read", error)
            if listed is None or not isinstance(translated, ChangedError):
                raise translated from error
            self.refuse_changed(listed)
            data = self.read(uri)
        if listed is not None and (len(data) != listed.size_bytes or not uri.startswith("s3://")):
            self.refuse_changed(listed)
            if len(data) != listed.size_bytes:
                raise StorageError(f"{uri}: the storage sent {len(data):,} of {listed.size_bytes:,} bytes. Try again.")
        return data

    def refuse_changed(self, listed: FileInfo) -> None:
        """Checks that a file is still the listed one, by its own metadata and, where ETags differ, by a new listing.

        Raises:
            ChangedError: the file has changed or was deleted.
            StorageError: the storage cannot be reached.
        """
        fs, path = self.filesystem(listed.uri)
        for look_up in (lambda: fs.info(path), lambda: _listing_entry(fs, path)):
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
        """Reads the bytes from `start` to `stop` in parts, so that a failed transfer repeats little.

        Raises:
            StorageError: the file is missing, too short or cannot be read.
        """
        fs, path = self.filesystem(uri)
        data = bytearray()
        try:
            for begin in range(start, stop, RANGE_BYTES):
                data += fs.cat_file(path, start=begin, end=min(begin + RANGE_BYTES, stop))
        except Exception as error:
            raise translate(uri, "read", error) from error
        if len(data) != stop - start:
            raise StorageError(f"{uri}: ends before byte {stop}; {len(data)} of {stop - start} bytes were received.")
        return data

    def write(self, uri: str, data: bytes) -> None:
        """Writes a file atomically: readers see the old content or the new content, never a part.

        On a local disk the file survives a power failure once this method returns.

        Raises:
            StorageError: the file cannot be written.
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
        """Whether a file or folder exists.

        Raises:
            StorageError: the storage cannot be reached or denies access.
        """
        return self._details(uri) is not None

    def info(self, uri: str) -> FileInfo | None:
        """Returns size and fingerprint of one file; None if it is a folder or does not exist."""
        details = self._details(uri)
        return None if details is None or details["type"] == "directory" else _file_info(uri, details)

    def _details(self, uri: str) -> dict[str, Any] | None:
        fs, path = self.filesystem(uri)
        try:
            return dict(fs.info(path))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise translate(uri, "look up", error) from error

    def list(self, uri: str) -> Iterator[FileInfo]:
        """Lists every file below a folder, sorted by URI, in one pass.

        Raises:
            MissingError: nothing exists at the URI.
            StorageError: the storage cannot be reached.
        """
        fs, path = self.filesystem(uri)
        try:
            fs.invalidate_cache()
            found = find_files(fs, path)
        except FileNotFoundError:
            found = {}
        except Exception as error:
            raise translate(uri, "list", error) from error
        if not found and not self.exists(uri):
            where = "the path" if uri.startswith("file://") else "the bucket and the path"
            raise MissingError(f"{uri}: nothing is there. Check {where}.")
        yield from _files(uri, found)

    def glob(self, uri: str) -> Iterator[FileInfo]:
        """Lists every file that a pattern matches, and every file below the folders it matches, sorted by URI.

        Raises:
            SpecError: the pattern has too many wildcards.
            StorageError: the storage cannot be listed.
        """
        fs, path = self.filesystem(uri)
        wide, matches = linear_glob(path)
        try:
            fs.invalidate_cache()
            if "file" in fs.protocol:
                fixed, pattern = before_wildcards(path)
                refuse_closed_folders(fixed, float("inf") if "**" in pattern else pattern.count("/"))
            named = {name: entry for name, entry in fs.glob(wide, detail=True).items() if matches(name)}
            found = {name: entry for name, entry in named.items() if entry["type"] != "directory"}
            for name in sorted(named.keys() - found.keys()):
                found |= find_files(fs, name)
        except FileNotFoundError:
            found = {}
        except Exception as error:
            raise translate(uri, "list", error) from error
        yield from _files(uri, found)

    def require_writable(self, uri: str) -> None:
        """Checks that a folder on a local disk can be created or written, before hours of work; writes nothing.

        Raises:
            StorageError: it cannot.
        """
        if uri.startswith("file://"):
            try:
                require_writable(Path(self.filesystem(uri)[1]))
            except OSError as error:
                raise translate(uri, "write", error) from None

    def remove_leftovers(self, uri: str) -> None:
        """Removes unfinished files of killed processes below a folder on a local disk.

        On S3 an interrupted upload is invisible; a lifecycle rule of the bucket can abort it.
        """
        if uri.startswith("file://"):
            count = remove_leftovers(Path(self.filesystem(uri)[1]))
            if count:
                log.warning("%s: removed %d unfinished files of killed processes", uri, count)

    def delete(self, uri: str) -> None:
        """Deletes one file if it exists."""
        fs, path = self.filesystem(uri)
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as error:
            raise translate(uri, "delete", error) from error

    def delete_folder(self, uri: str) -> None:
        """Deletes a folder and everything below it, if it exists."""
        if not self.exists(uri):
            return
        for file in self.list(uri):  # one by one: not every S3 store supports bulk delete
            self.delete(file.uri)
        if uri.startswith("file://"):
            shutil.rmtree(uri.removeprefix("file://"))


def _read_version(fs: Any, path: str, listed: FileInfo) -> bytes:
    """Reads an S3 object if its ETag is the listed one, without requesting its size first."""
    if not listed.size_bytes:
        return b""
    file = fs.open(path, "rb", size=listed.size_bytes, cache_type="none")
    file.details = {"name": path, "size": listed.size_bytes, "ETag": f'"{listed.fingerprint}"', "type": "file"}
    file.read_kw = {**file.read_kw, "IfMatch": f'"{listed.fingerprint}"'}
    with file:
        return bytes(file.read())


def _listing_entry(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    for entry in fs.ls(fs._parent(path), detail=True, refresh=True):
        if entry["name"] == path:
            return dict(entry)
    raise FileNotFoundError(path)


def _files(uri: str, found: dict[str, dict[str, Any]]) -> Iterator[FileInfo]:
    scheme = uri.partition("://")[0]
    for name in sorted(found):
        entry = found[name]
        if entry["type"] != "directory" and not (scheme == "s3" and name.endswith("/")):
            yield _file_info(name if "://" in name else f"{scheme}://{name}", entry)


def _file_info(uri: str, details: dict[str, Any]) -> FileInfo:
    size = int(details.get("size") or 0)
    etag = details.get("ETag") or details.get("etag")
    modified = details.get("mtime") or details.get("LastModified") or details.get("created") or ""
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    fingerprint = str(etag).strip('"') if etag else hashlib.sha256(f"{size}:{modified}".encode()).hexdigest()[:16]
    return FileInfo(uri, size, fingerprint, modified if isinstance(modified, float) else None, _kind(details))


def _kind(details: dict[str, Any]) -> str:
    """Returns `FileInfo.kind`. A broken link counts as an unreadable file; reading a FIFO could block for ever."""
    mode = details.get("mode")
    if details.get("islink") and os.path.isdir(details["name"]):
        return "link"
    return "file" if mode is None or stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode) else "other"
