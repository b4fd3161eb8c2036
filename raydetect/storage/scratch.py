"""What does not fit into memory, in the temporary folder."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from raydetect.errors import StorageError
from raydetect.storage.error_translation import disk_reason

PART_BYTES = 4 << 20


class Scratch:
    """A file without a name in the folder of `TMPDIR`: it goes with this object, and with a process that is killed."""

    def __init__(self, what: str) -> None:
        """An empty file.

        Args:
            what: it holds, for messages: "decoded images".

        Raises:
            StorageError: it cannot be made.
        """
        self._what, self.size_bytes = what, 0
        with self._told():
            self._file = tempfile.TemporaryFile(prefix="raydetect-", buffering=0)  # noqa: SIM115 (kept)

    def write_at(self, start: int, data: Any) -> None:
        """Writes all bytes of a buffer; a disk that fills takes some of them without an error.

        Raises:
            StorageError: they do not fit.
        """
        left, place = memoryview(data).cast("B"), start
        with self._told():
            while left:
                count = os.pwrite(self._file.fileno(), left, place)
                left, place = left[count:], place + count
        self.size_bytes = max(self.size_bytes, place)

    def append(self, data: Any) -> None:
        """Writes at the end.

        Raises:
            StorageError: it does not fit.
        """
        self.write_at(self.size_bytes, data)

    def read_at(self, start: int, buffer: Any) -> None:
        """Fills a buffer with what was written.

        Raises:
            StorageError: the disk cannot give it.
        """
        left, place = memoryview(buffer).cast("B"), start
        with self._told():
            while left:
                count = os.preadv(self._file.fileno(), [left], place)
                if not count:
                    raise EOFError(f"{self._what}: {self.size_bytes} bytes are there, and byte {place} was asked for")
                left, place = left[count:], place + count

    def parts(self) -> Iterator[bytes]:
        """All that was written, in order, some megabytes at a time.

        Raises:
            StorageError: the disk cannot give it.
        """
        for start in range(0, self.size_bytes, PART_BYTES):
            part = bytearray(min(PART_BYTES, self.size_bytes - start))
            self.read_at(start, part)
            yield bytes(part)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> NoReturn:
        place = tempfile.tempdir or os.environ.get("TMPDIR") or "the temporary folder"
        raise StorageError(
            f"{place}: cannot hold {self._what} ({disk_reason(error)}). Free some space there, or set TMPDIR to "
            "another folder, and start the same command again."
        ) from None
