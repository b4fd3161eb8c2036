"""An object that the storage refuses: is it this one alone, or would it refuse all?"""

from collections.abc import Iterable, Iterator
from itertools import islice

from raydetect.errors import StorageError, UnreadableError
from raydetect.storage import FileInfo, Storage

WITNESSES = 3


def is_alone(error: UnreadableError, storage: Storage, others: Iterable[str]) -> bool:
    """Whether only this object cannot be read, so that it becomes a row; else the job must stop.

    What is archived or not there says so itself. A refusal may mean all objects: then one byte of some others is read.

    Args:
        error: of the object.
        storage: reaches the others.
        others: URIs of files that are not empty, the likeliest to be readable first.
    """
    return not error.is_denied or any(_is_read(storage, uri) for uri in islice(others, WITNESSES))


def others_of(uri: str, files: Iterable[FileInfo]) -> Iterator[str]:
    """Files of a listing that are not empty, but for one; none when it cannot be listed."""
    try:
        yield from (file.uri for file in files if file.uri != uri and file.size_bytes)
    except StorageError:
        return


def _is_read(storage: Storage, uri: str) -> bool:
    try:
        return bool(storage.read_range(uri, 0, 1))
    except StorageError:
        return False
