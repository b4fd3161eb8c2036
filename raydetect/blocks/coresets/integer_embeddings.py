"""Quantises embeddings to small integers, so squared distances and ties are exact.

Each embedding is centred, rounded to integers small enough for exact float32 sums, multiplied by a matrix of plus and
minus ones (also exact), and rounded to 8 bits. The matrix projects to fewer dims; if all are kept it is a rotation by
Hadamard matrices, which spreads outlier values over many dims and doubles the resolution of the 8 bits. Every step is
elementwise or a sum of integers below 2^24, so the result does not depend on block sizes, devices, summation order or
the number of workers.

Shapes: N rows, D feature dim, P projected dims.

Source: a sign matrix preserves distances as well as a Gaussian one: Achlioptas, "Database-friendly random
projections", JCSS 66 (2003), theorem 1.1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import KeyedRows, RowStore
from raydetect.blocks.seeding import keyed_generator

EXACT_BITS = 24  # integers up to 2^24 are exact in float32
LARGEST = 127
ROWS_AT_ONCE = 2048


@dataclass(slots=True)
class IntegerPoints:
    """One worker's rows as int8 points.

    Attributes:
        store: int8 points, (N, P).
        norms_N: squared norms, float32, exact.
        unit: length of one integer step in units of the embeddings (in expectation).
    """

    store: RowStore
    norms_N: Tensor
    unit: float

    def __len__(self) -> int:
        return len(self.norms_N)


@dataclass(frozen=True, slots=True)
class _Quantiser:
    """Quantisation parameters, identical on all workers.

    Attributes:
        mean_D: mean of all embeddings.
        scale: integer steps per unit, before the matrix.
        signs_DP: matrix with entries -1, 0 and 1.
        stretch: factor by which the matrix scales vector lengths (in expectation).
    """

    mean_D: Tensor
    scale: float
    signs_DP: Tensor
    stretch: float

    def wide(self, rows_ND: Tensor) -> Tensor:
        """Rounds and projects rows; integers below 2^24 in float32."""
        return ((rows_ND - self.mean_D) * self.scale).round_() @ self.signs_DP


def integer_points(rows: KeyedRows, projected_dims: int | None, seed: int, group: Group) -> IntegerPoints:
    """Quantises all rows to 8-bit integer points, in three passes.

    Args:
        rows: this worker's rows; a collective call, the other arguments must be the same on all workers.
        projected_dims: P; None or P >= D keeps all dims.
        seed: seed of the projection.
        group: the workers; `Group()` for a single one.
    """
    quantiser = _make_quantiser(rows, projected_dims, seed, group)
    most = torch.zeros(2, dtype=torch.float64)
    for part in _parts(rows.store):
        wide_NP = quantiser.wide(part)
        most[0] = max(float(most[0]), float(wide_NP.abs().max()))
        most[1] = max(float(most[1]), float(wide_NP.to(torch.int64).square_().sum(1).max()))
    largest, norm = (float(value) for value in group.max(most))
    dims = quantiser.signs_DP.shape[1]
    reach = 2.0 ** ((EXACT_BITS - 2) / 2) - 1.0 - math.sqrt(dims) / 2.0  # ensures 4 |p|^2 < 2^24 after rounding
    scale = min(LARGEST / largest, reach / math.sqrt(norm)) if largest else 1.0
    store = RowStore(dims, torch.int8, rows.max_bytes)
    norms = []
    for part in _parts(rows.store):
        points_NP = (quantiser.wide(part) * scale).round_()
        norms.append(points_NP.square().sum(1))
        store.append(points_NP.to(torch.int8))
    unit = 1.0 / (scale * quantiser.scale * quantiser.stretch)
    return IntegerPoints(store, torch.cat(norms) if norms else torch.zeros(0), unit)


def _parts(store: RowStore) -> Iterator[Tensor]:
    for _, block in store.blocks():
        yield from block.split(ROWS_AT_ONCE)


def _make_quantiser(rows: KeyedRows, projected_dims: int | None, seed: int, group: Group) -> _Quantiser:
    dims = rows.store.dims
    largest = float(group.max(torch.tensor([rows.largest], dtype=torch.float64)))
    mean_D = _mean(rows, largest, group)
    bound = largest + float(mean_D.abs().max())
    limit = (2**EXACT_BITS - 1) // dims - 1
    scale = limit / bound if bound else 1.0
    if projected_dims is None or projected_dims >= dims:
        return _Quantiser(mean_D, scale, *_rotation(dims, seed))
    generator = keyed_generator(seed, "projection", dims, projected_dims)
    signs_DP = torch.randint(0, 2, (dims, projected_dims), generator=generator).mul_(2).sub_(1).float()
    return _Quantiser(mean_D, scale, signs_DP, math.sqrt(projected_dims))


def _rotation(dims: int, seed: int) -> tuple[Tensor, float]:
    """A scaled rotation and its scale: shuffled dims, random signs, and the largest Hadamard blocks that fit."""
    generator = keyed_generator(seed, "rotation", dims)
    size = dims & -dims
    block = torch.ones(1, 1)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    signs_D1 = torch.randint(0, 2, (dims, 1), generator=generator).mul_(2).sub_(1).float()
    blocks_DD = torch.block_diag(*[block] * (dims // size)) * signs_D1
    return blocks_DD[torch.randperm(dims, generator=generator)].contiguous(), math.sqrt(size)


def _mean(rows: KeyedRows, largest: float, group: Group) -> Tensor:
    """Mean over all workers' rows, summed in 63-bit integers, so it does not depend on summation order."""
    total = rows.total()
    if not largest:
        return torch.zeros(rows.store.dims)
    scale = 2.0 ** math.floor(math.log2(2.0**62 / (largest * total)))
    scale = min(scale, 2.0**52 / largest)
    sums_D = torch.zeros(rows.store.dims, dtype=torch.int64)
    for part in _parts(rows.store):
        sums_D += (part.double() * scale).round_().to(torch.int64).sum(0)
    return (group.sum(sums_D).double() / scale / total).float()
