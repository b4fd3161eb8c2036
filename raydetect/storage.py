"""Files on any storage behind one URL: local, S3 and what else fsspec opens, with errors people can act on."""

import hashlib
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.spec import AbstractFileSystem

from raydetect.errors import MissingError, SpecError, StorageError
from raydetect.spec import StorageOptions

SCHEMES = ("file", "s3", "memory", "gs", "az", "abfs", "http", "https")
READ_BLOCK_BYTES = 8 << 20
RANGE_BYTES = 64 << 20
LISTERS = 16
MAX_FOLDERS_AT_ONCE = 256
S3_ATTEMPTS = 3  # botocore's, with growing pauses; s3fs then tries each request up to five times


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One listed file: its URI, size and what changes when it is overwritten."""

    uri: str
    size_bytes: int
    fingerprint: str


def normalise_uri(uri: str) -> str:
    """`scheme://...` without `..`, `.`, doubled slashes or a slash at the end; plain paths become `file://`.

    Raises:
        SpecError: an unknown scheme, a chained URL, or a path that climbs out with `..`.
    """
    text = os.fspath(uri)
    if not text.strip():
        raise SpecError("an empty URI was given. State a path or a URL such as s3://bucket/folder.")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return "file://" + os.path.abspath(os.path.expanduser(text))
    if "::" in text or scheme not in SCHEMES:
        raise SpecError(f"{text}: the scheme {scheme!r} is not supported. Use one of {', '.join(SCHEMES)}.")
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise SpecError(f"{text}: `..` is not allowed in a URI. Write the path out.")
    if not parts and scheme != "memory":
        raise SpecError(f"{text}: names no bucket or path. Write {scheme}://NAME/...")
    root = "/" if scheme in ("file", "memory") else ""
    return f"{scheme}://{root}{'/'.join(parts)}"


def join_uri(uri: str, *parts: str) -> str:
    """`uri/part/part`."""
    return "/".join((uri.rstrip("/"), *parts))


@dataclass(frozen=True, slots=True)
class Storage:
    """Opens, lists, reads and writes files by URL with one set of options. Cheap to build and to pickle."""

    options: StorageOptions = field(default_factory=StorageOptions)

    def filesystem(self, uri: str) -> tuple[AbstractFileSystem, str]:
        """The fsspec filesystem of a URI and the path in it.

        Raises:
            SpecError: a scheme that is not supported or whose package is not installed.
        """
        uri = normalise_uri(uri)
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
            "key": options.key,
            "secret": options.secret,
            "token": options.token,
            "profile": options.profile,
        }
        return made | {name: value for name, value in named.items() if value is not None}

    def open(self, uri: str) -> IO[bytes]:
        """A seekable binary file for reading; sequential reads fetch ahead in blocks.

        Raises:
            StorageError: it is missing or cannot be reached.
        """
        fs, path = self.filesystem(uri)
        try:
            return fs.open(path, "rb", block_size=READ_BLOCK_BYTES)  # type: ignore[no-any-return]
        except Exception as error:
            raise translate(uri, "read", error) from error

    def read(self, uri: str) -> bytes:
        """The whole file.

        Raises:
            StorageError: it is missing or cannot be reached.
        """
        fs, path = self.filesystem(uri)
        try:
            return bytes(fs.cat_file(path))
        except Exception as error:
            raise translate(uri, "read", error) from error

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

        Raises:
            StorageError: it cannot be written.
        """
        fs, path = self.filesystem(uri)
        try:
            if uri.startswith("file://"):
                _write_local(Path(path), data)
            else:
                fs.pipe_file(path, data)
        except Exception as error:
            raise translate(uri, "write", error) from error

    def exists(self, uri: str) -> bool:
        """Whether a file or folder is there.

        Raises:
            StorageError: the storage cannot be reached or refuses.
        """
        fs, path = self.filesystem(uri)
        try:
            fs.info(path)
        except FileNotFoundError:
            return False
        except Exception as error:
            raise translate(uri, "read", error) from error
        return True

    def info(self, uri: str) -> FileInfo | None:
        """Size and fingerprint of one file; None when it is a folder or not there."""
        fs, path = self.filesystem(uri)
        try:
            found = fs.info(path)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise translate(uri, "read", error) from error
        return None if found["type"] == "directory" else _file_info(uri, found)

    def list(self, uri: str) -> Iterator[FileInfo]:
        """Every file below a folder, or those that a glob names, sorted by URI; one listing pass.

        Raises:
            StorageError: nothing is there, or it cannot be reached.
        """
        uri = normalise_uri(uri)
        fs, path = self.filesystem(uri)
        scheme = uri.partition("://")[0]
        is_glob = any(letter in path for letter in "*?[")
        try:
            fs.invalidate_cache()
            found = fs.glob(path, detail=True) if is_glob else _find(fs, path)
        except FileNotFoundError:
            found = {}
        except Exception as error:
            raise translate(uri, "list", error) from error
        if not found and not is_glob and not self.exists(uri):
            raise MissingError(f"{uri}: nothing is there. Check the bucket and the path.")
        for name in sorted(found):
            if found[name]["type"] != "directory":
                yield _file_info(f"{scheme}://{name}", found[name])

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


def translate(uri: str, verb: str, error: Exception) -> StorageError:
    """A storage library's exception as one sentence that names the file and what to do. No secrets, no traceback."""
    text = _scrub(" ".join(str(error).split())) or type(error).__name__
    code = _error_code(error, text)
    if code in ("NoSuchBucket",):
        bucket = "/".join(uri.split("/")[:3])
        return MissingError(f"{uri}: the bucket {bucket} does not exist. Create it or mend the URI.")
    if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"):
        return StorageError(f"{uri}: the storage refused to {verb} it ({text}). Check key, secret, profile.")
    if "credentials" in text.lower():
        return StorageError(
            f"{uri}: no credentials found. Set storage.key and storage.secret, a profile, or anon: true."
        )
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: not found. Check the path.")
    if "connect" in type(error).__name__.lower() or "Could not connect" in text:
        return StorageError(f"{uri}: the storage cannot be reached ({text}). Check storage.endpoint_url.")
    return StorageError(f"{uri}: cannot {verb} it ({type(error).__name__}: {text}).")


def _error_code(error: BaseException | None, text: str) -> str:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    if "Forbidden" in text or "Access Denied" in text:
        return "AccessDenied"
    return "NoSuchBucket" if "bucket does not exist" in text else ""


def _scrub(text: str) -> str:
    """Drops query strings (signatures) and anything after a key name."""
    text = re.sub(r"\?[^ '\"]+", "", text)
    return re.sub(r"(?i)((?:secret|token|key)[a-z_]*['\"]?\s*[=:]\s*)\S+", r"\1***", text)[:300]


def _find(fs: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Every file below a folder. Object stores list keys one page after the other, so folders are listed at once."""
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


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _file_info(uri: str, found: dict[str, Any]) -> FileInfo:
    size = int(found.get("size") or 0)
    etag = found.get("ETag") or found.get("etag")
    if etag:
        mark = str(etag).strip('"')
    else:
        changed = found.get("mtime") or found.get("LastModified") or found.get("created") or ""
        mark = hashlib.sha256(f"{size}:{changed}".encode()).hexdigest()[:16]
    return FileInfo(normalise_uri(uri), size, mark)


def relative_to(uri: str, root: str) -> str:
    """The path of `uri` below `root`.

    Raises:
        StorageError: it is not below it.
    """
    prefix = root.rstrip("/") + "/"
    if not uri.startswith(prefix):
        raise StorageError(f"{uri}: is not below {root}.")
    return posixpath.normpath(uri[len(prefix) :])
