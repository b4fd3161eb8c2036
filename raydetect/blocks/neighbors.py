"""Exact nearest rows of a memory bank, without ever writing the patches x bank matrix.

Shapes: N patches, M bank rows, D feature dim, K neighbours, G rows of a group.

Idea: rotate by the bank's principal axes and keep the d leading coordinates plus the length of the rest as one more.
In these d + 1 coordinates no distance grows, so one thin matrix product bounds every distance from below; a group of
bank rows whose smallest bound exceeds a distance already known cannot hold the nearest row. The groups are leaves of
a k-d split of the bank, so few survive, and only these are multiplied in full.
"""

import torch
from torch import Tensor

GROUP_ROWS = 128
BLOCK_ROWS = 2048  # rows of the bank in one product: with PATCH_ROWS, 8 MB that stay in cache
PATCH_ROWS = 1024
CALL_ROWS = 16384  # patches that share the walk over groups
LEADING_DIMS = 47  # and the rest's length: 48 columns
PRUNE_FROM_ROWS = 1024
SPLIT_DIMS = 16
# float32 products of centred rows err by less than this share of |a|^2 + |b|^2 (D * 2^-24, D <= 8192, is below it)
SLACK = 1e-5


class BankSearch:
    """Searches one memory bank.

    Exact: a returned row is a true nearest one up to float32 rounding of squared distances (relative to the squared
    norms about the bank's mean), and the returned distance is computed from differences, so it is accurate near zero
    and does not depend on the other patches of the call.

    Cost that surprises: building rotates the bank (an eigendecomposition of D x D) and holds three copies of it.
    """

    def __init__(self, bank_MD: Tensor) -> None:
        """Prepares the bank.

        Args:
            bank_MD: float32, not empty.

        Raises:
            ValueError: the bank is empty or not two-dimensional.
        """
        if bank_MD.ndim != 2 or bank_MD.shape[0] == 0:
            raise ValueError(f"a memory bank needs at least one row of features, given {tuple(bank_MD.shape)}")
        self.bank_MD = bank_MD.float().contiguous()
        self.mean_D = self.bank_MD.double().mean(0).float()
        self.centred_MD = self.bank_MD - self.mean_D
        self.norms_M = self.centred_MD.square().sum(1)
        self.pruner = _Pruner(self.centred_MD) if len(bank_MD) >= PRUNE_FROM_ROWS else None

    def to(self, device: torch.device) -> "BankSearch":
        """This search on another device; itself when it is there already."""
        return self if self.bank_MD.device == device else BankSearch(self.bank_MD.to(device))

    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """Distance of every patch to its nearest rows of the bank.

        Args:
            patches_ND: patch embeddings, float32.
            num_neighbors: K, 1 <= K <= M.

        Returns:
            distance_NK: Euclidean (not squared), float32, ascending along K.
            index_NK: rows of the bank, int64.

        Raises:
            ValueError: the dims differ or K is out of range.

        Source: PatchCore (arXiv 2106.08265), eq. 6 for K = 1.
        """
        num_rows, dims = self.bank_MD.shape
        if patches_ND.shape[1] != dims:
            raise ValueError(f"patches have {patches_ND.shape[1]} dims, the bank has {dims}")
        if not 1 <= num_neighbors <= num_rows:
            raise ValueError(f"{num_neighbors} neighbours asked of a bank of {num_rows} rows")
        found = [self._block(block, num_neighbors) for block in patches_ND.float().split(CALL_ROWS)]
        return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])

    def _block(self, patches_ND: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
        centred_ND = patches_ND - self.mean_D
        if num_neighbors == 1 and self.pruner is not None and patches_ND.device.type == "cpu":
            index_NK = self.pruner.nearest(centred_ND)[:, None]
        else:
            index_NK = torch.cat([self._by_product(part, num_neighbors) for part in centred_ND.split(PATCH_ROWS)])
        return self._settle(patches_ND, index_NK)

    def _by_product(self, centred_ND: Tensor, num_neighbors: int) -> Tensor:
        """Nearest rows by |b|^2 - 2ab over blocks of the bank, keeping the best K."""
        best_NK = centred_ND.new_full((len(centred_ND), num_neighbors), torch.inf)
        index_NK = torch.zeros_like(best_NK, dtype=torch.int64)
        for start in range(0, len(self.centred_MD), BLOCK_ROWS):
            stop = start + BLOCK_ROWS
            block = torch.addmm(self.norms_M[start:stop], centred_ND, self.centred_MD[start:stop].T, alpha=-2)
            values, places = block.topk(min(num_neighbors, block.shape[1]), largest=False)
            both, index = torch.cat([best_NK, values], 1), torch.cat([index_NK, places + start], 1)
            best_NK, chosen = both.topk(num_neighbors, largest=False)
            index_NK = index.gather(1, chosen)
        return index_NK

    def _settle(self, patches_ND: Tensor, index_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Distances from differences, ascending."""
        differences_NKD = self.bank_MD[index_NK] - patches_ND[:, None]
        distance_NK = differences_NKD.square_().sum(-1).sqrt_()
        distance_NK, order_NK = distance_NK.sort(dim=1, stable=True)
        return distance_NK, index_NK.gather(1, order_NK)


class _Pruner:
    """Groups of bank rows with thin lower bounds; see the top of the file."""

    def __init__(self, centred_MD: Tensor) -> None:
        axes_DD = torch.linalg.eigh(centred_MD.double().T @ centred_MD.double())[1].flip(1)
        self.axes_DD = axes_DD.float().contiguous()
        rotated_MD = centred_MD @ self.axes_DD
        self.rows_M = _leaf_order(rotated_MD[:, :SPLIT_DIMS])
        self.rotated_MD = rotated_MD[self.rows_M].contiguous()
        self.norms_M = self.rotated_MD.square().sum(1)
        self.largest = float(self.norms_M.max())
        self.leading = min(LEADING_DIMS, self.rotated_MD.shape[1])
        self.thin_M = self._thin(self.rotated_MD)

    def _thin(self, rotated_ND: Tensor) -> Tensor:
        rest_N1 = rotated_ND[:, self.leading :].square().sum(1, keepdim=True).sqrt()
        return torch.cat([rotated_ND[:, : self.leading], rest_N1], 1)

    def nearest(self, centred_ND: Tensor) -> Tensor:
        """Row of the bank nearest to every patch, int64."""
        rotated_ND = centred_ND @ self.axes_DD
        norms_N = rotated_ND.square().sum(1)
        bounds_NG = torch.cat([self._group_bounds(part) for part in self._thin(rotated_ND).split(PATCH_ROWS)])
        best_N = torch.full_like(norms_N, torch.inf)
        index_N = torch.zeros_like(norms_N, dtype=torch.int64)
        first_NG = torch.zeros_like(bounds_NG, dtype=torch.bool).scatter_(1, bounds_NG.argmin(1, keepdim=True), True)
        self._open(first_NG, rotated_ND, best_N, index_N)
        reach_N1 = (best_N + SLACK * (norms_N + self.largest))[:, None]
        self._open((bounds_NG <= reach_N1) & ~first_NG, rotated_ND, best_N, index_N)
        return self.rows_M[index_N]

    def _group_bounds(self, thin_N: Tensor) -> Tensor:
        """Smallest lower bound of |a - b|^2 - |a|^2 in every group, shape (N, groups)."""
        found = []
        for start in range(0, len(self.thin_M), BLOCK_ROWS):
            stop = start + BLOCK_ROWS
            block = torch.addmm(self.norms_M[start:stop], thin_N, self.thin_M[start:stop].T, alpha=-2)
            whole = block.shape[1] // GROUP_ROWS * GROUP_ROWS
            if whole:
                found.append(block[:, :whole].unflatten(1, (-1, GROUP_ROWS)).amin(2))
            if whole < block.shape[1]:
                found.append(block[:, whole:].amin(1, keepdim=True))
        return torch.cat(found, 1)

    def _open(self, needed_NG: Tensor, rotated_ND: Tensor, best_N: Tensor, index_N: Tensor) -> None:
        """Multiplies the needed groups in full and keeps what is nearer, in place."""
        groups, patches = needed_NG.T.nonzero(as_tuple=True)
        counts = torch.bincount(groups, minlength=needed_NG.shape[1]).tolist()
        for group, mine in enumerate(patches.split(counts)):
            if not len(mine):
                continue
            start, stop = group * GROUP_ROWS, (group + 1) * GROUP_ROWS
            block = torch.addmm(self.norms_M[start:stop], rotated_ND[mine], self.rotated_MD[start:stop].T, alpha=-2)
            value, place = block.min(1)
            nearer = value < best_N[mine]
            best_N[mine] = torch.where(nearer, value, best_N[mine])
            index_N[mine] = torch.where(nearer, place + start, index_N[mine])


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
