"""Exact nearest rows of a memory bank in torch, without materialising the patches x bank matrix.

Shapes: N patches, M bank rows, D feature dim, d leading dims, K neighbours, C candidates, G groups of rows.

On CPUs, a single neighbour is found by pruning: rows are projected onto the bank's d leading principal axes, plus the
residual norm as one more coordinate. In these d + 1 coordinates inner products never decrease, so one thin matrix
product gives lower bounds on all distances; a group of bank rows whose smallest bound exceeds a known distance cannot
contain the nearest row. Groups are leaves of a k-d split of the bank, so few remain, and only these are multiplied in
full.

Otherwise it is a blocked matrix product in float32 or, to propose candidates, in bfloat16.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.search.exact_search import (
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
from raydetect.blocks.search.matrix_product import padded_rows, product

GROUP_ROWS = 128
LEADING_DIMS = 31  # plus the residual norm: 32 columns, a multiple of the vector width
PRUNE_FROM_ROWS = 1024
SPLIT_DIMS = 16
HALF_UNIT = 2.0**-8  # maximum relative rounding error of bfloat16, which has 8 significant bits
HALF_CANDIDATES = 16

Precision = Literal["float32", "bfloat16"]


class BankSearch(ExactSearch):
    """Searches one memory bank; exact and bit-identical at either precision.

    Note the cost of construction: float32 on a CPU computes the principal axes (an eigendecomposition of D x D) and
    stores a second copy of the bank.
    """

    def __init__(self, bank_MD: Tensor, precision: Precision = "float32") -> None:
        """Prepares the bank.

        Args:
            bank_MD: float32, not empty.
            precision: precision of the candidate products; bfloat16 pays off on hardware with much faster bfloat16.

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
        """This search on a device; returns itself if already there."""
        return self if self.bank_MD.device == device else BankSearch(self.bank_MD.to(device), self.precision)

    def proposers(self, num_neighbors: int) -> list[Proposer]:
        """bfloat16 first if selected; then pruning for one neighbour on a CPU, else the plain product."""
        precise: Proposer = self.product.propose
        if num_neighbors == 1 and self.pruner is not None:
            precise = self.pruner.propose
        return [precise] if self.half is None else [self.half.propose, precise]


class Product:
    """|b|^2 - 2ab over blocks of the bank in float32, keeping the smallest."""

    def __init__(self, centred_MD: Tensor, rows_M: Tensor | None = None) -> None:
        """Stores centred rows; `rows_M` are their indices in the bank if they are reordered."""
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
        """The C smallest values and their indices, ascending."""
        best_NC = centred_ND.new_empty((len(centred_ND), 0))
        index_NC = torch.empty_like(best_NC, dtype=torch.int64)
        for start in range(0, len(self.norms_M), BLOCK_ROWS):
            block = self.block(centred_ND, slice(start, start + BLOCK_ROWS))
            values, columns = _smallest(block, min(count, block.shape[1]))
            both, index = torch.cat([best_NC, values], 1), torch.cat([index_NC, columns + start], 1)
            best_NC, chosen = both.topk(min(count, both.shape[1]), largest=False)
            index_NC = index.gather(1, chosen)
        return best_NC, index_NC

    def block(self, centred_ND: Tensor, rows: slice) -> Tensor:
        """|b|^2 - 2ab for a slice of rows."""
        return product(centred_ND, self.scaled_MD[rows], self.norms_M[rows])


def _smallest(block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Like `topk`, with a faster path for two; overwrites `block`."""
    if count != 2:
        return block.topk(count, largest=False)
    first, index = block.min(1, keepdim=True)
    block.scatter_(1, index, torch.inf)
    second, next_index = block.min(1, keepdim=True)
    return torch.cat([first, second], 1), torch.cat([index, next_index], 1)


class HalfProduct(Product):
    """`Product` with bfloat16 products and more candidates.

    The bound: let a + e and b + f be the rounded rows. Their product differs from ab by at most (r + s + r s) |a||b|
    with r = |e| / |a| and s = |f| / |b|, which are measured here and at most 2^-8 (8 significant bits). Products of two
    bfloat16 numbers are exact in float32, and their sum has the error of `product_share`. If the result is again
    rounded to bfloat16 (torch on CPUs), 2^-8 (1 + r) (1 + s) |a||b| is added. So

        sigma = r + s + r s + 2^-8 (1 + r) (1 + s) + product_share

    bounds the error in the sense of `product_share`: at most 0.012, compared to 0.00005 in float32 at D = 384.
    """

    def __init__(self, centred_MD: Tensor) -> None:
        """Rounds the bank."""
        super().__init__(centred_MD)
        self.scaled_MD, lost_M = _halved(self.scaled_MD)
        self.lost = lost_M.max()  # on the device: reading it would wait
        self.rounds_result = centred_MD.device.type != "cuda"

    def propose(self, centred_ND: Tensor, num_neighbors: int) -> Candidates:
        """max(`HALF_CANDIDATES`, 2 K) candidates, or all rows."""
        count = max(2 * num_neighbors, HALF_CANDIDATES)
        return self._propose(centred_ND, count, self.half_share(centred_ND))

    def half_share(self, centred_ND: Tensor) -> Tensor:
        """sigma per patch, (N,)."""
        kept_N = (1 + _halved(centred_ND)[1]) * (1 + self.lost)
        return kept_N - 1 + self.share + (HALF_UNIT * kept_N if self.rounds_result else 0.0)

    def block(self, centred_ND: Tensor, rows: slice) -> Tensor:
        """|b|^2 - 2ab for a slice of rows, in bfloat16."""
        half_ND, columns = centred_ND.bfloat16(), self.scaled_MD[rows].T
        if self.rounds_result:
            return self.norms_M[rows] + torch.mm(half_ND, columns)
        return torch.mm(half_ND, columns, out_dtype=torch.float32).add_(self.norms_M[rows])


def _halved(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in bfloat16, and the relative norm of each row's rounding error."""
    half_ND = rows_ND.bfloat16()
    lost_N = torch.linalg.vector_norm(rows_ND - half_ND.float(), dim=1)
    return half_ND, lost_N / torch.linalg.vector_norm(rows_ND, dim=1).clamp_min(1e-30) * (1 + 2.0**-10)


class Pruner:
    """Groups of bank rows with low-dimensional lower bounds; see the module docstring.

    The bound: with d orthonormal axes, ab = pa pb + qa qb <= pa pb + |qa||qb|, p the leading coordinates and q the
    residual. The computed p has error at most eta |a|, eta = sqrt(d) (D + 16) u, and 3 eta |a|^2 is added to |q|^2, so
    it is never underestimated. The thin squared distance then exceeds the true one by at most
    2 (2.5 eta + product_share) |a| (|a| + dist), which is `product_share` with a larger share.
    """

    def __init__(self, centred_MD: Tensor) -> None:
        """Computes the axes and the groups."""
        dims = centred_MD.shape[1]
        self.leading = min(LEADING_DIMS, dims)
        self.eta = self.leading**0.5 * (dims + 16) * UNIT
        axes_DD = torch.linalg.eigh(centred_MD.double().T @ centred_MD.double())[1].flip(1)
        self.axes_ED = torch.zeros(self.leading + 1, dims)  # the last row is a placeholder for the residual norm
        self.axes_ED[:-1] = axes_DD[:, : self.leading].T
        self.rows_M = _leaf_order(product(centred_MD, self.axes_ED)[:, : min(SPLIT_DIMS, self.leading)])
        ordered_MD = centred_MD[self.rows_M]
        self.product = Product(ordered_MD, self.rows_M)
        self.thin_share = 2.5 * self.eta + self.product.share
        self.thin_ME = self.thin(ordered_MD, self.product.norms_M).mul_(-2)

    def thin(self, centred_ND: Tensor, square_N: Tensor) -> Tensor:
        """The d leading coordinates and the residual norm, never underestimated; (N, E), E = d + 1."""
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
        return Candidates(self.rows_M[best.row_N][:, None], torch.minimum(opened_N, closed_N))

    def _group_bounds(self, thin_NE: Tensor) -> Tensor:
        """Smallest lower bound of |a - b|^2 - |a|^2 per group, (N, G)."""
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
        """Multiplies the needed groups in full and keeps the nearest rows."""
        groups, patches = needed_NG.T.nonzero(as_tuple=True)
        counts = torch.bincount(groups, minlength=needed_NG.shape[1]).tolist()
        for group, mine in enumerate(patches.split(counts)):
            if len(mine):
                start = group * GROUP_ROWS
                part_ND = centred_ND[F.pad(mine, (0, padded_rows(len(mine)) - len(mine)))]
                best.take(mine, self.product.block(part_ND, slice(start, start + GROUP_ROWS))[: len(mine)], start)


class _Best:
    """The smallest value per patch so far, its row, and the smallest value of all other rows."""

    def __init__(self, like_N: Tensor) -> None:
        self.value_N, self.next_N = torch.full_like(like_N, torch.inf), torch.full_like(like_N, torch.inf)
        self.row_N = torch.zeros_like(like_N, dtype=torch.int64)

    def take(self, mine: Tensor, block: Tensor, start: int) -> None:
        """Updates the patches `mine` with a block of rows starting at `start`; overwrites the block."""
        value, column = block.min(1)
        runner_up = block.scatter_(1, column[:, None], torch.inf).amin(1)
        before = self.value_N[mine]
        beaten = torch.minimum(torch.maximum(before, value), runner_up)
        self.next_N[mine] = torch.minimum(self.next_N[mine], beaten)
        self.value_N[mine] = torch.minimum(before, value)
        self.row_N[mine] = torch.where(value < before, column + start, self.row_N[mine])


def _leaf_order(coordinates_MD: Tensor) -> Tensor:
    """A row order in which every run of GROUP_ROWS is a leaf of a k-d split (along the widest axis, full leaves)."""
    pending, leaves = [torch.arange(len(coordinates_MD))], []
    while pending:
        rows = pending.pop()
        if len(rows) <= GROUP_ROWS:
            leaves.append(rows)
            continue
        part = coordinates_MD[rows]
        axis = int(part.var(0).argmax())
        ranked = rows[part[:, axis].argsort(stable=True)]
        count = -(-len(rows) // GROUP_ROWS)
        half = count // 2 * GROUP_ROWS
        pending += [ranked[half:], ranked[:half]]
    return torch.cat(leaves)
