"""Files of this machine's disks: whole or not there, whatever is killed and wherever the power goes.

A file is written under a name of its own beside its place, brought to the disk, and renamed. The writer holds a lock
(`flock`) on it, which the kernel lets go when the process ends however it ends: so what a killed one left is known
from what a live one writes, and may be removed.
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

OURS = re.compile(r"\.raydetect-([0-9a-f]{8})-[0-9a-f]{16}\.tmp")
FOREIGN_SECONDS = 86_400.0  # some network disks lock within one machine alone: files of others must be this old

log = logging.getLogger("raydetect.storage")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends, and leaves no trace when it raises.

    It is on the disk before it has its name, and its name is before this returns. What is there and is no regular file
    (`/dev/stdout`, a FIFO) is written as it is.

    Raises:
        StorageError: it cannot be written; what was there before still is.
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
    """As `whole_file`, for text in UTF-8.

    Args:
        path: of the file.
        newline: as for `open`.

    Raises:
        StorageError: it cannot be written; what was there before still is.
    """
    with whole_file(path) as file:
        out = io.TextIOWrapper(file, "utf-8", newline=newline)
        try:
            yield out
        finally:
            out.detach()


def write_local(path: Path, data: bytes) -> None:
    """The whole file or nothing: readers see the old bytes or the new ones.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    with _renamed(path) as file:
        file.write(data)


def remove_leftovers(folder: Path, below: bool = True) -> int:
    """Removes the unfinished files of a folder that no process is writing any more; returns how many.

    What may not be removed, or is on a disk without locks, stays.

    Args:
        folder: where they are.
        below: also in the folders in it.
    """
    removed = 0
    for place, folders, names in os.walk(folder):
        removed += sum(_remove_left(Path(place, name)) for name in names if OURS.fullmatch(name))
        if not below:
            folders.clear()
    return removed


@contextmanager
def _renamed(path: Path) -> Iterator[BinaryIO]:
    _make_folder(path.parent)
    file, temporary = _own_file(path.parent)
    try:
        with file:
            _keep_mode(file, path)
            yield file
            file.flush()
            _sync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error tells more
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _own_file(folder: Path) -> tuple[BinaryIO, Path]:
    """A new file in a folder and its path, locked. Should it be taken for a leftover before, there is another one."""
    while True:
        temporary = folder / f".raydetect-{_machine()}-{secrets.token_hex(8)}.tmp"
        file = temporary.open("xb")
        if _locked(file.fileno()) or os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()


def _remove_left(place: Path) -> bool:
    """Whether it was an unfinished file of no living process, and is gone."""
    found = OURS.fullmatch(place.name)
    if found is None:
        return False
    try:
        descriptor = os.open(place, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            is_old = time.time() - os.fstat(descriptor).st_mtime > FOREIGN_SECONDS
            if (found.group(1) == _machine() or is_old) and _locked(descriptor):
                place.unlink()
                return True
        finally:
            os.close(descriptor)
    except OSError as error:
        log.info("%s: an unfinished file, cannot be removed (%s)", place, error.strerror)
    return False


def _locked(descriptor: int) -> bool:
    """Whether the lock is this process's now; no when another holds it or the disk has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _keep_mode(file: BinaryIO, path: Path) -> None:
    """Who may read what is replaced may read the new one."""
    if path.exists():
        os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))


def _make_folder(folder: Path) -> None:
    """Makes it and the folders above; each new one is on the disk before something is in it."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Names are on the disk only when their folder is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # one may write into it and not read it
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a kind of disk that has nothing to wait for
            raise
