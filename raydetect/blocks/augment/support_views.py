"""The views of a normal image that a Gaussian per position is fitted on.

Source: Huang et al., "Registration based Few-Shot Anomaly Detection", ECCV 2022, arXiv 2207.07361, sec. 3.2 and its
official code (MediaBrain-SJTU/RegAD, train.py and utils/funcs.py).

Shapes: V views, H W pixels.
"""

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.device_constants import kept_on_device

ANGLES = tuple(sixteenths * math.pi / 16 for sixteenths in (-4, -3, -2, -1, 1, 2, 3, 4))
SHIFTS = (0.2, 0.1)  # of half a side
GREY = (0.299, 0.587, 0.114)
NUM_VIEWS = 22


def support_views(image_3HW: Tensor) -> Tensor:
    """An image in [0, 1] and its 21 other views, (22, 3, H, W).

    These are the image rotated by up to 45 degrees, shifted, mirrored, and turned by right angles, reflected at its
    edges, and the image in grey. Positions are counted in half sides, so an image that is not square is stretched
    when it is rotated.
    """
    image_3HW = image_3HW.contiguous()  # in one layout, and so with one rounding
    theta_V23 = _affine_views(image_3HW.device)
    size = [len(theta_V23), *image_3HW.shape]
    grid_VHW2 = F.affine_grid(theta_V23, size, align_corners=False)
    views_V3HW = F.grid_sample(image_3HW.expand(size), grid_VHW2, padding_mode="reflection", align_corners=False)
    grey_HW = (image_3HW * _grey(image_3HW.device)).sum(0)
    return torch.cat([image_3HW[None], views_V3HW, grey_HW.expand(1, *image_3HW.shape)])


def _rotation(angle: float) -> list[list[float]]:
    return [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]


@kept_on_device
def _affine_views() -> Tensor:
    """The matrices of all views but the image itself and its grey one, (20, 2, 3)."""
    rotations = [_rotation(angle) for angle in (*ANGLES, math.pi / 2, math.pi, 3 * math.pi / 2)]
    shifts = [
        [[1.0, 0.0, across * size], [0.0, 1.0, down * size]]
        for size in SHIFTS
        for across, down in product((-1, 1), repeat=2)
    ]
    mirror = [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    return torch.tensor([*rotations, *shifts, mirror], dtype=torch.float64).float()


@kept_on_device
def _grey() -> Tensor:
    return torch.tensor(GREY).view(3, 1, 1)
