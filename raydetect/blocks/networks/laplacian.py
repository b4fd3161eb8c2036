"""Laplacian pyramids of feature maps, which compose to the maps they were made of.

Shapes: B images, C channels, h w feature grid; a pyramid is a list of maps, finest first, each half the size of the one
before.

Source: Burt and Adelson, "The Laplacian Pyramid as a Compact Image Code", IEEE Trans. Communications 31 (1983); with
max pooling between levels as in the official code of PyramidFlow (gasharper/PyramidFlow).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.device_constants import kept_on_device

BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)
REACH = len(BINOMIAL) // 2


def decompose(features_BChw: Tensor, levels: int) -> list[Tensor]:
    """The pyramid of feature maps: what each level has beyond the next one, then the coarsest level itself.

    Args:
        features_BChw: float32; h and w are multiples of 2 ** (levels - 1).
        levels: at least 1.
    """
    pyramid = []
    for _ in range(levels - 1):
        coarse = F.max_pool2d(blurred(features_BChw), 2)
        pyramid.append(features_BChw - _enlarged(coarse))
        features_BChw = coarse
    return [*pyramid, features_BChw]


def compose(pyramid: Sequence[Tensor]) -> Tensor:
    """The feature maps (B, C, h, w) of a pyramid; linear in it, and the inverse of `decompose`."""
    total = pyramid[-1]
    for level in reversed(pyramid[:-1]):
        total = level + _enlarged(total)
    return total


def blurred(features_BChw: Tensor) -> Tensor:
    """Filtered with the 5 x 5 binomial kernel, zeros beyond the edge."""
    channels = features_BChw.shape[1]
    return F.conv2d(features_BChw, _kernels(features_BChw.device, channels), padding=REACH, groups=channels)


def _enlarged(features_BChw: Tensor) -> Tensor:
    return blurred(F.interpolate(features_BChw, scale_factor=2, mode="nearest"))


@kept_on_device
def _kernels(channels: int) -> Tensor:
    """The kernel of every channel, (C, 1, 5, 5)."""
    line = torch.tensor(BINOMIAL) / sum(BINOMIAL)
    return torch.outer(line, line).expand(channels, 1, -1, -1).contiguous()
