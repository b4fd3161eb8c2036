"""Feature pyramids to patch embeddings.

Shapes: B images, C channels, h w feature grid, D feature dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embeddings(levels: Sequence[Tensor]) -> Tensor:
    """Locally aware patch embeddings of a feature pyramid.

    Every level is averaged over 3x3 neighbourhoods, the deeper ones are brought to the first level's grid, and all
    are concatenated along channels.

    Args:
        levels: (B, C_i, h_i, w_i) tensors, shallowest first.

    Returns:
        embeddings_BhwD: float32 on the grid of the first level, D = sum of C_i.

    Source: PatchCore (arXiv 2106.08265), sec. 3.1, eqs. 1-3 with p = 3 and average pooling.
    """
    size = levels[0].shape[-2:]
    pooled = [F.avg_pool2d(level.float(), kernel_size=3, stride=1, padding=1) for level in levels]
    aligned = [
        level if level.shape[-2:] == size else F.interpolate(level, size=size, mode="bilinear") for level in pooled
    ]
    return torch.cat(aligned, dim=1).permute(0, 2, 3, 1).contiguous()
