"""Textures for simulated defects, from images or procedural, and their augmentation.

Shapes: N images, H W pixels, 3 RGB channels; textures are float32 in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from raydetect.blocks.augment.hue import turned_hue
from raydetect.blocks.augment.synthesis import perlin_noise, rotated, uniform
from raydetect.blocks.backbones.vision import transforms

CHANGES = 3
COLOURS = 4
MAX_POINTS = 48

Field = Callable[[tuple[int, int], Generator], Tensor]
Change = Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Textures:
    """A source of textures.

    Attributes:
        images_N3HW: uint8; None = generate procedural textures.
    """

    images_N3HW: Tensor | None = None

    def draw(self, size_px: tuple[int, int], generator: Generator) -> Tensor:
        """One texture at (height, width) `size_px`, (3, H, W)."""
        if self.images_N3HW is None:
            return procedural_texture(size_px, generator)
        index = int(torch.randint(len(self.images_N3HW), (), generator=generator))
        texture = self.images_N3HW[index].float() / 255
        if texture.shape[1:] == size_px:
            return texture
        return F.interpolate(texture[None], size_px, mode="bilinear", antialias=True)[0]


def procedural_texture(size_px: tuple[int, int], generator: Generator) -> Tensor:
    """Clouds, stripes, checks, cells or blocks in random colours or greys, (3, H, W)."""
    field_HW = FIELDS[int(torch.randint(len(FIELDS), (), generator=generator))](size_px, generator)
    colours = torch.rand(COLOURS, 3, generator=generator)
    colours = torch.lerp(colours.mean(1, keepdim=True), colours, uniform(0, 1, generator))
    position_HW = field_HW.clamp(0, 1) * (COLOURS - 1)
    first_HW = position_HW.floor().clamp(max=COLOURS - 2).long()
    share_HW1 = (position_HW - first_HW)[..., None]
    texture = torch.lerp(colours[first_HW], colours[first_HW + 1], share_HW1).permute(2, 0, 1)
    grain = uniform(0, 0.1, generator) * torch.randn(size_px, generator=generator)
    return (texture + grain).clamp(0, 1)


def _clouds(size_px: tuple[int, int], generator: Generator) -> Tensor:
    """Four octaves of Perlin noise."""
    cells = 2 ** int(torch.randint(5, (), generator=generator))
    octaves = [0.5**k * perlin_noise(size_px, (cells << k, cells << k), generator) for k in range(4)]
    return 0.5 + 0.8 * torch.stack(octaves).sum(0)


def _phases(size_px: tuple[int, int], generator: Generator) -> tuple[Tensor, Tensor]:
    """Two rotated, slightly warped coordinates covering several periods."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in size_px), indexing="ij")
    angle, periods = uniform(0, math.pi, generator), uniform(2, 24, generator)
    bend = uniform(0, 2, generator) * perlin_noise(size_px, (4, 4), generator)
    cos, sin = math.cos(angle), math.sin(angle)
    return periods * math.pi * (cos * x + sin * y) + bend, periods * math.pi * (cos * y - sin * x) + bend


def _stripes(size_px: tuple[int, int], generator: Generator) -> Tensor:
    return 0.5 + 0.5 * _phases(size_px, generator)[0].sin()


def _checks(size_px: tuple[int, int], generator: Generator) -> Tensor:
    first, second = _phases(size_px, generator)
    return 0.5 + 0.5 * torch.tanh(4 * first.sin() * second.sin())


def _cells(size_px: tuple[int, int], generator: Generator) -> Tensor:
    """Distance to the nearest of some random points, normalised to a maximum of 1."""
    count = int(torch.randint(4, MAX_POINTS, (), generator=generator))
    points_P2 = torch.rand(count, 2, generator=generator)
    pixels_N2 = torch.cartesian_prod(*(torch.linspace(0, 1, size) for size in size_px))
    nearest_HW = torch.cdist(pixels_N2, points_P2).amin(1).view(size_px)
    return nearest_HW / nearest_HW.max()


def _blocks(size_px: tuple[int, int], generator: Generator) -> Tensor:
    """Random values on a coarse grid, with hard or soft edges."""
    rows, columns = (int(n) for n in torch.randint(4, 33, (2,), generator=generator))
    coarse = torch.rand(1, 1, rows, columns, generator=generator)
    mode = "nearest" if uniform(0, 1, generator) < 0.5 else "bilinear"
    return F.interpolate(coarse, size_px, mode=mode)[0, 0]


FIELDS: tuple[Field, ...] = (_clouds, _stripes, _checks, _cells, _blocks)


def varied(texture_3HW: Tensor, generator: Generator) -> Tensor:
    """Applies three of ten random colour, sharpness and rotation changes, (3, H, W) in [0, 1].

    Source: DRAEM, sec. 3.3; changes and ranges as in its code.
    """
    for number in torch.randperm(len(VARIATIONS), generator=generator)[:CHANGES].tolist():
        texture_3HW = VARIATIONS[number](texture_3HW, generator).clamp(0, 1)
    return texture_3HW


def adjusted(image_3HW: Tensor, generator: Generator) -> Tensor:
    """Random flip, rotation, brightness, hue and saturation, (3, H, W) in [0, 1].

    Source: MemSeg, sec. 3.1, structural defects; it gives no ranges, so those of `varied` are used.
    """
    if uniform(0, 1, generator) < 0.5:
        image_3HW = image_3HW.flip(2)
    for change in (_rotated, _brightness, _hue_and_saturation):
        image_3HW = change(image_3HW, generator).clamp(0, 1)
    return image_3HW


def _gamma(texture: Tensor, generator: Generator) -> Tensor:
    return texture ** (0.5 + 1.5 * torch.rand(3, 1, 1, generator=generator))


def _brightness(texture: Tensor, generator: Generator) -> Tensor:
    return texture * uniform(0.8, 1.2, generator) + uniform(-30, 30, generator) / 255


def _sharpness(texture: Tensor, generator: Generator) -> Tensor:
    return transforms.adjust_sharpness(texture, uniform(0, 2, generator))


def _hue_and_saturation(texture: Tensor, generator: Generator) -> Tensor:
    hue, saturation = uniform(-50, 50, generator) / 255, uniform(-50, 50, generator) / 255
    return transforms.adjust_saturation(turned_hue(texture, hue), 1 + saturation)


def _solarised(texture: Tensor, generator: Generator) -> Tensor:
    if uniform(0, 1, generator) < 0.5:
        return texture
    return transforms.solarize(texture, uniform(32, 128, generator) / 255)


def _posterised(texture: Tensor, generator: Generator) -> Tensor:
    levels = 2.0 ** int(torch.randint(1, 9, (), generator=generator))
    return (texture * 255 / 256 * levels).floor() / levels


def _inverted(texture: Tensor, generator: Generator) -> Tensor:
    return 1 - texture


def _autocontrast(texture: Tensor, generator: Generator) -> Tensor:
    return transforms.autocontrast(texture)


def _equalised(texture: Tensor, generator: Generator) -> Tensor:
    return transforms.equalize((texture * 255).round().to(torch.uint8)).float() / 255


def _rotated(texture: Tensor, generator: Generator) -> Tensor:
    return rotated(texture, uniform(-45, 45, generator))


VARIATIONS: tuple[Change, ...] = (
    _gamma,
    _brightness,
    _sharpness,
    _hue_and_saturation,
    _solarised,
    _posterised,
    _inverted,
    _autocontrast,
    _equalised,
    _rotated,
)
