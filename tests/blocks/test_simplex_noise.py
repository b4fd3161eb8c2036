"""Simplex noise against a loop over every vertex of a wide neighbourhood."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from raydetect.blocks.augment.simplex_noise import simplex_noise, simplex_texture
from raydetect.blocks.seeding import keyed_generator

DIRECTIONS = [
    tuple(s * (11 if axis == longest else 4) for axis, s in enumerate((x, y, z)))
    for z, y, x in product((1, -1), (1, -1), (-1, 1))
    for longest in range(3)
]


def slow_noise(point: tuple[float, ...], table: list[int]) -> float:
    """The sum over 7 x 7 x 7 vertices around the point, in float64."""
    skewed = [value - sum(point) / 6 for value in point]
    total = 0.0
    for offset in product(range(-3, 4), repeat=3):
        vertex = [math.floor(s) + o for s, o in zip(skewed, offset, strict=True)]
        delta = [p - (v + sum(vertex) / 3) for p, v in zip(point, vertex, strict=True)]
        kernel = max(0.0, 2 - sum(d * d for d in delta)) ** 4
        place = 0
        for v in vertex:
            place = table[(place + v) % 256]
        total += kernel * sum(g * d for g, d in zip(DIRECTIONS[place % 24], delta, strict=True))
    return total / 103


def table_of(seed: int) -> Tensor:
    return torch.randperm(256, generator=keyed_generator(seed))


def test_noise_is_the_sum_over_all_vertices_within_reach() -> None:
    points = np.random.default_rng(0).uniform(-20, 20, (300, 3))
    table = table_of(1)
    found = simplex_noise(torch.from_numpy(points).float(), table)
    expected = [slow_noise(tuple(point), table.tolist()) for point in points.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert max(map(abs, expected)) > 0.5


def test_a_texture_sums_octaves_of_halved_periods() -> None:
    generator, table = keyed_generator(5), torch.randperm(256, generator=keyed_generator(5))
    texture = simplex_texture((4, 6), generator, octaves=3, persistence=0.6, period_px=8.0)
    for z, y, x in [(0, 0, 0), (2, 3, 5), (1, 0, 4), (0, 3, 1)]:
        octaves = [0.6**k * slow_noise((x * 2**k / 8, y * 2**k / 8, z * 2**k / 8), table.tolist()) for k in range(3)]
        assert float(texture[z, y, x]) == pytest.approx(sum(octaves), abs=1e-4)


def test_noise_is_smooth_and_has_no_mean() -> None:
    line = torch.linspace(0, 40, 40_001)
    values = simplex_noise(torch.stack([line, 0.3 * line, 0.7 * line], 1), table_of(2))
    assert values.diff().abs().max() < 0.01  # a vertex that was forgotten would be a step
    assert values.mean().abs() < 0.05 and 0.1 < values.std() < 0.5
