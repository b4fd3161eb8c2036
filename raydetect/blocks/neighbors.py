"""Exact nearest rows of a memory bank in torch, without ever writing the patches x bank matrix.

Shapes: N patches, M bank rows, D feature dim, d leading dims, K neighbours, C candidates, G groups of rows.

On CPUs one neighbour is found by pruning: take the bank's d leading principal axes and the length of the rest as one
more coordinate. In these d + 1 coordinates no product of two rows shrinks, so one thin matrix product bounds every
distance from below; a group of bank rows whose smallest bound exceeds a distance already known cannot hold the nearest
row. The groups are leaves of a k-d split of the bank, so few survive, and only these are multiplied in full.

Elsewhere it is a plain product over blocks, in float32 or, to propose candidates, in bfloat16.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.exact_search import (
    BLOCK_ROWS,
    PATCH_ROWS,
    UNIT,
    Candidates,
    ExactSearch,
    Proposer,
    largest_approx,
    least_distance,
    product_share,
)
from raydetect.blocks.product import padded_rows, product

GROUP_ROWS = 128
LEADING_DIMS = 31  # and the rest's length: 32 columns, a whole number of vector registers
PRUNE_FROM_ROWS = 1024
SPLIT_DIMS = 16
HALF_UNIT = 2.0**-8  # largest relative rounding error to bfloat16, which has 8 bits of significand
HALF_CANDIDATES = 16

Precision = Literal["float32", "bfloat16"]


class BankSearch(ExactSearch):
    """Searches one memory bank; exact at either precision, and the same bits.

    Cost that surprises: building with float32 finds the principal axes (an eigendecomposition of D x D) and holds a
    second copy of the bank.
    """

    def __init__(self, bank_MD: Tensor, precision: Precision = "float32") -> None:
        """Prepares the bank.

        Args:
            bank_MD: float32, not empty.
            precision: of the products that propose candidates. bfloat16 pays where its products are much quicker.

        Raises:
            ValueError: the bank is empty or not two-dimensional.
        """
        super().__init__(bank_MD)
        self.precision = precision
        centred_MD = self.bank_MD - self.mean_D
        self.half = HalfProduct(centred_MD) if precision == "bfloat16" else None
        small = self.num_rows < PRUNE_FROM_ROWS
        self.pruner = None if small or self.half or centred_MD.device.type != "cpu" else Pruner(centred_MD)
        self.product = Product(centred_MD) if self.pruner is None else self.pruner.product

    def to(self, device: torch.device) -> "BankSearch":
        """This search on another device; itself when it is there already."""
        return self if self.bank_MD.device == device else BankSearch(self.bank_MD.to(device), self.precision)

    def proposers(self, num_neighbors: int) -> list[Proposer]:
        """bfloat16 first if asked for; pruning for one neighbour on a CPU, else the plain product."""
        careful: Proposer = self.product.propose
        if num_neighbors == 1 and self.pruner is not None:
            careful = self.pruner.propose
        return [careful] if self.half is None else [self.half.propose, careful]


class Product:
    """|b|^2 - 2ab over blocks of the bank in float32, keeping the best."""

    def __init__(self, centred_MD: Tensor, rows_M: Tensor | None = None) -> None:
        """Keeps rows about the bank's mean; `rows_M` are their numbers when they stand in another order."""
        self.rows_M = rows_M
        self.norms_M = centred_MD.square().sum(1)
        self.scaled_MD = -2.0 * centred_MD
        self.share = product_share(centred_MD.shape[1])

    def propose(self, centred_ND: Tensor, num_neighbors: int) -> Candidates:
        """K + 1 candidates, or all rows."""
        return self._propose(centred_ND, num_neighbors + 1, self.share)

    def _propose(self, centred_ND: Tensor, count: int, share: float | Tensor) -> Candidates:
        count = min(count, len(self.norms_M))
        found = [self._best(part, count) for part in centred_ND.split(PATCH_ROWS)]
        index_NC = torch.cat([index for _, index in found])
        if self.rows_M is not None:
            index_NC = self.rows_M[index_NC]
        norm_N = torch.linalg.vector_norm(centred_ND, dim=1)
        worst_N = torch.cat([value[:, -1] for value, _ in found]) + norm_N.square()
        if count == len(self.norms_M):
            worst_N = torch.full_like(worst_N, torch.inf)
        return Candidates(index_NC, least_distance(worst_N, norm_N, share))

    def _best(self, centred_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The C smallest values and their places, ascending."""
        best_NC = centred_ND.new_empty((len(centred_ND), 0))
        index_NC = torch.empty_like(best_NC, dtype=torch.int64)
        for start in range(0, len(self.norms_M), BLOCK_ROWS):
            block = self.block(centred_ND, slice(start, start + BLOCK_ROWS))
            values, places = _smallest(block, min(count, block.shape[1]))
            both, index = torch.cat([best_NC, values], 1), torch.cat([index_NC, places + start], 1)
            best_NC, chosen = both.topk(min(count, both.shape[1]), largest=False)
            index_NC = index.gather(1, chosen)
        return best_NC, index_NC

    def block(self, centred_ND: Tensor, rows: slice) -> Tensor:
        """|b|^2 - 2ab for a run of rows."""
        return product(centred_ND, self.scaled_MD[rows], self.norms_M[rows])


def _smallest(block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `topk`, which is slow for two; overwrites `block`."""
    if count != 2:
        return block.topk(count, largest=False)
    first, place = block.min(1, keepdim=True)
    block.scatter_(1, place, torch.inf)
    second, next_place = block.min(1, keepdim=True)
    return torch.cat([first, second], 1), torch.cat([place, next_place], 1)


class HalfProduct(Product):
    """The same with bfloat16 products and more candidates.

    The bound: let a + e and b + f be the rounded rows. Their product differs from ab by at most (r + s + r s) |a||b|
    with r = |e| / |a| and s = |f| / |b|, which are measured here and never above 2^-8 (8 bits of significand).
    Products of two bfloat16 numbers are exact in float32, and their sum errs as in `product_share`. Where the result
    is rounded to bfloat16 once more (torch on CPUs), 2^-8 (1 + r) (1 + s) |a||b| comes on top. So

        sigma = r + s + r s + 2^-8 (1 + r) (1 + s) + product_share

    bounds the error in the sense of `product_share`: at most 0.012, against 0.00005 in float32 at D = 384.
    """

    def __init__(self, centred_MD: Tensor) -> None:
        """Rounds the bank."""
        super().__init__(centred_MD)
        self.scaled_MD, lost_M = _halved(self.scaled_MD)
        self.lost = float(lost_M.max())
        self.rounds_result = centred_MD.device.type != "cuda"

    def propose(self, centred_ND: Tensor, num_neighbors: int) -> Candidates:
        """`HALF_CANDIDATES` or twice K, or all rows."""
        count = max(2 * num_neighbors, HALF_CANDIDATES)
        return self._propose(centred_ND, count, self.half_share(centred_ND))

    def half_share(self, centred_ND: Tensor) -> Tensor:
        """sigma of every patch, shape (N,)."""
        kept_N = (1 + _halved(centred_ND)[1]) * (1 + self.lost)
        return kept_N - 1 + self.share + (HALF_UNIT * kept_N if self.rounds_result else 0.0)

    def block(self, centred_ND: Tensor, rows: slice) -> Tensor:
        """|b|^2 - 2ab for a run of rows, from bfloat16."""
        half_ND, columns = centred_ND.bfloat16(), self.scaled_MD[rows].T
        if self.rounds_result:
            return self.norms_M[rows] + torch.mm(half_ND, columns)
        return torch.mm(half_ND, columns, out_dtype=torch.float32).add_(self.norms_M[rows])


def _halved(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in bfloat16, and the share of its length that each loses."""
    half_ND = rows_ND.bfloat16()
    lost_N = torch.linalg.vector_norm(rows_ND - half_ND.float(), dim=1)
    return half_ND, lost_N / torch.linalg.vector_norm(rows_ND, dim=1).clamp_min(1e-30) * (1 + 2.0**-10)


class Pruner:
    """Groups of bank rows with thin lower bounds; see the top of the file.

    The bound: with d orthonormal axes, ab = pa pb + qa qb <= pa pb + |qa||qb|, p the leading coordinates and q the
    rest. Computed, p is off by at most eta |a|, eta = sqrt(d) (D + 16) u, and 3 eta |a|^2 is added to |q|^2, so that
    it is never too short. The thin squared distance then exceeds the true one by 2 (2.5 eta + product_share)
    |a| (|a| + dist) at most, which is `product_share` with a larger share.
    """

    def __init__(self, centred_MD: Tensor) -> None:
        """Finds axes and groups."""
        dims = centred_MD.shape[1]
        self.leading = min(LEADING_DIMS, dims)
        self.eta = self.leading**0.5 * (dims + 16) * UNIT
        axes_DD = torch.linalg.eigh(centred_MD.double().T @ centred_MD.double())[1].flip(1)
        self.axes_ED = torch.zeros(self.leading + 1, dims)  # the last row makes room for the rest's length
        self.axes_ED[:-1] = axes_DD[:, : self.leading].T
        self.rows_M = _leaf_order(product(centred_MD, self.axes_ED)[:, : min(SPLIT_DIMS, self.leading)])
        ordered_MD = centred_MD[self.rows_M]
        self.product = Product(ordered_MD, self.rows_M)
        self.thin_share = 2.5 * self.eta + self.product.share
        self.thin_ME = self.thin(ordered_MD, self.product.norms_M).mul_(-2)

    def thin(self, centred_ND: Tensor, square_N: Tensor) -> Tensor:
        """The d leading coordinates and the length of the rest, never too short; (N, E), E = d + 1."""
        thin_NE = product(centred_ND, self.axes_ED)
        short_N = (square_N - thin_NE.square().sum(1)).clamp_min_(0)
        thin_NE[:, -1] = (short_N + 3 * self.eta * square_N).sqrt_()
        return thin_NE

    def propose(self, centred_ND: Tensor, num_neighbors: int) -> Candidates:
        """One candidate, for K = 1."""
        assert num_neighbors == 1
        norm_N = torch.linalg.vector_norm(centred_ND, dim=1)
        square_N = norm_N.square()
        thin_NE = self.thin(centred_ND, square_N)
        bounds_NG = torch.cat([self._group_bounds(part) for part in thin_NE.split(PATCH_ROWS)])
        best = _Best(square_N)
        first_NG = torch.zeros_like(bounds_NG, dtype=torch.bool).scatter_(1, bounds_NG.argmin(1, keepdim=True), True)
        self._open(first_NG, centred_ND, best)
        known_N = (best.value_N + square_N).clamp_min(0).sqrt()
        reach_N = largest_approx(known_N, norm_N, self.thin_share + 4 * self.product.share)
        self._open((bounds_NG <= (reach_N - square_N)[:, None]) & ~first_NG, centred_ND, best)
        opened_N = least_distance(best.next_N + square_N, norm_N, self.product.share)
        closed_N = least_distance(reach_N, norm_N, self.thin_share)
        return Candidates(self.rows_M[best.place_N][:, None], torch.minimum(opened_N, closed_N))

    def _group_bounds(self, thin_NE: Tensor) -> Tensor:
        """Smallest lower bound of |a - b|^2 - |a|^2 in every group, shape (N, G)."""
        found = []
        for start in range(0, len(self.thin_ME), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            block = product(thin_NE, self.thin_ME[rows], self.product.norms_M[rows])
            whole = block.shape[1] // GROUP_ROWS * GROUP_ROWS
            if whole:
                found.append(block[:, :whole].unflatten(1, (-1, GROUP_ROWS)).amin(2))
            if whole < block.shape[1]:
                found.append(block[:, whole:].amin(1, keepdim=True))
        return torch.cat(found, 1)

    def _open(self, needed_NG: Tensor, centred_ND: Tensor, best: "_Best") -> None:
        """Multiplies the needed groups in full and keeps what is nearer."""
        groups, patches = needed_NG.T.nonzero(as_tuple=True)
        counts = torch.bincount(groups, minlength=needed_NG.shape[1]).tolist()
        for group, mine in enumerate(patches.split(counts)):
            if len(mine):
                start = group * GROUP_ROWS
                part_ND = centred_ND[F.pad(mine, (0, padded_rows(len(mine)) - len(mine)))]
                best.take(mine, self.product.block(part_ND, slice(start, start + GROUP_ROWS))[: len(mine)], start)


class _Best:
    """The smallest value of every patch so far, its place, and the smallest of all other rows."""

    def __init__(self, like_N: Tensor) -> None:
        self.value_N, self.next_N = torch.full_like(like_N, torch.inf), torch.full_like(like_N, torch.inf)
        self.place_N = torch.zeros_like(like_N, dtype=torch.int64)

    def take(self, mine: Tensor, block: Tensor, start: int) -> None:
        """Looks at a block of rows from `start` on for the patches `mine`; overwrites it."""
        value, place = block.min(1)
        runner_up = block.scatter_(1, place[:, None], torch.inf).amin(1)
        before = self.value_N[mine]
        beaten = torch.minimum(torch.maximum(before, value), runner_up)
        self.next_N[mine] = torch.minimum(self.next_N[mine], beaten)
        self.value_N[mine] = torch.minimum(before, value)
        self.place_N[mine] = torch.where(value < before, place + start, self.place_N[mine])


def _leaf_order(coordinates_MD: Tensor) -> Tensor:
    """An order of rows in which every run of GROUP_ROWS is a leaf of a k-d split (widest axis, whole leaves)."""
    waiting, done = [torch.arange(len(coordinates_MD))], []
    while waiting:
        rows = waiting.pop()
        if len(rows) <= GROUP_ROWS:
            done.append(rows)
            continue
        part = coordinates_MD[rows]
        axis = int(part.var(0).argmax())
        ranked = rows[part[:, axis].argsort(stable=True)]
        leaves = -(-len(rows) // GROUP_ROWS)
        half = leaves // 2 * GROUP_ROWS
        waiting += [ranked[half:], ranked[:half]]
    return torch.cat(done)
