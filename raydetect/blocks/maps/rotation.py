"""Rotation of images by fixed angles, without sending anything to their device after the first call.

Shapes: B images, C channels, H W pixels.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.device_constants import kept_on_device


def rotated(images_BCHW: Tensor, degrees: float, mode: Literal["nearest", "bilinear"] = "nearest") -> Tensor:
    """Images rotated counterclockwise about their centre, with black corners; same size and type.

    Bit-identical to torchvision's `rotate`, which sends an angle and the image's size to the device at every call.

    Args:
        images_BCHW: uint8 or float32; integers are rounded after interpolation.
        degrees: the angle.
        mode: interpolation.
    """
    batch, _, height, width = images_BCHW.shape
    pixels_1P3 = _homogeneous_pixels(images_BCHW.device, height, width)
    grid_1HW2 = pixels_1P3.bmm(_turn(images_BCHW.device, degrees, height, width)).view(1, height, width, 2)
    grid_BHW2 = grid_1HW2.expand(batch, -1, -1, -1)
    found = F.grid_sample(images_BCHW.float(), grid_BHW2, mode, padding_mode="zeros", align_corners=False)
    return found if images_BCHW.is_floating_point() else found.round().to(images_BCHW.dtype)


@kept_on_device
def _homogeneous_pixels(height: int, width: int) -> Tensor:
    """(x, y, 1) of every pixel's centre, in px from the image's centre, (1, H * W, 3)."""
    x_W, y_H = (torch.linspace(0.5 - size * 0.5, size * 0.5 - 0.5, steps=size) for size in (width, height))
    pixels_HW3 = torch.ones(height, width, 3)
    pixels_HW3[..., 0], pixels_HW3[..., 1] = x_W, y_H[:, None]
    return pixels_HW3.view(1, height * width, 3)


@kept_on_device
def _turn(degrees: float, height: int, width: int) -> Tensor:
    """Matrix from (x, y, 1) of the rotated image to the place in the original, from -1 to 1, (1, 3, 2)."""
    angle = math.radians(-degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix_123 = torch.tensor([[[cosine, sine, 0.0], [-sine, cosine, 0.0]]])
    return matrix_123.transpose(1, 2) / torch.tensor([0.5 * width, 0.5 * height])
