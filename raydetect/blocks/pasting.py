"""Cutting a patch out of an image and pasting it elsewhere, and the mild changes of light and place beside it.

Every function draws from the generator that it is given, so what it does is keyed by whoever keys that.

Shapes: C channels (RGB), H W pixels; images are float32 in [0, 1].

Source: Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021, arXiv
2104.04015, sec. 2.2.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from raydetect.blocks.vision import transforms

Range = tuple[float, float]


def uniform(random: Generator, low: float, high: float) -> float:
    """A number between low and high."""
    return low + (high - low) * float(torch.rand((), generator=random))


def place(random: Generator, most: int) -> int:
    """A whole number in [0, most]."""
    return int(torch.randint(0, most + 1, (), generator=random))


def jittered(image_CHW: Tensor, strength: float, random: Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changed by up to `strength`, in a random order, as torchvision does."""
    if strength == 0:
        return image_CHW
    steps: list[Callable[[Tensor, float], Tensor]] = [
        transforms.adjust_brightness,
        transforms.adjust_contrast,
        transforms.adjust_saturation,
    ]
    factors = [uniform(random, max(0.0, 1 - strength), 1 + strength) for _ in steps]
    steps.append(transforms.adjust_hue)
    factors.append(uniform(random, -strength, strength))
    for number in torch.randperm(len(steps), generator=random).tolist():
        image_CHW = steps[number](image_CHW, factors[number])
    return image_CHW


def shifted(image_CHW: Tensor, ratio: float, random: Generator) -> Tensor:
    """Moved by up to `ratio` of its height and width; what comes in is the image mirrored at its edge."""
    height, width = image_CHW.shape[1:]
    down, across = int(ratio * height), int(ratio * width)
    padded_CHW = F.pad(image_CHW[None], (across, across, down, down), mode="reflect")[0]
    return cropped(padded_CHW, (height, width), random)


def cropped(image_CHW: Tensor, size_px: tuple[int, int], random: Generator) -> Tensor:
    """A window of (height, width) at a random place."""
    top = place(random, image_CHW.shape[1] - size_px[0])
    left = place(random, image_CHW.shape[2] - size_px[1])
    return image_CHW[:, top : top + size_px[0], left : left + size_px[1]]


def paste_patch(image_CHW: Tensor, area: Range, aspect: Range, jitter: float, random: Generator) -> Tensor:
    """CutPaste: a rectangle of the image pasted at another place of it.

    Args:
        image_CHW: the image; it stays as it is.
        area: share of the image's area, drawn uniformly.
        aspect: width over height, drawn uniformly in its logarithm.
        jitter: of the patch's colours.
        random: decides.
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
    """CutPaste-Scar: a long thin rectangle of the image, turned and pasted at another place.

    Args:
        image_CHW: the image; it stays as it is.
        width_px: drawn uniformly.
        length_px: drawn uniformly; along the image's height before turning.
        degrees: turned by up to so much, either way.
        jitter: of the patch's colours.
        random: decides.
    """
    height, width = image_CHW.shape[1:]
    wide = min(max(1, round(uniform(random, *width_px))), width)
    tall = min(max(1, round(uniform(random, *length_px))), height)
    patch_Chw = jittered(cropped(image_CHW, (tall, wide), random), jitter, random)
    patch_Chw, mask_hw = turned(patch_Chw, uniform(random, -degrees, degrees))
    return pasted(image_CHW, patch_Chw[:, :height, :width], mask_hw[:height, :width], random)


def turned(patch_Chw: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """A patch turned counter-clockwise about its middle, nearest pixels, in the box around it; and where it is."""
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
    """The image with a patch at a random place, where its mask says."""
    tall, wide = mask_hw.shape
    top = place(random, image_CHW.shape[1] - tall)
    left = place(random, image_CHW.shape[2] - wide)
    made_CHW = image_CHW.clone()
    window_Chw = made_CHW[:, top : top + tall, left : left + wide]
    window_Chw.copy_(torch.where(mask_hw.to(window_Chw.device), patch_Chw, window_Chw))
    return made_CHW
