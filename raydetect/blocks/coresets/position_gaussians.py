"""A Gaussian for every position of a pyramid of features, from fewer examples than dims.

A position has the features of the cells of all levels that contain it, D together, and the covariance of n examples at
it plus a multiple r of the identity: A A^T + r I, where the columns of A are the centred examples over sqrt(n - 1).
Neither the covariance (D x D at every position) nor its inverse is formed. With M = A^T A + r I (n x n), the squared
Mahalanobis distance of a difference x is the smallest value of |x - A w|^2 / r + |w|^2, which w = M^-1 A^T x has
(ridge regression). So it is a sum of squares, without the cancellation of the usual form of Woodbury's identity,
|x|^2 / r - x^T A M^-1 A^T x / r. Coarse levels are stored and multiplied once for all positions that share a cell.

Shapes: B images, n examples, P positions = h w of the finest level, C channels and S cells of a level, F positions in
a cell.

Source: Defard et al., "PaDiM", 2020, arXiv 2011.08785, eqs. 1 and 2; Woodbury, "Inverting modified matrices", 1950.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raydetect.errors import ArtifactError

REGULARISATION = 0.01
MEAN, CENTRED = "mean.", "centred."


class PositionGaussians:
    """Mahalanobis distances at every position.

    Attributes:
        mean_SC: mean of the examples, of every level.
        centred_SCn: A, of every level.
    """

    def __init__(
        self, mean_SC: Sequence[Tensor], centred_SCn: Sequence[Tensor], grids: Sequence[tuple[int, int]]
    ) -> None:
        """Inverts M at every position, in float64.

        Args:
            mean_SC: mean of the examples, of every level.
            centred_SCn: A, of every level.
            grids: (height, width) of every level, finest first; each divides the one before.

        Raises:
            ArtifactError: a level has another size.
        """
        for mean, centred, (height, width) in zip(mean_SC, centred_SCn, grids, strict=True):
            if (
                len(mean) != height * width
                or centred.shape[:2] != mean.shape
                or centred.shape[2] != centred_SCn[0].shape[2]
            ):
                raise ArtifactError(f"examples of {height} x {width} cells have the wrong shape. Fit again.")
        self.mean_SC, self.centred_SCn, self.grids = list(mean_SC), list(centred_SCn), list(grids)
        self._inverse_Pnn = self._inverted()

    @classmethod
    def fit(cls, levels: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> "PositionGaussians":
        """From features (n, S, C) of every level, n at least 2."""
        mean_SC = [level_nSC.mean(0) for level_nSC in levels]
        scale = (len(levels[0]) - 1) ** -0.5
        pairs = zip(levels, mean_SC, strict=True)
        centred_SCn = [((level_nSC - mean) * scale).permute(1, 2, 0).contiguous() for level_nSC, mean in pairs]
        return cls(mean_SC, centred_SCn, grids)

    @property
    def num_examples(self) -> int:
        """n."""
        return int(self.centred_SCn[0].shape[2])

    def _inverted(self) -> Tensor:
        """M^-1 at every position, by rows of the coarsest level."""
        count, (coarse_rows, _) = self.num_examples, self.grids[-1]
        device = self.centred_SCn[0].device
        eye_nn = REGULARISATION * torch.eye(count, dtype=torch.float64, device=device)
        found = []
        for row in range(coarse_rows):
            total = eye_nn
            for centred_SCn, (rows, columns) in zip(self.centred_SCn, self.grids, strict=True):
                height = rows // coarse_rows
                part_SCn = centred_SCn[row * height * columns : (row + 1) * height * columns].double()
                total = total + self._spread(part_SCn.transpose(1, 2) @ part_SCn, (height, columns), coarse_rows)
            inverse_Pnn = torch.cholesky_inverse(torch.linalg.cholesky(total))
            found.append(_without_mean(inverse_Pnn).float())
        return torch.cat(found)

    def distance(self, levels: Sequence[Tensor]) -> Tensor:
        """Mahalanobis distance of features (B, C, h, w) of every level at each position of the finest, (B, h, w)."""
        pairs = zip(levels, self.mean_SC, strict=True)
        difference_SBC = [level.flatten(2).permute(2, 0, 1) - mean[:, None] for level, mean in pairs]
        product_PBn = torch.stack(
            [
                self._spread(difference @ centred, grid)
                for difference, centred, grid in zip(difference_SBC, self.centred_SCn, self.grids, strict=True)
            ]
        ).sum(0)
        weight_PBn = product_PBn @ self._inverse_Pnn
        square_PB = weight_PBn.square().sum(2)
        for difference, centred, grid in zip(difference_SBC, self.centred_SCn, self.grids, strict=True):
            square_PB = square_PB + self._unexplained(difference, centred, weight_PBn, grid) / REGULARISATION
        return square_PB.sqrt().T.view(-1, *self.grids[0])

    def _factors(self, grid: tuple[int, int]) -> tuple[int, int]:
        return self.grids[0][0] // grid[0], self.grids[0][1] // grid[1]

    def _spread(self, cells_SXn: Tensor, grid: tuple[int, int], bands: int = 1) -> Tensor:
        """Values of cells (S, X, n) at all positions in them, (P, X, n).

        Args:
            cells_SXn: of one of equal bands of rows of a level, S = height * width.
            grid: (height, width) of the band.
            bands: their number.
        """
        (rows, columns), (down, across) = grid, self._factors((grid[0] * bands, grid[1]))
        wide = cells_SXn.view(rows, 1, columns, 1, *cells_SXn.shape[1:])
        return wide.expand(rows, down, columns, across, *cells_SXn.shape[1:]).reshape(-1, *cells_SXn.shape[1:])

    def _unexplained(
        self, difference_SBC: Tensor, centred_SCn: Tensor, weight_PBn: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """|x - A w|^2 over the channels of a level, (P, B)."""
        (rows, columns), (down, across), batch = grid, self._factors(grid), weight_PBn.shape[1]
        by_cell = weight_PBn.view(rows, down, columns, across, batch, -1).permute(0, 2, 4, 1, 3, 5)
        weight_SXn = by_cell.reshape(rows * columns, batch * down * across, -1)
        fitted_SBFC = (weight_SXn @ centred_SCn.transpose(1, 2)).view(rows * columns, batch, down * across, -1)
        square_SBF = (difference_SBC[:, :, None] - fitted_SBFC).square().sum(3)
        return square_SBF.view(rows, columns, batch, down, across).permute(0, 3, 1, 4, 2).reshape(-1, batch)

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Mean and centred examples by the name of every level."""
        means = {MEAN + name: mean for name, mean in zip(names, self.mean_SC, strict=True)}
        return means | {CENTRED + name: centred for name, centred in zip(names, self.centred_SCn, strict=True)}

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], names: Sequence[str], grids: Sequence[tuple[int, int]]
    ) -> "PositionGaussians":
        """From what `tensors` returned.

        Raises:
            ArtifactError: a tensor is missing, or has the wrong size.
        """
        for name in (prefix + level for prefix in (MEAN, CENTRED) for level in names):
            if name not in tensors:
                raise ArtifactError(f"the artifact has no tensor {name!r}. Fit again.")
        mean_SC, centred_SCn = ([tensors[prefix + level].float() for level in names] for prefix in (MEAN, CENTRED))
        return cls(mean_SC, centred_SCn, grids)

    def to(self, device: torch.device) -> "PositionGaussians":
        """Moves all tensors."""
        moved = PositionGaussians.__new__(PositionGaussians)
        moved.mean_SC, moved.centred_SCn = ([x.to(device) for x in part] for part in (self.mean_SC, self.centred_SCn))
        moved.grids, moved._inverse_Pnn = self.grids, self._inverse_Pnn.to(device)
        return moved


def _without_mean(inverse_Pnn: Tensor) -> Tensor:
    """M^-1 without the direction (1, ..., 1), in which A^T x is 0 but for rounding, which 1 / r would amplify."""
    inverse_Pnn = inverse_Pnn - inverse_Pnn.mean(1, keepdim=True)
    return inverse_Pnn - inverse_Pnn.mean(2, keepdim=True)
