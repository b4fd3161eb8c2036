"""Where the object is in a picture with a plain border, so that simulated defects lie on it.

Shapes: H W pixels, E pixels of the edge, 3 RGB channels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

DEVIATIONS = 3  # from the colour of the border, in the median distance of the border itself from it
LEVELS = 8  # of 255 that any background may vary by
PLAIN_SHARE = 0.7  # of the border that has its colour
SPECK_PX = 5
LEAST_SHARE = 0.02  # of the picture


def foreground(image_3HW: Tensor) -> Tensor:
    """The convex hull of what differs in colour from a plain border, (H, W) bool; all True if no object is found.

    The border's colour is the median of the outermost pixels. A pixel is background if in every channel it is at most
    8 levels plus three times the border's own median distance away from it. Specks are dropped by the majority of
    5 x 5 pixels. No object is found if less than 70 % of the border has its colour, or the rest is less than 2 % of the
    picture.

    Args:
        image_3HW: uint8.

    Source: our own rule; MemSeg (arXiv 2205.00908), sec. 3.1, binarises, which leaves out most of an object whose
    brightness straddles the threshold.
    """
    image, everywhere = image_3HW.float(), torch.ones(image_3HW.shape[1:], dtype=torch.bool)
    edge_3E = torch.cat([image[:, 0], image[:, -1], image[:, 1:-1, 0], image[:, 1:-1, -1]], 1)
    colour_3 = edge_3E.median(1).values
    distance_E = (edge_3E - colour_3[:, None]).abs().amax(0)
    limit = LEVELS + DEVIATIONS * distance_E.median()
    if (distance_E <= limit).float().mean() < PLAIN_SHARE:
        return everywhere
    differs_HW = (image - colour_3[:, None, None]).abs().amax(0) > limit
    differs_HW = F.avg_pool2d(differs_HW[None].float(), SPECK_PX, 1, SPECK_PX // 2)[0] > 0.5
    return _hull(differs_HW.numpy()) if differs_HW.float().mean() >= LEAST_SHARE else everywhere


def _hull(shown_HW: np.ndarray) -> Tensor:
    """The convex hull of pixels, (H, W) bool; the pixels themselves if they lie on a line."""
    rows = np.flatnonzero(shown_HW.any(1))
    left, right = shown_HW[rows].argmax(1), shown_HW.shape[1] - 1 - shown_HW[rows, ::-1].argmax(1)
    corners_N2 = np.concatenate([np.stack([left, rows], 1), np.stack([right, rows], 1)])
    try:
        corners_N2 = corners_N2[ConvexHull(corners_N2).vertices]
    except QhullError:
        return torch.from_numpy(shown_HW)
    picture = Image.new("1", shown_HW.shape[::-1])
    ImageDraw.Draw(picture).polygon([(int(x), int(y)) for x, y in corners_N2], fill=1, outline=1)
    return torch.from_numpy(np.array(picture) | shown_HW)
