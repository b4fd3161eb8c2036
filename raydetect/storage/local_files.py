"""Atomic writes to local disks: a file is complete or absent, even after a kill or a power failure.

A file is written under a temporary name in the same folder, synced and renamed. The writer holds a lock (`flock`) on
it, which the kernel releases when the process ends for any reason, so leftovers of killed processes can be told from
files that are being written, and removed.
"""

import errno
import fcntl
import hashlib
import io
import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from raydetect.storage.error_translation import translate

TEMPORARY_NAME = re.compile(r"\.raydetect-([0-9a-f]{8})-[0-9a-f]{16}\.tmp")
FOREIGN_SECONDS = 86_400.0  # some network disks lock per machine only: files of other machines must be this old

log = logging.getLogger("raydetect.storage")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` when the block ends, and leaves no trace if the block raises.

    The data are synced before the rename, and the rename before the block returns. A path that exists and is not a
    regular file (`/dev/stdout`, a FIFO) is written to directly.

    Raises:
        StorageError: the file cannot be written; an existing one is unchanged.
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        with _renamed(Path(os.path.realpath(path))) as file:
            yield file
    except OSError as error:
        raise translate(str(path), "write", error) from error


@contextmanager
def whole_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a UTF-8 text file for writing, like `whole_file`.

    Args:
        path: the file.
        newline: see `open`.

    Raises:
        StorageError: the file cannot be written; an existing one is unchanged.
    """
    with whole_file(path) as file:
        out = io.TextIOWrapper(file, "utf-8", newline=newline)
        try:
            yield out
        finally:
            out.detach()


def write_local(path: Path, data: bytes) -> None:
    """Writes a file atomically: readers see the old content or the new content.

    Raises:
        OSError: the file cannot be written; an existing one is unchanged.
    """
    with _renamed(path) as file:
        file.write(data)


def remove_leftovers(folder: Path, below: bool = True) -> int:
    """Removes temporary files that no process is writing any more and returns their number.

    Files that cannot be removed, or are on a disk without locks, stay.

    Args:
        folder: the folder to clean up.
        below: also clean up subfolders.
    """
    removed = 0
    for parent, subfolders, names in os.walk(folder):
        removed += sum(_remove_leftover(Path(parent, name)) for name in names if TEMPORARY_NAME.fullmatch(name))
        if not below:
            subfolders.clear()
    return removed


def require_writable(folder: Path) -> None:
    """Checks that a folder, or the nearest one above it that exists, can be written.

    Raises:
        OSError: it cannot.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        number = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


@contextmanager
def _renamed(path: Path) -> Iterator[BinaryIO]:
    _make_folder(path.parent)
    file, temporary = _temporary_file(path.parent)
    try:
        with file:
            _keep_mode(file, path)
            yield file
            file.flush()
            _sync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error is more informative
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _temporary_file(folder: Path) -> tuple[BinaryIO, Path]:
    """Creates and locks a file in a folder; tries again if another process removed it before it was locked."""
    while True:
        temporary = folder / f".raydetect-{_machine()}-{secrets.token_hex(8)}.tmp"
        file = temporary.open("xb")
        if _locked(file.fileno()) or os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()


def _remove_leftover(path: Path) -> bool:
    """Removes a temporary file whose writer has ended; returns whether it was removed."""
    match = TEMPORARY_NAME.fullmatch(path.name)
    if match is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            is_old = time.time() - os.fstat(descriptor).st_mtime > FOREIGN_SECONDS
            if (match.group(1) == _machine() or is_old) and _locked(descriptor):
                path.unlink()
                return True
        finally:
            os.close(descriptor)
    except OSError as error:
        log.info("%s: cannot remove this unfinished file (%s)", path, error.strerror)
    return False


def _locked(descriptor: int) -> bool:
    """Tries to lock a file; False if another process holds the lock or the disk does not support locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _keep_mode(file: BinaryIO, path: Path) -> None:
    """Copies the permissions of an existing file at `path`."""
    if path.exists():
        os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))


def _make_folder(folder: Path) -> None:
    """Creates a folder and its parents; each is synced before anything is written into it."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Syncs a folder, which makes new names in it durable."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # the folder is writable but not readable
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system does not support fsync
            raise
