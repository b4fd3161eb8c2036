"""Patch embeddings from feature pyramids.

Shapes: B images, C channels, h w feature grid, D feature dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embeddings(levels: Sequence[Tensor], dims: int | None = None) -> Tensor:
    """Locally aware patch embeddings of a feature pyramid.

    Levels are averaged over 3x3 neighbourhoods, resized to the first level's grid, and concatenated along channels; or,
    with `dims`, the flattened neighbourhood of a position is adaptively average-pooled to `dims` values at each level,
    and so are the concatenated values of all levels.

    Args:
        levels: (B, C_i, h_i, w_i) tensors, shallowest first.
        dims: D; None = the sum of C_i.

    Returns:
        embeddings_BhwD: float32 on the grid of the first level.

    Source: PatchCore (arXiv 2106.08265), sec. 3.1, eqs. 1-3 with p = 3 and average pooling; with `dims`, its authors'
    code, which SimpleNet's (arXiv 2303.15140) follows. There levels are resized before they are pooled; both are linear
    and act on different axes, so that deeper levels are pooled on their own, smaller grids here.
    """
    if dims is None:
        means = [F.avg_pool2d(level.float(), kernel_size=3, stride=1, padding=1) for level in levels]
        return torch.cat(_on_first_grid(means), dim=1).permute(0, 2, 3, 1).contiguous()
    pooled_BhwK = torch.cat(_on_first_grid([_pooled(level, dims) for level in levels]), dim=1).permute(0, 2, 3, 1)
    return F.adaptive_avg_pool1d(pooled_BhwK.flatten(0, 2), dims).view(*pooled_BhwK.shape[:3], dims)


def _on_first_grid(levels: Sequence[Tensor]) -> list[Tensor]:
    """Levels resized to the grid of the first one."""
    size = levels[0].shape[-2:]
    return [level if level.shape[-2:] == size else F.interpolate(level, size=size, mode="bilinear") for level in levels]


def _pooled(level_BChw: Tensor, dims: int) -> Tensor:
    """The 3x3 neighbourhood of every position, pooled to `dims` values, (B, D, h, w)."""
    around_BNK = F.unfold(level_BChw.float(), kernel_size=3, padding=1).transpose(1, 2)
    return F.adaptive_avg_pool1d(around_BNK, dims).transpose(1, 2).unflatten(2, level_BChw.shape[-2:])
