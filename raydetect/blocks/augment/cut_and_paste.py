"""CutPaste augmentations: cut and paste image patches, colour jitter and shifts.

Every function draws from the given generator, so results are determined by its seed.

Shapes: C channels (RGB), H W pixels; images are float32 in [0, 1].

Source: Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021, arXiv
2104.04015, sec. 2.2.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from raydetect.blocks.augment.hue import turned_hue
from raydetect.blocks.backbones.vision import transforms

Range = tuple[float, float]


def uniform(random: Generator, low: float, high: float) -> float:
    """A uniform random number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=random))


def place(random: Generator, most: int) -> int:
    """A random integer in [0, most]."""
    return int(torch.randint(0, most + 1, (), generator=random))


def jittered(image_CHW: Tensor, strength: float, random: Generator) -> Tensor:
    """Jitters brightness, contrast, saturation and hue by up to `strength`, in random order, as torchvision does."""
    if strength == 0:
        return image_CHW
    steps: list[Callable[[Tensor, float], Tensor]] = [
        transforms.adjust_brightness,
        transforms.adjust_contrast,
        transforms.adjust_saturation,
    ]
    factors = [uniform(random, max(0.0, 1 - strength), 1 + strength) for _ in steps]
    steps.append(turned_hue)
    factors.append(uniform(random, -strength, strength))
    for number in torch.randperm(len(steps), generator=random).tolist():
        image_CHW = steps[number](image_CHW, factors[number])
    return image_CHW


def shifted(image_CHW: Tensor, ratio: float, random: Generator) -> Tensor:
    """Shifts the image by up to `ratio` of its height and width, with reflection padding."""
    height, width = image_CHW.shape[1:]
    down, across = int(ratio * height), int(ratio * width)
    padded_CHW = F.pad(image_CHW[None], (across, across, down, down), mode="reflect")[0]
    return cropped(padded_CHW, (height, width), random)


def cropped(image_CHW: Tensor, size_px: tuple[int, int], random: Generator) -> Tensor:
    """A random crop of (height, width)."""
    top = place(random, image_CHW.shape[1] - size_px[0])
    left = place(random, image_CHW.shape[2] - size_px[1])
    return image_CHW[:, top : top + size_px[0], left : left + size_px[1]]


def paste_patch(image_CHW: Tensor, area: Range, aspect: Range, jitter: float, random: Generator) -> Tensor:
    """CutPaste: pastes a rectangle of the image at a random position.

    Args:
        image_CHW: the image; not modified.
        area: patch area as a share of the image, drawn uniformly.
        aspect: width over height, drawn log-uniformly.
        jitter: strength of the patch's colour jitter.
        random: source of randomness.
    """
    height, width = image_CHW.shape[1:]
    pixels = uniform(random, *area) * height * width
    ratio = math.exp(uniform(random, math.log(aspect[0]), math.log(aspect[1])))
    tall = min(max(1, round(math.sqrt(pixels / ratio))), height)
    wide = min(max(1, round(math.sqrt(pixels * ratio))), width)
    patch_Chw = jittered(cropped(image_CHW, (tall, wide), random), jitter, random)
    return pasted(image_CHW, patch_Chw, torch.ones(tall, wide, dtype=torch.bool), random)


def paste_scar(
    image_CHW: Tensor, width_px: Range, length_px: Range, degrees: float, jitter: float, random: Generator
) -> Tensor:
    """CutPaste-Scar: pastes a long thin rectangle of the image, rotated, at a random position.

    Args:
        image_CHW: the image; not modified.
        width_px: patch width, drawn uniformly.
        length_px: patch length, drawn uniformly; along the image's height before rotation.
        degrees: maximum rotation in either direction.
        jitter: strength of the patch's colour jitter.
        random: source of randomness.
    """
    height, width = image_CHW.shape[1:]
    wide = min(max(1, round(uniform(random, *width_px))), width)
    tall = min(max(1, round(uniform(random, *length_px))), height)
    patch_Chw = jittered(cropped(image_CHW, (tall, wide), random), jitter, random)
    patch_Chw, mask_hw = rotated(patch_Chw, uniform(random, -degrees, degrees))
    return pasted(image_CHW, patch_Chw[:, :height, :width], mask_hw[:height, :width], random)


def rotated(patch_Chw: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """A patch rotated counterclockwise about its centre (nearest) in its bounding box, and its mask."""
    height, width = patch_Chw.shape[1:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    tall = math.ceil(abs(height * cosine) + abs(width * sine) - 1e-9)
    wide = math.ceil(abs(width * cosine) + abs(height * sine) - 1e-9)
    down_h = torch.arange(tall, dtype=torch.float64)[:, None] - (tall - 1) / 2
    across_w = torch.arange(wide, dtype=torch.float64)[None] - (wide - 1) / 2
    row_hw = (cosine * down_h + sine * across_w + height / 2).floor().long()
    column_hw = (cosine * across_w - sine * down_h + width / 2).floor().long()
    mask_hw = (row_hw >= 0) & (row_hw < height) & (column_hw >= 0) & (column_hw < width)
    return patch_Chw[:, row_hw.clamp(0, height - 1), column_hw.clamp(0, width - 1)], mask_hw


def pasted(image_CHW: Tensor, patch_Chw: Tensor, mask_hw: Tensor, random: Generator) -> Tensor:
    """The image with a masked patch pasted at a random position."""
    tall, wide = mask_hw.shape
    top = place(random, image_CHW.shape[1] - tall)
    left = place(random, image_CHW.shape[2] - wide)
    result_CHW = image_CHW.clone()
    window_Chw = result_CHW[:, top : top + tall, left : left + wide]
    window_Chw.copy_(torch.where(mask_hw.to(window_Chw.device), patch_Chw, window_Chw))
    return result_CHW
