"""Simulated defects: their location (Perlin noise) and the blended content.

Every function draws from the given generator, so a defect is determined by its seed.

Shapes: H W pixels, 3 RGB channels.
"""

import math

import torch
from torch import Generator, Tensor

from raydetect.blocks.backbones.vision import InterpolationMode, transforms

PERLIN_OCTAVES = 6
PERLIN_THRESHOLD = 0.5


def uniform(low: float, high: float, generator: Generator) -> float:
    """A uniform random number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def perlin_noise(size_px: tuple[int, int], cells: tuple[int, int], generator: Generator) -> Tensor:
    """Perlin noise, (H, W) float32 in [-1, 1], 0 at the corners of the cells.

    Args:
        size_px: (height, width); need not be multiples of `cells`.
        cells: number of gradient grid cells along height and width.
        generator: draws the gradients.

    Source: Perlin, "Improving noise", SIGGRAPH 2002 (fade function), scaled by sqrt(2) as in DRAEM's code.
    """
    angles = 2 * math.pi * torch.rand(cells[0] + 1, cells[1] + 1, generator=generator)
    down, across = angles.sin(), angles.cos()
    (row_H, y_H), (column_W, x_W) = (_grid_cells(size, count) for size, count in zip(size_px, cells, strict=True))

    def ramp(below: int, right: int) -> Tensor:
        def at(grid: Tensor) -> Tensor:
            return grid.index_select(0, row_H + below).index_select(1, column_W + right)

        return at(down) * (y_H - below)[:, None] + at(across) * (x_W - right)[None]

    fade_y, fade_x = (t * t * t * (t * (t * 6 - 15) + 10) for t in (y_H[:, None], x_W[None]))
    upper = torch.lerp(ramp(0, 0), ramp(0, 1), fade_x)
    lower = torch.lerp(ramp(1, 0), ramp(1, 1), fade_x)
    return math.sqrt(2) * torch.lerp(upper, lower, fade_y)


def _grid_cells(size: int, cells: int) -> tuple[Tensor, Tensor]:
    """The cell of every pixel of an axis, and its offset in the cell; in integers, to avoid rounding errors."""
    steps = torch.arange(size) * cells
    return steps // size, (steps % size).float() / size


def perlin_mask(size_px: tuple[int, int], generator: Generator) -> Tensor:
    """A defect mask, (H, W) bool; may be empty.

    Source: DRAEM, sec. 3.3 and its code: noise with 1 to 32 cells per axis, rotated by up to 90 degrees, above 0.5.
    """
    rows, columns = (2 ** int(torch.randint(PERLIN_OCTAVES, (), generator=generator)) for _ in range(2))
    noise = perlin_noise(size_px, (rows, columns), generator)
    return rotated(noise[None], uniform(-90, 90, generator))[0] > PERLIN_THRESHOLD


def rotated(image_CHW: Tensor, degrees: float) -> Tensor:
    """The image rotated about its centre, bilinear, with zero padding."""
    return transforms.rotate(image_CHW, degrees, interpolation=InterpolationMode.BILINEAR)


def blend(image_3HW: Tensor, source_3HW: Tensor, mask_HW: Tensor, opacity: float) -> Tensor:
    """The image, with `opacity` * source + (1 - `opacity`) * image inside the mask.

    Source: DRAEM, sec. 3.3 (its beta is the opacity); MemSeg, sec. 3.1 (its delta).
    """
    return torch.where(mask_HW, torch.lerp(image_3HW, source_3HW, opacity), image_3HW)


def shuffled_tiles(image_3HW: Tensor, tiles: tuple[int, int], generator: Generator) -> Tensor:
    """The image with its rows x columns equal tiles shuffled; pixels outside the tiles are unchanged.

    Source: MemSeg, sec. 3.1, structural anomalies.
    """
    rows, columns = tiles
    height, width = image_3HW.shape[1] // rows, image_3HW.shape[2] // columns
    inner = image_3HW[:, : rows * height, : columns * width]
    parts = inner.reshape(3, rows, height, columns, width).permute(1, 3, 0, 2, 4).flatten(0, 1)
    parts = parts[torch.randperm(rows * columns, generator=generator)]
    shuffled = image_3HW.clone()
    tiled = parts.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    shuffled[:, : rows * height, : columns * width] = tiled.reshape(inner.shape)
    return shuffled
