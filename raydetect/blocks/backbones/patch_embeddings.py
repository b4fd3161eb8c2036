"""Patch embeddings from feature pyramids.

Shapes: B images, C channels, h w feature grid, D feature dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embeddings(levels: Sequence[Tensor]) -> Tensor:
    """Locally aware patch embeddings of a feature pyramid.

    Levels are averaged over 3x3 neighbourhoods, resized to the first level's grid, and concatenated along channels.

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


def pooled_patch_embeddings(levels: Sequence[Tensor], dims: int) -> Tensor:
    """Patch embeddings with a fixed number of dims, regardless of the levels' widths.

    The flattened 3x3 neighbourhood of a position is adaptively average-pooled to `dims` values; so are the
    concatenated values of all levels.

    Args:
        levels: (B, C_i, h_i, w_i) tensors, shallowest first.
        dims: D.

    Returns:
        embeddings_BhwD: float32 on the grid of the first level.

    Source: the code of PatchCore (arXiv 2106.08265) and SimpleNet (arXiv 2303.15140). Pooling and bilinear upsampling
    are linear on different axes, so deeper levels are pooled on their own, smaller grids.
    """
    size = levels[0].shape[-2:]
    aligned = []
    for level in levels:
        batch, _, height, width = level.shape
        around_BNK = F.unfold(level.float(), kernel_size=3, padding=1).transpose(1, 2)
        pooled_BDhw = F.adaptive_avg_pool1d(around_BNK, dims).transpose(1, 2).reshape(batch, dims, height, width)
        same = level.shape[-2:] == size
        aligned.append(pooled_BDhw if same else F.interpolate(pooled_BDhw, size=size, mode="bilinear"))
    rows_NK = torch.cat(aligned, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    return F.adaptive_avg_pool1d(rows_NK, dims).view(len(levels[0]), *size, dims)
