"""Volume normalisation: subtracts the mean of log-scales, so that a coupling neither grows nor shrinks volumes.

Shapes: B images, C channels, h w feature grid.

Source: PyramidFlow (arXiv 2303.02595), sec. 3.3 and its official code (gasharper/PyramidFlow).
"""

from typing import Literal

import torch
from torch import Tensor, nn

VolumeNormKind = Literal["channel", "spatial"]
MOMENTUM = 0.1
DIMS: dict[VolumeNormKind, tuple[int, ...]] = {"channel": (0, 1), "spatial": (0, 2, 3)}


class VolumeNorm(nn.Module):
    """Subtracts the mean over the batch while it trains, and a running mean afterwards.

    Attributes:
        dims: dimensions that are averaged: batch and channels ("channel"), or batch and positions ("spatial").
    """

    def __init__(self, kind: VolumeNormKind, channels: int, grid: tuple[int, int]) -> None:
        """A running mean of 0 for maps of `channels` on a grid (h, w)."""
        super().__init__()
        self.dims = DIMS[kind]
        shape = (1, 1, *grid) if kind == "channel" else (1, channels, 1, 1)
        self.running_mean: Tensor
        self.register_buffer("running_mean", torch.zeros(shape))

    def forward(self, log_scale_BChw: Tensor) -> Tensor:
        """The log-scales without their mean."""
        if not self.training:
            return log_scale_BChw - self.running_mean
        mean = self.mean_of(log_scale_BChw)
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), MOMENTUM)
        return log_scale_BChw - mean

    def mean_of(self, log_scale_BChw: Tensor) -> Tensor:
        """The mean over the batch; `shared_norms` replaces it by the mean over the batch of all workers."""
        return log_scale_BChw.mean(self.dims, keepdim=True)
