"""Exact search from fast approximations: candidate rows, a proven bound on all others, and exhaustive tie-breaking.

Shapes: N patches, M bank rows, D feature dim, K neighbours, C candidates, P pairs of a patch and a row.

A proposal consists of candidate rows and a lower bound on the distance of all other rows. If the K-th settled candidate
is below the bound, the answer is proven. If not, the next, more precise proposer is used; cases that even the last one
cannot decide (rows at equal distance up to rounding) are settled by computing every row that could win.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydetect.blocks.search.search import SETTLED, Search, as_bank, rerank_exactly, settled_distance

UNIT = 2.0**-24  # maximum relative rounding error of one float32 operation
BLOCK_ROWS = 2048  # bank rows per product: with PATCH_ROWS, 8 MB that fit in cache
PATCH_ROWS = 1024
CALL_ROWS = 16384  # patches per block
TIE_PATCHES = 256
TIE_PAIRS = 16384


@dataclass(frozen=True, slots=True)
class Candidates:
    """A proposal.

    Attributes:
        index_NC: candidate rows, int64, C >= K, distinct.
        least_N: lower bound on the distance of rows outside `index_NC`, float64; inf if there are none.
    """

    index_NC: Tensor
    least_N: Tensor


Proposer = Callable[[Tensor, int], Candidates]
"""Maps (centred patches, K) to candidates."""


def product_share(dims: int) -> float:
    """sigma: |b|^2 - 2ab + |a|^2 in float32 has error at most 2 sigma |a| (|a| + d) + sigma d^2, d the true distance.

    Products of D terms, in any summation order, have error D u |a||b| and D u |b|^2, u = 2^-24 (Higham, Accuracy and
    Stability, eq. 3.5); three additions add 3 u times the terms; centring changes d by u (|a| + |b|); and
    |b| <= |a| + d. Assumes float32 products (no TF32), which is torch's default.
    """
    return 2.0 * (dims + 16) * UNIT


def least_distance(approx_N: Tensor, norm_N: Tensor, share: float | Tensor) -> Tensor:
    """Smallest possible true distance of a row whose computed squared distance is `approx_N`, float64.

    Solves d^2 (1 + s) + 2 s |a| d + 2 s |a|^2 = approx for d; see `product_share`.
    """
    sized_N = share * norm_N.double() * (1 + 2.0**-10)  # the norm itself is rounded
    square_N = (approx_N.double() - 2 * sized_N * norm_N.double()).clamp_min(0) * (1 + share)
    return ((sized_N.square() + square_N).sqrt() - sized_N) / (1 + share)


def largest_approx(distance_N: Tensor, norm_N: Tensor, share: float | Tensor) -> Tensor:
    """Largest possible computed squared distance of a row no farther than `distance_N`, float64."""
    d_N, a_N = distance_N.double(), norm_N.double() * (1 + 2.0**-10)
    return d_N.square() * (1 + share) + 2 * share * a_N * (a_N + d_N)


def rows_where(mask_N: Tensor) -> Tensor:
    """The indices of all True, ascending, int64. Waits for the device, since only it knows how many there are.

    An exact search calls this once, to learn whether all patches are proven: almost always they are, and to compute
    the rescue of none is much slower than to wait. Each step of a rescue calls it again.
    """
    return mask_N.nonzero()[:, 0]


class ExactSearch(Search):
    """A search with proven answers; subclasses propose candidates.

    Note the cost of ties: a patch with many rows at equal distance up to rounding is compared with each of them.
    """

    def __init__(self, bank_MD: Tensor) -> None:
        """Stores the bank.

        Raises:
            ValueError: the bank is empty or not two-dimensional.
        """
        self.bank_MD = as_bank(bank_MD)
        self.mean_D = self.bank_MD.double().mean(0).float()
        self.share = product_share(self.dims)

    @property
    def num_rows(self) -> int:
        """M."""
        return self.bank_MD.shape[0]

    @property
    def dims(self) -> int:
        """D."""
        return self.bank_MD.shape[1]

    @abc.abstractmethod
    def proposers(self, num_neighbors: int) -> Sequence[Proposer]:
        """Candidate proposers, fastest first; at least one."""

    def rows(self, index_X: Tensor) -> Tensor:
        """Rows by index."""
        return self.bank_MD[index_X]

    def bank(self) -> Tensor:
        """All rows, without copying."""
        return self.bank_MD

    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """The K nearest rows; see `Search.nearest`.

        Source: PatchCore (arXiv 2106.08265), eq. 6 for K = 1.
        """
        self.check(patches_ND, num_neighbors)
        patches_ND = patches_ND.float()
        first, *slower = self.proposers(num_neighbors)
        distance_NK, index_NK, proven_N = self._proposed(patches_ND, first, num_neighbors)
        pending_N = rows_where(~proven_N)
        for propose in slower:
            if not len(pending_N):
                break
            distance_PK, index_PK, proven_P = self._proposed(patches_ND[pending_N], propose, num_neighbors)
            distance_NK[pending_N], index_NK[pending_N] = distance_PK, index_PK
            pending_N = pending_N[rows_where(~proven_P)]
        for rows_N in pending_N.split(TIE_PATCHES) if len(pending_N) else ():
            answer = self._settle_ties(patches_ND[rows_N], distance_NK[rows_N, -1])
            distance_NK[rows_N], index_NK[rows_N] = _first_of_each(*answer, len(rows_N), num_neighbors)
        return distance_NK, index_NK

    def _proposed(self, patches_ND: Tensor, propose: Proposer, num_neighbors: int) -> tuple[Tensor, Tensor, Tensor]:
        """Settled distances and indices of the best candidates, and which of the patches they are proven for."""
        found = [self._settled(block_ND, propose, num_neighbors) for block_ND in patches_ND.split(CALL_ROWS)]
        distance_NK, index_NK, proven_N = (torch.cat(parts) for parts in zip(*found, strict=True))
        return distance_NK, index_NK, proven_N

    def _settled(self, patches_ND: Tensor, propose: Proposer, num_neighbors: int) -> tuple[Tensor, Tensor, Tensor]:
        found = propose(patches_ND - self.mean_D, num_neighbors)
        distance_NK, index_NK = rerank_exactly(self.bank_MD, patches_ND, found.index_NC, num_neighbors)
        proven_N = distance_NK[:, -1].double() * (1 + SETTLED) < found.least_N * (1 - SETTLED)
        return distance_NK, index_NK, proven_N

    def _settle_ties(self, patches_ND: Tensor, limit_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(patch, row, settled distance) of all pairs possibly within `limit_N`; rows ascending."""
        centred_ND = patches_ND - self.mean_D
        square_N = centred_ND.square().sum(1)
        allowed_N = largest_approx(limit_N * (1 + 2 * SETTLED), square_N.sqrt(), self.share)
        patch_P, row_P = [], []
        for start in range(0, self.num_rows, BLOCK_ROWS):
            block_MD = self.bank_MD[start : start + BLOCK_ROWS] - self.mean_D
            approx_NM = torch.addmm(block_MD.square().sum(1), centred_ND, block_MD.T, alpha=-2) + square_N[:, None]
            pair_P = rows_where((approx_NM <= allowed_N[:, None]).flatten())
            patch_P.append(pair_P // len(block_MD))
            row_P.append(pair_P % len(block_MD) + start)
        patches, rows = torch.cat(patch_P), torch.cat(row_P)
        pairs = zip(patches.split(TIE_PAIRS), rows.split(TIE_PAIRS), strict=True)
        return patches, rows, torch.cat([settled_distance(self.bank_MD[r], patches_ND[p]) for p, r in pairs])


def _first_of_each(
    patch_P: Tensor, row_P: Tensor, distance_P: Tensor, num_patches: int, num_neighbors: int
) -> tuple[Tensor, Tensor]:
    """The K nearest rows per patch among the pairs; inf and row 0 if there are fewer (non-finite features)."""
    order_P = distance_P.argsort(stable=True)
    order_P = order_P[patch_P[order_P].argsort(stable=True)]
    counts_N = patch_P.new_zeros(num_patches).scatter_add_(0, patch_P, torch.ones_like(patch_P))
    wanted_K = torch.arange(num_neighbors, device=patch_P.device)
    position_NK = (counts_N.cumsum(0) - counts_N)[:, None] + wanted_K
    position_NK = torch.where(wanted_K < counts_N[:, None], position_NK, len(patch_P))
    distance = torch.cat([distance_P[order_P], distance_P.new_full((1,), torch.inf)])
    rows = torch.cat([row_P[order_P], row_P.new_zeros(1)])
    return distance[position_NK], rows[position_NK]
