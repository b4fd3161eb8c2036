"""Decompresses gzip and zstd streams; a truncated stream is an error."""

import gzip
import io
from typing import IO, Any

import zstandard

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BUFFER_BYTES = 1 << 20
FEED_BYTES = 2048  # compressed bytes of zstd at a time, which decompress to at most 64 MB


def is_compressed(start: bytes) -> bool:
    """Whether a file that starts with these four bytes is compressed."""
    return start.startswith(GZIP) or start == ZSTD


def unpacked(raw: IO[bytes], start: bytes) -> Any:
    """Returns the decompressed content of a file as a stream that is read sequentially.

    Args:
        raw: the file, positioned at its first byte.
        start: its first four bytes.
    """
    if start == ZSTD:
        return io.BufferedReader(_ZstdFrames(raw), BUFFER_BYTES)
    return gzip.GzipFile(fileobj=raw)


class _ZstdFrames(io.RawIOBase):
    """Decompresses zstd frames; raises on a truncated frame, which zstandard's reader treats as the end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._packed, self._plain = raw, b"", memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._raw.read(FEED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("a zstd frame ends early")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count
