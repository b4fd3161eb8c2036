"""Simplex noise: smooth random textures without preferred directions, summed over octaves.

Shapes: Z slices, H W pixels, N points, V lattice vertices, P pairs of a point and a vertex within reach.
"""

from itertools import product

import torch
from torch import Generator, Tensor

TABLE = 256
STRETCH, SQUISH = -1 / 6, 1 / 3
REACH = 2.0  # squared distance at which a vertex stops to contribute
NORM = 103.0
LONG, SHORT = 11.0, 4.0
OFFSETS_V3 = torch.tensor(
    [offset for offset in product((-1, 0, 1, 2), repeat=3) if max(offset) - min(offset) <= 2 and 0 <= sum(offset) <= 3]
)  # the only vertices that a cell can reach
GRADIENTS = torch.tensor(
    [
        [sign * (LONG if axis == longest else SHORT) for axis, sign in enumerate((x, y, z))]
        for z, y, x in product((1, -1), (1, -1), (-1, 1))
        for longest in range(3)
    ]
)


def simplex_texture(
    size_px: tuple[int, int],
    generator: Generator,
    slices: int = 3,
    octaves: int = 6,
    persistence: float = 0.6,
    period_px: float = 32.0,
) -> Tensor:
    """Slices of 3-D noise, one pixel apart, (Z, H, W) float32; not bounded by 1, as amplitudes of octaves add up.

    Args:
        size_px: (height, width).
        generator: draws the field.
        slices: Z.
        octaves: each has half the period of the previous one.
        persistence: amplitude of an octave relative to the previous one; the first has 1.
        period_px: of the first octave.

    Source: the code of RD++ (CVPR 2023), which draws three slices for the three channels.
    """
    table = torch.randperm(TABLE, generator=generator)
    grid = torch.cartesian_prod(*(torch.arange(float(n)) for n in (slices, *size_px))).flip(1)
    scales = 2.0 ** torch.arange(octaves)
    noise = simplex_noise((grid * scales[:, None, None] / period_px).flatten(0, 1), table)
    amplitudes = persistence ** torch.arange(octaves)
    return (amplitudes @ noise.view(octaves, -1)).view(slices, *size_px)


def simplex_noise(points_N3: Tensor, table: Tensor) -> Tensor:
    """Noise at points (x, y, z), float32 (N) in about [-1, 1]: a sum of gradients over all vertices within reach.

    Args:
        points_N3: float32.
        table: a permutation of 0..255, which selects the gradients.

    Source: Spencer, "OpenSimplex noise" (2014): a simplectic honeycomb, kernel (2 - d^2)^4, 24 gradients. The kernel
    vanishes beyond the vertices that the original enumerates case by case, so the sum is over the same ones.
    """
    base_N3 = (points_N3 + STRETCH * points_N3.sum(1, keepdim=True)).floor()
    inside_N3 = points_N3 - base_N3 - SQUISH * base_N3.sum(1, keepdim=True)
    places_V3 = OFFSETS_V3 + SQUISH * OFFSETS_V3.sum(1, keepdim=True)
    near_NV = torch.cdist(inside_N3, places_V3, compute_mode="donot_use_mm_for_euclid_dist") < REACH**0.5
    point_P, vertex_P = near_NV.nonzero(as_tuple=True)
    delta_P3 = inside_N3[point_P] - places_V3[vertex_P]
    x, y, z = (base_N3.long()[point_P] + OFFSETS_V3[vertex_P]).unbind(1)
    last = TABLE - 1
    chosen_P = table[(table[(table[x & last] + y) & last] + z) & last] % len(GRADIENTS)
    kernel_P = (REACH - delta_P3.square().sum(1)).clamp(min=0).square().square()
    values_P = kernel_P * (GRADIENTS[chosen_P] * delta_P3).sum(1) / NORM
    return torch.zeros(len(points_N3)).index_add(0, point_P, values_P)
