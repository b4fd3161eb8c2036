"""Images turned about their centre and changed in light, every one by its own amount.

Shapes: B images, C channels, H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.seeding import keyed_unit


@dataclass(frozen=True, slots=True)
class Transforms:
    """Rotations and changes of light up to a largest one, drawn by key, or evenly spread.

    Attributes:
        seed: keys what is drawn.
        max_degrees: either way.
        brightness: largest relative change.
        contrast: largest relative change.
    """

    seed: int
    max_degrees: float
    brightness: float = 0.0
    contrast: float = 0.0

    def random(self, images_BCHW: Tensor, keys: Sequence[str], *words: int) -> Tensor:
        """Every image transformed by what its key and `words` draw; uint8."""
        return self._changed(images_BCHW, [self._units(key, *words) for key in keys])

    def even(self, images_BCHW: Tensor, number: int, count: int) -> tuple[Tensor, float]:
        """All images turned by one of `count` evenly spread angles, 0 among them, in the light that its number draws.

        Returns:
            The images, uint8, and by how many degrees they were turned.
        """
        turn = 2 * (number - count // 2) / count
        units = [turn, *self._units("even", number)[1:]]
        return self._changed(images_BCHW, [units] * len(images_BCHW)), self.max_degrees * turn

    def _units(self, *words: str | int) -> list[float]:
        """Three numbers in [-1, 1)."""
        return [2 * keyed_unit(self.seed, name, *words) - 1 for name in ("rotation", "brightness", "contrast")]

    def _changed(self, images_BCHW: Tensor, units_B3: list[list[float]]) -> Tensor:
        most = self.max_degrees, self.brightness, self.contrast
        columns = zip(*units_B3, strict=True)
        degrees, bright, steep = ([m * unit for unit in units] for m, units in zip(most, columns, strict=True))
        return relit(rotate(images_BCHW, degrees), bright, steep)


def rotate(images_BCHW: Tensor, degrees_B: Sequence[float], mode: Literal["nearest", "bilinear"] = "nearest") -> Tensor:
    """Turns images counterclockwise and keeps their size; what comes in at the corners is 0.

    Args:
        images_BCHW: of any dtype; uint8 stays uint8.
        degrees_B: one angle for each.
        mode: which pixels are read; `nearest` takes each value from one pixel.
    """
    height, width = images_BCHW.shape[-2:]
    turns = [(math.cos(angle), math.sin(angle)) for angle in map(math.radians, degrees_B)]
    # the grid's units are half the width and half the height, whose ratio comes in where x and y mix
    rows = [[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]] for cos, sin in turns]
    theta_B23 = torch.tensor(rows, dtype=torch.float32, device=images_BCHW.device)
    grid_BHW2 = F.affine_grid(theta_B23, [len(turns), 1, height, width], align_corners=False)
    turned_BCHW = F.grid_sample(images_BCHW.float(), grid_BHW2, mode, "zeros", align_corners=False)
    return turned_BCHW.to(images_BCHW.dtype)


def relit(images_BCHW: Tensor, brightness_B: Sequence[float], contrast_B: Sequence[float]) -> Tensor:
    """Uint8 images with brightness, then contrast about the mean, changed by these shares; 0 changes nothing."""
    if not any(brightness_B) and not any(contrast_B):
        return images_BCHW
    bright, steep = (
        1 + torch.tensor(shares, device=images_BCHW.device).view(-1, 1, 1, 1) for shares in (brightness_B, contrast_B)
    )
    lit = images_BCHW.float() * bright
    grey = lit.mean((1, 2, 3), keepdim=True)
    return (grey + steep * (lit - grey)).round().clamp(0, 255).to(torch.uint8)
