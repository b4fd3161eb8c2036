"""Defects planted into normal images, to learn from where real ones are not at hand: pasted pieces and noise.

Shapes: C channels (RGB), H W pixels.

Source: Li et al., "CutPaste", CVPR 2021, arXiv 2104.04015, sec. 2.2 (a piece of the image at another place of it, also
long and thin), with ellipses beside rectangles and noise beside pieces.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

AREA = (0.001, 0.04)  # share of the image
ELONGATION = 8.0
TINT = 0.3
NOISE = (0.15, 0.6)
VISIBLE = 8.0  # of 255, as the mean over channels


def plant(image_CHW: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """A uint8 image with one defect, and where it is.

    Args:
        image_CHW: uint8; it stays as it is.
        generator: of the CPU; decides everything.

    Returns:
        planted_CHW: uint8.
        mask_HW: bool, true where a change can be seen; at times, on even ground, nowhere.
    """
    height, width = image_CHW.shape[1:]
    shape_HW = _shape(height, width, generator).to(image_CHW.device)
    make = _piece if _uniform(0, 1, generator) < 0.5 else _noise
    content_CHW = make(image_CHW.float(), generator).clamp(0, 255)
    planted_CHW = torch.where(shape_HW, content_CHW, image_CHW.float()).to(torch.uint8)
    changed_HW = (planted_CHW.float() - image_CHW.float()).abs().mean(0)
    return planted_CHW, changed_HW > VISIBLE


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _shape(height: int, width: int, generator: Generator) -> Tensor:
    """A rectangle or an ellipse of any place, size, elongation and direction, (H, W) bool."""
    area = math.exp(_uniform(math.log(AREA[0]), math.log(AREA[1]), generator)) * height * width
    stretch = math.exp(_uniform(-1, 1, generator) * math.log(ELONGATION) / 2)
    angle = _uniform(0, math.pi, generator)
    down_H1 = torch.arange(height)[:, None] - _uniform(0, height - 1, generator)
    across_1W = torch.arange(width)[None] - _uniform(0, width - 1, generator)
    first_HW = (across_1W * math.cos(angle) + down_H1 * math.sin(angle)).abs() / stretch
    second_HW = (down_H1 * math.cos(angle) - across_1W * math.sin(angle)).abs() * stretch
    if _uniform(0, 1, generator) < 0.5:
        return torch.maximum(first_HW, second_HW) <= max(math.sqrt(area) / 2, 0.5)
    return first_HW.square() + second_HW.square() <= max(area / math.pi, 0.25)


def _piece(image_CHW: Tensor, generator: Generator) -> Tensor:
    """The image shifted around by at least an eighth, in another tint."""
    shifts = [int(size * _uniform(0.125, 0.875, generator)) for size in image_CHW.shape[1:]]
    tint_C11 = 1 + TINT * (2 * torch.rand(len(image_CHW), 1, 1, generator=generator) - 1)
    return torch.roll(image_CHW, shifts, (1, 2)) * tint_C11.to(image_CHW.device)


def _noise(image_CHW: Tensor, generator: Generator) -> Tensor:
    """The image and noise, coarse or fine, of some strength."""
    channels, height, width = image_CHW.shape
    grain = 2 ** int(_uniform(0, 5, generator))
    coarse = torch.randn(1, channels, -(-height // grain), -(-width // grain), generator=generator)
    noise_CHW = F.interpolate(coarse, size=(height, width), mode="bilinear")[0].to(image_CHW.device)
    return image_CHW + 255 * _uniform(*NOISE, generator) * noise_CHW
