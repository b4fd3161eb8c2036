"""Unnamed temporary files for data that do not fit into memory."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from raydetect.errors import StorageError
from raydetect.storage.error_translation import disk_reason

PART_BYTES = 4 << 20


class Scratch:
    """An unnamed file in `TMPDIR`, deleted together with this object or when the process ends."""

    def __init__(self, what: str) -> None:
        """Creates an empty file.

        Args:
            what: description of the content for messages, such as "decoded images".

        Raises:
            StorageError: the file cannot be created.
        """
        self._what, self.size_bytes = what, 0
        with self._translated():
            self._file = tempfile.TemporaryFile(prefix="raydetect-", buffering=0)  # noqa: SIM115 (stays open)

    def write_at(self, start: int, data: Any) -> None:
        """Writes all bytes of a buffer; a single `pwrite` may write only a part when the disk fills up.

        Raises:
            StorageError: the disk is full.
        """
        left, offset = memoryview(data).cast("B"), start
        with self._translated():
            while left:
                count = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[count:], offset + count
        self.size_bytes = max(self.size_bytes, offset)

    def append(self, data: Any) -> None:
        """Writes a buffer at the end.

        Raises:
            StorageError: the disk is full.
        """
        self.write_at(self.size_bytes, data)

    def read_at(self, start: int, buffer: Any) -> None:
        """Fills a buffer from the file.

        Raises:
            StorageError: the disk cannot be read.
        """
        left, offset = memoryview(buffer).cast("B"), start
        with self._translated():
            while left:
                count = os.preadv(self._file.fileno(), [left], offset)
                if not count:
                    raise EOFError(f"{self._what}: cannot read byte {offset} of {self.size_bytes}")
                left, offset = left[count:], offset + count

    def parts(self) -> Iterator[bytes]:
        """Yields the whole content in order, `PART_BYTES` at a time.

        Raises:
            StorageError: the disk cannot be read.
        """
        for start in range(0, self.size_bytes, PART_BYTES):
            part = bytearray(min(PART_BYTES, self.size_bytes - start))
            self.read_at(start, part)
            yield bytes(part)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> NoReturn:
        folder = tempfile.tempdir or os.environ.get("TMPDIR") or "the temporary folder"
        raise StorageError(
            f"{folder}: cannot hold {self._what} ({disk_reason(error)}). Free some space there, or set TMPDIR to "
            "another folder, and start the same command again."
        ) from None
