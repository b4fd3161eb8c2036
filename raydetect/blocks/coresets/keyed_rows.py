"""Rows of keyed images stored by one worker: in memory up to a budget, then in a temporary file.

Shapes: N rows, D dims, B images, R rows of one image.
"""

import json
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.seeding import keyed_seed, mixed_hash
from raydetect.storage import Scratch

BLOCK_ROWS = 8192
PATCH_BITS = 20  # bits of the row index within an image
DEFAULT_BYTES = 4 << 30
PAD_KEY = ""


class RowStore:
    """Rows of fixed width, appended in order and read in blocks of BLOCK_ROWS."""

    def __init__(self, dims: int, dtype: torch.dtype, max_bytes: int) -> None:
        """An empty store.

        Args:
            dims: D.
            dtype: dtype of the rows.
            max_bytes: memory limit; rows beyond it go to an anonymous temporary file that is deleted with the store.
        """
        self.dims, self.dtype, self.max_bytes = dims, dtype, max_bytes
        self._block_bytes = BLOCK_ROWS * dims * dtype.itemsize
        self._in_memory = max(1, max_bytes // self._block_bytes)
        self._full: list[Tensor] = []
        self._spilled = 0
        self._file: Scratch | None = None
        self._last = torch.empty((BLOCK_ROWS, dims), dtype=dtype)
        self._filled = 0

    def __len__(self) -> int:
        return (len(self._full) + self._spilled) * BLOCK_ROWS + self._filled

    def append(self, rows_ND: Tensor) -> None:
        """Adds rows at the end.

        Raises:
            StorageError: the temporary folder cannot hold them.
        """
        while len(rows_ND):
            space = BLOCK_ROWS - self._filled
            part, rows_ND = rows_ND[:space], rows_ND[space:]
            self._last[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == BLOCK_ROWS:
                self._close_block()

    def _close_block(self) -> None:
        if len(self._full) < self._in_memory:
            self._full.append(self._last)
            self._last = torch.empty_like(self._last)
        else:
            if self._file is None:
                self._file = Scratch("patch embeddings")
            self._file.append(self._last.view(torch.uint8).numpy().data)
            self._spilled += 1
        self._filled = 0

    def block(self, number: int) -> Tensor:
        """The rows [number * BLOCK_ROWS, (number + 1) * BLOCK_ROWS); the last block may be shorter."""
        if number < len(self._full):
            return self._full[number]
        if number < len(self._full) + self._spilled:
            assert self._file is not None
            found = torch.empty((BLOCK_ROWS, self.dims), dtype=self.dtype)
            self._file.read_at((number - len(self._full)) * self._block_bytes, found.view(torch.uint8).numpy().data)
            return found
        return self._last[: self._filled]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, rows) for each block."""
        for number in range(-(-len(self) // BLOCK_ROWS)):
            yield number * BLOCK_ROWS, self.block(number)

    def take(self, index_N: Tensor) -> Tensor:
        """The rows at these indices, in this order."""
        found = torch.empty((len(index_N), self.dims), dtype=self.dtype)
        block_N = index_N // BLOCK_ROWS
        for number in block_N.unique().tolist():
            mine = (block_N == number).nonzero()[:, 0]
            found[mine] = self.block(number)[index_N[mine] - number * BLOCK_ROWS]
        return found


class KeyedRows:
    """Float32 rows of images, each image once, with a global order that is independent of the workers.

    Attributes:
        group: the workers that hold the other images.
        store: this worker's rows, by image in insertion order.
        largest: largest absolute value in the local rows.
        stands_for: number of additional rows, from earlier fits, that the local rows represent.
    """

    def __init__(self, dims: int, group: Group, max_bytes: int = DEFAULT_BYTES) -> None:
        """No rows yet."""
        self.group = group
        self.max_bytes = max_bytes
        self.store = RowStore(dims, torch.float32, max_bytes)
        self.largest = 0.0
        self.stands_for = 0
        self._keys: list[str] = []
        self._seen: set[str] = set()
        self._starts: list[int] = []

    def __len__(self) -> int:
        return len(self.store)

    def add(self, key: str, rows_RD: Tensor) -> None:
        """Adds an image; does nothing if the key exists already.

        Raises:
            ValueError: a row is NaN or infinite, or the image has too many rows.
        """
        if key in self._seen or key == PAD_KEY:
            return
        if len(rows_RD) >= 1 << PATCH_BITS:
            raise ValueError(f"{key}: {len(rows_RD):,} rows in one image; fewer than {1 << PATCH_BITS:,} are allowed")
        largest = float(rows_RD.abs().max())
        if not largest < float("inf"):
            raise ValueError(f"{key}: an embedding is NaN or infinite; check the weights and the image")
        self._seen.add(key)
        self._keys.append(key)
        self._starts.append(len(self.store))
        self.largest = max(self.largest, largest)
        self.store.append(rows_RD)

    def only(self, keys: Collection[str], max_bytes: int) -> "KeyedRows":
        """A copy with some of the images.

        Args:
            keys: of these images.
            max_bytes: memory limit of the copy.
        """
        chosen = KeyedRows(self.store.dims, self.group, max_bytes)
        for key, start, stop in zip(self._keys, self._starts, [*self._starts[1:], len(self)], strict=True):
            if key in keys:
                chosen.add(key, self.store.take(torch.arange(start, stop)))
        return chosen

    def total(self) -> int:
        """Number of rows of all workers."""
        return int(sum(int(n) for n in self.group.gather(torch.tensor([len(self)]))))

    def total_stands_for(self) -> int:
        """Number of rows of all workers, including the rows represented by earlier fits."""
        return int(sum(int(n) for n in self.group.gather(torch.tensor([len(self) + self.stands_for]))))

    def names(self, index_N: Tensor) -> list[tuple[str, int]]:
        """(image key, row within the image) for row indices."""
        found = []
        for row in index_N.tolist():
            image = bisect_right(self._starts, row) - 1
            found.append((self._keys[image], row - self._starts[image]))
        return found

    def sample(self, count: int, seed: int) -> Tensor:
        """At most `count` rows of all workers, by smallest keyed hash; the same for any number of workers."""
        hash_seed = keyed_seed(seed, "sample")
        order_N = self.order()
        first = mixed_hash(order_N, hash_seed).argsort()[:count]
        order = torch.cat(self.group.gather(order_N[first]))
        rows_ND = torch.cat(self.group.gather(self.store.take(first)))
        return rows_ND[mixed_hash(order, hash_seed).argsort()[:count]]

    def all_rows(self) -> Tensor:
        """The rows of all workers, gathered on each, (N, D); the image order is the same for all names of a state."""
        order_N = torch.cat(self.group.gather(self.order()))
        rows_ND = torch.cat(self.group.gather(self.store.take(torch.arange(len(self)))))
        return rows_ND[order_N.argsort()]

    def all_keys(self) -> list[str]:
        """Image keys of all workers, in the order of `all_rows`."""
        texts = self.group.gather_bytes(json.dumps(self._keys).encode())
        keys = [key for text in texts for key in json.loads(text)]
        return sorted(keys, key=_head)

    def order(self) -> Tensor:
        """An int64 per row, a function of the image key and the row's index in the image; breaks ties."""
        lengths = torch.tensor([*self._starts, len(self)], dtype=torch.int64).diff()
        heads = torch.tensor([_head(key) for key in self._keys], dtype=torch.int64)
        positions = torch.arange(len(self)) - torch.tensor(self._starts, dtype=torch.int64).repeat_interleave(lengths)
        return (heads.repeat_interleave(lengths) << PATCH_BITS) + positions


def _head(key: str) -> int:
    """Order of an image: a hash with room for the row index."""
    return keyed_seed(0, "order", key) >> PATCH_BITS


class FitState:
    """Rows collected by one worker, by name and image key, with merging over workers.

    Since rows are keyed by image, reading a chunk twice has no effect, and the row order makes the fit independent of
    the number and order of shards and workers.
    """

    def __init__(self, group: Group | None = None, max_bytes: int = DEFAULT_BYTES) -> None:
        """An empty state.

        Args:
            group: the workers of the fit; None = a single worker.
            max_bytes: memory limit for all rows of this worker; the rest is stored on disk.
        """
        self.group = group or Group()
        self.max_bytes = max_bytes
        self.rows: dict[str, KeyedRows] = {}

    def add(
        self, keys: Sequence[str], collected: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None
    ) -> None:
        """Adds the rows of a batch; images with PAD_KEY are ignored.

        Args:
            keys: keys of the B images.
            collected: rows by name, (B, R, D).
            kept: rows to add by name, bool (at most B, R), for the first images; all rows of other names are added.
        """
        chosen = kept or {}
        with torch.inference_mode(False):  # the rows outlive the forward pass
            for name, rows_BRD in collected.items():
                if name not in self.rows:
                    self.rows[name] = KeyedRows(rows_BRD.shape[2], self.group, self.max_bytes // len(collected))
                rows_BRD = rows_BRD.detach().float().cpu()
                for i, key in enumerate(keys):
                    rows_RD = rows_BRD[i]
                    if name in chosen and i < len(chosen[name]):
                        rows_RD = rows_RD[chosen[name][i]]
                    self.rows[name].add(key, rows_RD)

    def only(self, keys: Collection[str]) -> "FitState":
        """A copy with the rows of some images of this worker."""
        chosen = FitState(self.group, self.max_bytes)
        chosen.rows = {name: rows.only(keys, self.max_bytes // len(self.rows)) for name, rows in self.rows.items()}
        return chosen

    def agree(self) -> None:
        """Adds missing row names on workers without images, so that all can merge. Call once, after collecting."""
        mine = json.dumps({name: rows.store.dims for name, rows in self.rows.items()}).encode()
        for text in self.group.gather_bytes(mine):
            for name, dims in json.loads(text).items():
                self.rows.setdefault(name, KeyedRows(dims, self.group, self.max_bytes))
