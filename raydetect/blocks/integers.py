"""Embeddings as small integers, so that every squared distance is exact and ties are real ties.

Each embedding is centred, rounded to integers fine enough for exact float32 sums, multiplied by a matrix of plus and
minus ones (exact too), and rounded to 8 bits. The matrix projects to fewer dims; where all are kept it is a rotation
by Hadamard matrices, which spreads large single values over many dims, so that 8 bits are twice as fine. Every step is
element by element or a sum of integers below 2^24, so the result does not depend on block sizes, devices, the order of
summation or the number of workers.

Shapes: N rows, D feature dim, P projected dims.

Source: a matrix of signs keeps distances as well as a Gaussian one does: Achlioptas, "Database-friendly random
projections", JCSS 66 (2003), theorem 1.1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raydetect.blocks.group import Group
from raydetect.blocks.rows import KeyedRows, RowStore
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
        unit: length in the units of the embeddings that one integer step stands for (in expectation).
    """

    store: RowStore
    norms_N: Tensor
    unit: float

    def __len__(self) -> int:
        return len(self.norms_N)


@dataclass(frozen=True, slots=True)
class _Rule:
    """How embeddings become integers; the same on every worker.

    Attributes:
        mean_D: of all embeddings.
        scale: integers per unit before the matrix.
        signs_DP: entries -1, 0 and 1.
        stretch: factor by which the matrix lengthens a vector (in expectation).
    """

    mean_D: Tensor
    scale: float
    signs_DP: Tensor
    stretch: float

    def wide(self, rows_ND: Tensor) -> Tensor:
        """Integers below 2^24 in float32: rounded, then multiplied."""
        return ((rows_ND - self.mean_D) * self.scale).round_() @ self.signs_DP


def integer_points(rows: KeyedRows, projected_dims: int | None, seed: int, group: Group) -> IntegerPoints:
    """The 8-bit integer points of all rows; three passes over them.

    Args:
        rows: this worker's rows; all workers call with the same other arguments.
        projected_dims: P; None or P >= D keeps all dims.
        seed: keys the projection.
        group: the workers; alone it is `Group()`.
    """
    rule = _rule(rows, projected_dims, seed, group)
    most = torch.zeros(2, dtype=torch.float64)
    for part in _parts(rows.store):
        wide_NP = rule.wide(part)
        most[0] = max(float(most[0]), float(wide_NP.abs().max()))
        most[1] = max(float(most[1]), float(wide_NP.to(torch.int64).square_().sum(1).max()))
    largest, norm = (float(value) for value in group.max(most))
    dims = rule.signs_DP.shape[1]
    reach = 2.0 ** ((EXACT_BITS - 2) / 2) - 1.0 - math.sqrt(dims) / 2.0  # so that 4 |p|^2 < 2^24 after rounding
    scale = min(LARGEST / largest, reach / math.sqrt(norm)) if largest else 1.0
    store = RowStore(dims, torch.int8, rows.max_bytes)
    norms = []
    for part in _parts(rows.store):
        points_NP = (rule.wide(part) * scale).round_()
        norms.append(points_NP.square().sum(1))
        store.append(points_NP.to(torch.int8))
    unit = 1.0 / (scale * rule.scale * rule.stretch)
    return IntegerPoints(store, torch.cat(norms) if norms else torch.zeros(0), unit)


def _parts(store: RowStore) -> Iterator[Tensor]:
    for _, block in store.blocks():
        yield from block.split(ROWS_AT_ONCE)


def _rule(rows: KeyedRows, projected_dims: int | None, seed: int, group: Group) -> _Rule:
    dims = rows.store.dims
    largest = float(group.max(torch.tensor([rows.largest], dtype=torch.float64)))
    mean_D = _mean(rows, largest, group)
    bound = largest + float(mean_D.abs().max())
    limit = (2**EXACT_BITS - 1) // dims - 1
    scale = limit / bound if bound else 1.0
    if projected_dims is None or projected_dims >= dims:
        return _Rule(mean_D, scale, *_rotation(dims, seed))
    generator = keyed_generator(seed, "projection", dims, projected_dims)
    signs_DP = torch.randint(0, 2, (dims, projected_dims), generator=generator).mul_(2).sub_(1).float()
    return _Rule(mean_D, scale, signs_DP, math.sqrt(projected_dims))


def _rotation(dims: int, seed: int) -> tuple[Tensor, float]:
    """A rotation up to its stretch: shuffled dims, random signs, and Hadamard blocks as large as divides the dims."""
    generator = keyed_generator(seed, "rotation", dims)
    size = dims & -dims
    block = torch.ones(1, 1)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    signs_D1 = torch.randint(0, 2, (dims, 1), generator=generator).mul_(2).sub_(1).float()
    blocks_DD = torch.block_diag(*[block] * (dims // size)) * signs_D1
    return blocks_DD[torch.randperm(dims, generator=generator)].contiguous(), math.sqrt(size)


def _mean(rows: KeyedRows, largest: float, group: Group) -> Tensor:
    """Mean over the rows of all workers, summed in 63-bit integers, so that no order of summation shows."""
    total = rows.total()
    if not largest:
        return torch.zeros(rows.store.dims)
    scale = 2.0 ** math.floor(math.log2(2.0**62 / (largest * total)))
    scale = min(scale, 2.0**52 / largest)
    sums_D = torch.zeros(rows.store.dims, dtype=torch.int64)
    for part in _parts(rows.store):
        sums_D += (part.double() * scale).round_().to(torch.int64).sum(0)
    return (group.sum(sums_D).double() / scale / total).float()
