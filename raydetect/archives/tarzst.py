"""`tarzst://MEMBER::URL` is the fsspec URL of a member of a tar.zst.

fsspec's own tar filesystem seeks backwards, which a zstd stream cannot; this one unpacks the container to a temporary
file first (in memory up to 64 MB), so opening one member costs reading the whole container once.
"""

import shutil
import tempfile
from typing import Any

import fsspec
import zstandard
from fsspec.implementations.tar import TarFileSystem

IN_MEMORY_BYTES = 64 << 20
COPY_BYTES = 1 << 20


class ZstdTarFileSystem(TarFileSystem):  # type: ignore[misc]
    """Read-only filesystem of the members of a tar.zst."""

    protocol = "tarzst"
    cachable = False

    def __init__(
        self,
        fo: Any,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Unpacks the container at `fo`, a path or URL (fsspec's chaining passes it)."""
        plain = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, prefix="raydetect-")  # noqa: SIM115 (the filesystem keeps it)
        with fsspec.open(fo, protocol=target_protocol, **(target_options or {})) as packed:
            reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
            shutil.copyfileobj(reader, plain, COPY_BYTES)
        plain.seek(0)
        super().__init__(fo=plain, **kwargs)
