"""What a worker needs of a sink: write a chunk, commit a shard; both may be repeated without harm."""

import abc
from collections.abc import Mapping, Sequence

from raydetect.records import Chunk, Part, Receipt, Row


class Sink(abc.ABC):
    """Idempotent: the same chunk written twice leaves the same files. Nothing else is state."""

    @abc.abstractmethod
    def write(self, chunk: Chunk, rows: Sequence[Row], pictures: Mapping[int, bytes], clipped_pixels: int = 0) -> Part:
        """Writes the rows of a chunk and its heatmaps (PNG bytes by position), heatmaps first.

        Raises:
            StorageError: it cannot be written.
        """

    @abc.abstractmethod
    def commit(self, receipt: Receipt) -> None:
        """Writes the ledger record of a shard: from here on its rows count.

        Raises:
            StorageError: it cannot be written.
        """
