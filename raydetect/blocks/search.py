"""What every search of a memory bank answers, and how the answers of pieces become the answer of the whole.

Shapes: N patches, M bank rows, D feature dim, K neighbours, C candidates, X any leading shape.

An exact answer is the K rows with the smallest (settled distance, row number). The settled distance is float32, from
differences summed in one fixed order, so it follows from the two rows alone. Hence every exact search gives the same
bits: by products, pruned, in bfloat16, by faiss, or in pieces on several machines.
"""

import abc
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

SETTLED = 2.0**-18  # a settled distance is within this share of the true one, for D up to 2^20
SETTLED_PAIRS = 2048


class Search(abc.ABC):
    """Nearest rows of one memory bank. Rows have numbers from 0 on, wherever they lie."""

    exact: bool = True
    """Whether `nearest` finds the true nearest rows; distances are those of the found rows either way."""

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
        """Distance of every patch to its nearest rows of the bank.

        Args:
            patches_ND: patch embeddings, float32.
            num_neighbors: K, 1 <= K <= M.

        Returns:
            distance_NK: Euclidean (not squared), float32, ascending along K; ties by the smaller row number.
            index_NK: rows of the bank, int64.

        Raises:
            ValueError: the dims differ or K is out of range.
        """

    @abc.abstractmethod
    def rows(self, index_X: Tensor) -> Tensor:
        """The rows with these numbers, float32, shape (X, D)."""

    @abc.abstractmethod
    def to(self, device: torch.device) -> "Search":
        """This search on another device; itself when it is there already."""

    def bank(self) -> Tensor:
        """All rows, float32 (M, D)."""
        return self.rows(torch.arange(self.num_rows))

    def tensors(self) -> dict[str, Tensor]:
        """What must be saved besides the bank to build this search again."""
        return {}

    def check(self, patches_ND: Tensor, num_neighbors: int) -> None:
        """Refuses a question that makes no sense.

        Raises:
            ValueError: the dims differ or K is out of range.
        """
        if patches_ND.shape[1] != self.dims:
            raise ValueError(f"patches have {patches_ND.shape[1]} dims, the bank has {self.dims}")
        if not 1 <= num_neighbors <= self.num_rows:
            raise ValueError(f"{num_neighbors} neighbours asked of a bank of {self.num_rows} rows")


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

    Halves are added to halves, so the bits depend on nothing but the pair: not on the number of pairs, the threads or
    the device. Relative error below `SETTLED`, also near zero.
    """
    return _length(rows_XD - patches_XD)


def _length(squares_XD: Tensor) -> Tensor:
    """Euclidean norm over the last dim; overwrites what is given."""
    squares_XD.square_()
    width = squares_XD.shape[-1]
    while width > 1:
        half = width // 2
        squares_XD[..., :half] += squares_XD[..., half : 2 * half]
        if width % 2:
            squares_XD[..., 0] += squares_XD[..., width - 1]
        width = half
    return squares_XD[..., 0].sqrt()


def settle(bank_MD: Tensor, patches_ND: Tensor, index_NC: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The K best of C candidate rows (all different, C >= K) by settled distance, ties by row number.

    Pairs are looked at some thousands at a time, so that memory stays small, and in cache.
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
    """The K nearest of the union of pieces.

    Args:
        answers: (distance_NK, index_NK) of every piece, in order of pieces, with at least min(K, its rows) columns.
        offsets: number of each piece's first row in the whole bank, ascending.
        num_neighbors: K.

    Returns:
        distance_NK and index_NK over the whole bank; ties by the smaller row number.
    """
    distance_NC = torch.cat([distance for distance, _ in answers], 1)
    index_NC = torch.cat([index + offset for (_, index), offset in zip(answers, offsets, strict=True)], 1)
    # ties stand in order of rows already: pieces follow each other, and each one's answer is ordered
    distance_NC, order_NC = distance_NC.sort(dim=1, stable=True)
    return distance_NC[:, :num_neighbors], index_NC.gather(1, order_NC)[:, :num_neighbors]


def cut_bank(num_rows: int, pieces: int) -> list[tuple[int, int]]:
    """(start, stop) of every piece: runs of rows whose sizes differ by one at most.

    Raises:
        ValueError: more pieces than rows.
    """
    if not 1 <= pieces <= num_rows:
        raise ValueError(f"a bank of {num_rows} rows cannot be cut into {pieces} pieces")
    edges = [number * num_rows // pieces for number in range(pieces + 1)]
    return list(pairwise(edges))


class ShardedSearch(Search):
    """Several searches over consecutive pieces of one bank; the same answer as one search over the whole."""

    def __init__(self, parts: Sequence[Search]) -> None:
        """Puts pieces together.

        Args:
            parts: searches in order of rows, at least one, all of the same dims.

        Raises:
            ValueError: none is given or the dims differ.
        """
        if not parts or len({part.dims for part in parts}) != 1:
            raise ValueError(f"pieces of one bank have the same dims, given {[part.dims for part in parts]}")
        self.parts = tuple(parts)
        self.exact = all(part.exact for part in parts)
        self.offsets = tuple(sum(part.num_rows for part in self.parts[:i]) for i in range(len(self.parts)))

    @property
    def num_rows(self) -> int:
        """Rows of all pieces."""
        return sum(part.num_rows for part in self.parts)

    @property
    def dims(self) -> int:
        """D."""
        return self.parts[0].dims

    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """The K nearest rows of the union."""
        self.check(patches_ND, num_neighbors)
        answers = [part.nearest(patches_ND, min(num_neighbors, part.num_rows)) for part in self.parts]
        return merge_answers(answers, self.offsets, num_neighbors)

    def rows(self, index_X: Tensor) -> Tensor:
        """Rows by their numbers in the whole bank."""
        found_XD = torch.empty((*index_X.shape, self.dims), device=index_X.device)
        for part, offset in zip(self.parts, self.offsets, strict=True):
            mine_X = (index_X >= offset) & (index_X < offset + part.num_rows)
            found_XD[mine_X] = part.rows(index_X[mine_X] - offset)
        return found_XD

    def to(self, device: torch.device) -> "ShardedSearch":
        """All pieces on another device."""
        return ShardedSearch([part.to(device) for part in self.parts])
