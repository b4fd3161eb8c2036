"""The sink interface of a worker: write a chunk and commit a shard, both idempotent."""

import abc
from collections.abc import Mapping, Sequence

from raydetect.records import Chunk, Part, Receipt, Row


class Sink(abc.ABC):
    """Writes results. Stateless and idempotent: writing a chunk twice leaves the same files."""

    @abc.abstractmethod
    def write(self, chunk: Chunk, rows: Sequence[Row], pictures: Mapping[int, bytes], clipped_pixels: int = 0) -> Part:
        """Writes the heatmaps of a chunk (PNG bytes by position), then its rows.

        Raises:
            StorageError: a file cannot be written.
        """

    @abc.abstractmethod
    def commit(self, receipt: Receipt) -> None:
        """Writes the ledger record of a shard, from which on its rows count.

        Raises:
            StorageError: the record cannot be written.
        """
