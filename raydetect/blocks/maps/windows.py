"""Square windows over a grid of patches, and harmonic means of window scores.

Shapes: B images, h w grid, W windows, K patches of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def window_patches(grid: tuple[int, int], side: int) -> Tensor:
    """Patch indices (row * w + column) of all windows of `side` x `side` patches, (W, K) int64."""
    numbers_hw = torch.arange(grid[0] * grid[1]).view(grid)
    return numbers_hw.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side * side)


def spread_harmonic(scores_BW: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Harmonic mean, for every patch, of the scores (>= 0) of all windows containing it, (B, h, w).

    Source: WinCLIP (arXiv 2303.14814), eq. 4.
    """
    inverse = (1.0 / scores_BW)[:, None].expand(-1, side * side, -1)
    sums_Bhw = F.fold(inverse, grid, side)[:, 0]
    counts_hw = F.fold(torch.ones_like(inverse[:1]), grid, side)[0, 0]
    return counts_hw / sums_Bhw


def harmonic_mean(parts: list[Tensor]) -> Tensor:
    """Harmonic mean of non-negative, broadcastable tensors."""
    return len(parts) / torch.stack(torch.broadcast_tensors(*(1.0 / part for part in parts))).sum(0)
