"""Decides whether the storage refuses one object or all of them."""

from collections.abc import Iterable, Iterator
from itertools import islice

from raydetect.errors import StorageError, UnreadableError
from raydetect.storage import FileInfo, Storage

WITNESSES = 3


def is_alone(error: UnreadableError, storage: Storage, others: Iterable[str]) -> bool:
    """Whether only this object is unreadable and becomes a row; otherwise the job must stop.

    Errors for archived or missing objects concern one object. A denied request may concern all objects, so one byte of
    up to `WITNESSES` others is read.

    Args:
        error: error of the object.
        storage: storage of all objects.
        others: URIs of other non-empty files, those most likely to be readable first.
    """
    return not error.is_denied or any(_is_read(storage, uri) for uri in islice(others, WITNESSES))


def others_of(uri: str, files: Iterable[FileInfo]) -> Iterator[str]:
    """Yields the URIs of the other non-empty files of a listing; none if it cannot be listed."""
    try:
        yield from (file.uri for file in files if file.uri != uri and file.size_bytes)
    except StorageError:
        return


def _is_read(storage: Storage, uri: str) -> bool:
    try:
        return bool(storage.read_range(uri, 0, 1))
    except StorageError:
        return False
