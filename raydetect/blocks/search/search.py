"""The interface of memory bank searches, and merging of answers from shards of a bank.

Shapes: N patches, M bank rows, D feature dim, K neighbours, C candidates, X any leading shape.

An exact answer is the K rows with the smallest (settled distance, row index). The settled distance is float32, computed
from differences summed in a fixed order, so it depends on the two rows alone. Hence all exact searches are
bit-identical: products, pruned, bfloat16, faiss, or sharded over several machines.
"""

import abc
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

SETTLED = 2.0**-18  # maximum relative error of a settled distance, for D up to 2^20
SETTLED_PAIRS = 2048


class Search(abc.ABC):
    """Nearest rows of one memory bank. Rows are indexed from 0, wherever they are stored."""

    exact: bool = True
    """Whether `nearest` finds the true nearest rows; distances are always those of the returned rows."""

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """M, at least 1."""

    @property
    @abc.abstractmethod
    def dims(self) -> int:
        """D."""

    @abc.abstractmethod
    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """Distances of every patch to its nearest rows of the bank.

        Args:
            patches_ND: patch embeddings, float32.
            num_neighbors: K, 1 <= K <= M.

        Returns:
            distance_NK: Euclidean (not squared), float32, ascending along K; ties are broken by smaller row index.
            index_NK: row indices, int64.

        Raises:
            ValueError: the dims differ or K is out of range.
        """

    @abc.abstractmethod
    def rows(self, index_X: Tensor) -> Tensor:
        """The rows at these indices, float32, (X, D)."""

    @abc.abstractmethod
    def to(self, device: torch.device) -> "Search":
        """This search on a device; returns itself if already there."""

    def bank(self) -> Tensor:
        """All rows, float32 (M, D)."""
        return self.rows(torch.arange(self.num_rows))

    def tensors(self) -> dict[str, Tensor]:
        """Tensors needed besides the bank to restore this search."""
        return {}

    def check(self, patches_ND: Tensor, num_neighbors: int) -> None:
        """Validates the arguments of `nearest`.

        Raises:
            ValueError: the dims differ or K is out of range.
        """
        if patches_ND.shape[1] != self.dims:
            raise ValueError(f"patches have {patches_ND.shape[1]} dims, the bank has {self.dims}")
        if not 1 <= num_neighbors <= self.num_rows:
            raise ValueError(f"{num_neighbors} neighbours requested from a bank of {self.num_rows} rows")


def as_bank(bank_MD: Tensor) -> Tensor:
    """The bank, float32 and contiguous.

    Raises:
        ValueError: it is empty or not two-dimensional.
    """
    if bank_MD.ndim != 2 or bank_MD.shape[0] == 0:
        raise ValueError(f"a memory bank needs at least one row of features, given {tuple(bank_MD.shape)}")
    return bank_MD.float().contiguous()


def settled_distance(rows_XD: Tensor, patches_XD: Tensor) -> Tensor:
    """Euclidean distance of pairs, shape (X,), float32.

    Uses pairwise summation in a fixed order, so the result depends only on the pair, not on the number of pairs, the
    threads or the device. Relative error below `SETTLED`, also near zero.
    """
    return _length(rows_XD - patches_XD)


def _length(squares_XD: Tensor) -> Tensor:
    """Euclidean norm over the last dim; overwrites its input."""
    squares_XD.square_()
    width = squares_XD.shape[-1]
    while width > 1:
        half = width // 2
        squares_XD[..., :half] += squares_XD[..., half : 2 * half]
        if width % 2:
            squares_XD[..., 0] += squares_XD[..., width - 1]
        width = half
    return squares_XD[..., 0].sqrt()


def rerank_exactly(bank_MD: Tensor, patches_ND: Tensor, index_NC: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The K best of C distinct candidate rows (C >= K) by settled distance; ties are broken by row index.

    Processes a few thousand pairs at a time, to fit in cache.
    """
    step = max(1, SETTLED_PAIRS // index_NC.shape[1])
    parts = zip(patches_ND.split(step), index_NC.split(step), strict=True)
    found = [_settle_part(bank_MD, patches, index, num_neighbors) for patches, index in parts]
    return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])


def _settle_part(bank_MD: Tensor, patches_ND: Tensor, index_NC: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    if index_NC.shape[1] == 1:
        return _length(bank_MD[index_NC[:, 0]].sub_(patches_ND))[:, None], index_NC
    index_NC = index_NC.sort(dim=1).values
    distance_NC = _length(bank_MD[index_NC].sub_(patches_ND[:, None]))
    distance_NC, order_NC = distance_NC.sort(dim=1, stable=True)
    return distance_NC[:, :num_neighbors], index_NC.gather(1, order_NC)[:, :num_neighbors]


def merge_answers(
    answers: Sequence[tuple[Tensor, Tensor]], offsets: Sequence[int], num_neighbors: int
) -> tuple[Tensor, Tensor]:
    """The K nearest rows over all shards.

    Args:
        answers: (distance_NK, index_NK) of every shard, in order, with at least min(K, its rows) columns.
        offsets: index of each shard's first row in the whole bank, ascending.
        num_neighbors: K.

    Returns:
        distance_NK and index_NK over the whole bank; ties are broken by smaller row index.
    """
    distance_NC = torch.cat([distance for distance, _ in answers], 1)
    index_NC = torch.cat([index + offset for (_, index), offset in zip(answers, offsets, strict=True)], 1)
    # a stable sort keeps ties in row order, since shards are in order and each answer is sorted
    distance_NC, order_NC = distance_NC.sort(dim=1, stable=True)
    return distance_NC[:, :num_neighbors], index_NC.gather(1, order_NC)[:, :num_neighbors]


def split_bank(num_rows: int, pieces: int) -> list[tuple[int, int]]:
    """(start, stop) of every shard: runs of rows whose sizes differ by at most one.

    Raises:
        ValueError: there are more shards than rows.
    """
    if not 1 <= pieces <= num_rows:
        raise ValueError(f"a bank of {num_rows} rows cannot be cut into {pieces} pieces")
    edges = [number * num_rows // pieces for number in range(pieces + 1)]
    return list(pairwise(edges))


class ShardedSearch(Search):
    """Searches over consecutive shards of one bank; equivalent to one search over the whole bank."""

    def __init__(self, parts: Sequence[Search]) -> None:
        """Combines the searches of the shards.

        Args:
            parts: searches in row order, at least one, all with the same dims.

        Raises:
            ValueError: there are no searches, or their dims differ.
        """
        if not parts or len({part.dims for part in parts}) != 1:
            raise ValueError(f"pieces of one bank must have the same dims, given {[part.dims for part in parts]}")
        self.parts = tuple(parts)
        self.exact = all(part.exact for part in parts)
        self.offsets = tuple(sum(part.num_rows for part in self.parts[:i]) for i in range(len(self.parts)))

    @property
    def num_rows(self) -> int:
        """Number of rows of all shards."""
        return sum(part.num_rows for part in self.parts)

    @property
    def dims(self) -> int:
        """D."""
        return self.parts[0].dims

    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """The K nearest rows over all shards."""
        self.check(patches_ND, num_neighbors)
        answers = [part.nearest(patches_ND, min(num_neighbors, part.num_rows)) for part in self.parts]
        return merge_answers(answers, self.offsets, num_neighbors)

    def rows(self, index_X: Tensor) -> Tensor:
        """Rows by their indices in the whole bank."""
        found_XD = torch.empty((*index_X.shape, self.dims), device=index_X.device)
        for part, offset in zip(self.parts, self.offsets, strict=True):
            mine_X = (index_X >= offset) & (index_X < offset + part.num_rows)
            found_XD[mine_X] = part.rows(index_X[mine_X] - offset)
        return found_XD

    def to(self, device: torch.device) -> "ShardedSearch":
        """All shards on a device."""
        return ShardedSearch([part.to(device) for part in self.parts])
