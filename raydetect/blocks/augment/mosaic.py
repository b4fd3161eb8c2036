"""Four images as the quarters of one.

Shapes: 4 images, C channels, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mosaic(images_4CHW: Tensor, masks_4HW: Tensor) -> tuple[Tensor, Tensor]:
    """The image of four, each shrunk to a quarter of it, row by row; and its mask.

    Args:
        images_4CHW: uint8.
        masks_4HW: bool.

    Returns:
        image_CHW: uint8, of the same size; bilinear with antialiasing.
        mask_HW: bool; True where at least half of what a pixel covers is.
    """
    height, width = images_4CHW.shape[-2:]
    both = torch.cat([images_4CHW.float(), masks_4HW[:, None].float()], 1)
    halves = [(height // 2, height - height // 2), (width // 2, width - width // 2)]
    places = [(rows, columns) for rows in halves[0] for columns in halves[1]]
    upper_left, upper_right, lower_left, lower_right = (
        F.interpolate(one[None], size=place, mode="bilinear", antialias=True)[0]
        for one, place in zip(both, places, strict=True)
    )
    whole = torch.cat([torch.cat([upper_left, upper_right], 2), torch.cat([lower_left, lower_right], 2)], 1)
    return whole[:-1].round().clamp(0, 255).to(torch.uint8), whole[-1] >= 0.5
