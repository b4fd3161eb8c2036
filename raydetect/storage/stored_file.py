"""An open file whose storage errors are raised as StorageError, even if a reading library swallows them."""

import io
from collections.abc import Callable
from types import TracebackType
from typing import Any

from raydetect.errors import RaydetectError, StorageError
from raydetect.storage.error_translation import translate


class StoredFile(io.RawIOBase):
    """A seekable binary file for reading.

    Libraries that read archives catch `OSError` and report a damaged archive. So storage errors are raised as
    `StorageError`, which is not an `OSError`; if a library swallows that too, leaving the `with` block raises it again.
    """

    def __init__(self, inner: Any, uri: str, size_bytes: int | None, check_end: Callable[[], None]) -> None:
        """Wraps an open file and takes ownership of it.

        Args:
            inner: fsspec's file.
            uri: name of the file in messages.
            size_bytes: file size; shorter reads are errors. None if the server does not report it.
            check_end: raises if the file was changed while it was read.
        """
        self.uri = uri
        self.size_bytes = size_bytes
        self.failure: RaydetectError | None = None
        self._inner, self._check_end = inner, check_end

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Whether the wrapped file is seekable."""
        return bool(self._inner.seekable())

    def tell(self) -> int:
        """Returns the current position."""
        return int(self._inner.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Changes the position and returns it."""
        return int(self._inner.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        """Reads `size` bytes, or all that are left; fewer only at the end of the file.

        Raises:
            StorageError: the storage failed or sent fewer bytes.
        """
        if self.failure is not None:
            raise self.failure
        size = -1 if size is None else size
        wanted = None
        try:
            if self.size_bytes is not None:
                left = max(0, self.size_bytes - self.tell())
                wanted = left if size < 0 else min(size, left)
            data = bytes(self._inner.read(size))
        except Exception as error:
            self.failure = translate(self.uri, "read", error)
            raise self.failure from error
        if wanted is not None and len(data) < wanted:
            self.failure = StorageError(
                f"{self.uri}: the storage sent {len(data):,} of {wanted:,} bytes. Start the same job again."
            )
            raise self.failure
        return data

    def readinto(self, buffer: Any) -> int:
        """Reads into a buffer and returns the number of bytes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Closes the wrapped file."""
        if not self.closed:
            self._inner.close()
        super().close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        if self.failure is not None and (error is None or isinstance(error, Exception)) and error is not self.failure:
            raise self.failure from error
        if error is None:
            self._check_end()
