"""A Gaussian over keyed rows, bit-identical for any number of workers, since integer sums do not depend on order.

Shapes: N rows, D dims.

Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", J. Multivariate
Analysis 88 (2004), lemmas 3.2-3.4, for the shrinkage.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import KeyedRows
from raydetect.errors import SpecError

VALUE_BITS = 20  # at most, for the largest value; centred values need one more, their products 42
BLOCK = 1 << 10  # rows whose products float64 sums exactly: 42 + 10 bits
SUM_BITS = 62


@dataclass(frozen=True, slots=True)
class Moments:
    """Sufficient statistics of a Gaussian with shrinkage.

    Attributes:
        count: N.
        mean_D: float64.
        covariance_DD: float64, divided by N.
        fourth: mean fourth power of the rows' distances to the mean.
    """

    count: int
    mean_D: Tensor
    covariance_DD: Tensor
    fourth: float


class Gaussian(nn.Module):
    """Mahalanobis distance of rows; not trained by gradients."""

    def __init__(self, dims: int) -> None:
        """A standard normal of `dims` dims."""
        super().__init__()
        self.mean_D: Tensor
        self.precision_DD: Tensor
        self.register_buffer("mean_D", torch.zeros(dims, dtype=torch.float64))
        self.register_buffer("precision_DD", torch.eye(dims, dtype=torch.float64))

    def forward(self, rows_ND: Tensor) -> Tensor:
        """Mahalanobis distance of every row, float64."""
        centred_ND = rows_ND.double() - self.mean_D
        return ((centred_ND @ self.precision_DD) * centred_ND).sum(-1).clamp_min(0).sqrt()

    def gradient(self, rows_ND: Tensor) -> Tensor:
        """Gradient of every row's distance with respect to the row, float64; zero at the mean."""
        centred_ND = rows_ND.double() - self.mean_D
        gradient_ND = centred_ND @ self.precision_DD
        distance_N1 = (gradient_ND * centred_ND).sum(-1, keepdim=True).clamp_min(0).sqrt()
        return gradient_ND / distance_N1.clamp_min(torch.finfo(torch.float64).tiny)


def fit_gaussian(rows: KeyedRows) -> tuple[Gaussian, float]:
    """The Gaussian of all workers' rows with Ledoit-Wolf shrinkage, and the shrinkage.

    A collective call; the result is bit-identical on all workers.

    Raises:
        SpecError: all rows are equal, so no distance is defined.
    """
    found = moments(rows)
    shrinkage = ledoit_wolf(found)
    dims = len(found.mean_D)
    target = float(found.covariance_DD.trace()) / dims
    if target <= 0:
        raise SpecError(
            f"all {found.count:,} embeddings are equal, so no Gaussian can be fitted. Add normal images that differ."
        )
    shrunk_DD = (1 - shrinkage) * found.covariance_DD
    shrunk_DD.diagonal().add_(shrinkage * target)
    gaussian = Gaussian(dims)
    gaussian.mean_D.copy_(found.mean_D)
    gaussian.precision_DD.copy_(torch.cholesky_inverse(torch.linalg.cholesky(shrunk_DD)))
    return gaussian, shrinkage


def moments(rows: KeyedRows) -> Moments:
    """Mean and covariance of all workers' rows.

    Values are rounded to 2 ** -20 of the largest, itself rounded up to a power of two; all following steps up to the
    final division are exact integer arithmetic. Above 2 ** 20 rows, each factor of four costs one bit.

    Raises:
        SpecError: there are no rows.
    """
    count = rows.total()
    if count == 0:
        raise SpecError("there are no rows to fit a Gaussian on. Add normal images.")
    bits = min(VALUE_BITS, (SUM_BITS - math.ceil(math.log2(count))) // 2 - 1)
    largest = float(rows.group.max(torch.tensor([rows.largest], dtype=torch.float64))[0])
    unit = 2.0 ** (math.ceil(math.log2(largest)) - bits) if largest else 1.0
    total_D = rows.group.sum(_sum(rows, unit))
    centre_D = (2 * total_D + count) // (2 * count)
    products_DD, fourth = _centred_sums(rows, unit, centre_D)
    products_DD = rows.group.sum(products_DD).double()
    fourth = _exact_sum(fourth, rows.group)
    shift_D = (total_D - count * centre_D).double() / count
    covariance_DD = products_DD / count - torch.outer(shift_D, shift_D)
    return Moments(count, (centre_D + shift_D) * unit, covariance_DD * unit**2, fourth / count * unit**4)


def _sum(rows: KeyedRows, unit: float) -> Tensor:
    total_D = torch.zeros(rows.store.dims, dtype=torch.int64)
    for _, block_ND in rows.store.blocks():
        total_D += (block_ND.double() / unit).round().long().sum(0)
    return total_D


def _centred_sums(rows: KeyedRows, unit: float, centre_D: Tensor) -> tuple[Tensor, int]:
    """Sums over this worker's rows of outer products, and of fourth powers of distances to the centre."""
    products_DD = torch.zeros((len(centre_D), len(centre_D)), dtype=torch.int64)
    fourth = 0
    for _, block_ND in rows.store.blocks():
        for part_ND in block_ND.split(BLOCK):
            whole_ND = (part_ND.double() / unit).round() - centre_D
            products_DD += (whole_ND.T @ whole_ND).long()
            squares_N = whole_ND.long().square().sum(1)
            fourth += sum(square**2 for square in squares_N.tolist())
    return products_DD, fourth


def _exact_sum(value: int, group: Group) -> int:
    """Sum of arbitrary-precision integers over all workers."""
    return sum(int(text) for text in group.gather_bytes(str(value).encode()))


def ledoit_wolf(found: Moments) -> float:
    """Weight of the scaled identity that minimises the covariance's expected squared error (lemma 3.4)."""
    dims = len(found.mean_D)
    target = float(found.covariance_DD.trace()) / dims
    size = float(found.covariance_DD.square().sum()) / dims
    spread = size - target**2  # d^2
    error = (found.fourth / dims - size) / found.count  # b^2 before clipping to d^2
    return 1.0 if spread <= 0 else min(max(error, 0.0), spread) / spread
