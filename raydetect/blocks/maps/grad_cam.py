"""Grad-CAM of an image's distance to a Gaussian, in closed form.

Shapes: B images, h w feature grid, D feature dim.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks", ICCV 2017, eqs. 1-2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.coresets.gaussian import Gaussian


def unit(rows_D: Tensor) -> Tensor:
    """L2-normalises along the last dim."""
    return F.normalize(rows_D.double(), dim=-1)


def grad_cam(features_BDhw: Tensor, gaussian: Gaussian) -> Tensor:
    """Grad-CAM (eqs. 1-2) of the distance of the L2-normalised mean feature, (B, h, w) float32, not negative.

    The gradient is the same at every position: that of the mean feature, divided by the number of positions.
    """
    mean_BD = features_BDhw.mean((2, 3)).double()
    length_B1 = mean_BD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    unit_BD = mean_BD / length_B1
    slope_BD = gaussian.gradient(unit_BD)
    slope_BD = (slope_BD - (slope_BD * unit_BD).sum(1, keepdim=True) * unit_BD) / length_B1
    positions = features_BDhw.shape[2] * features_BDhw.shape[3]
    return F.relu(torch.einsum("bdhw,bd->bhw", features_BDhw, slope_BD.float())) / positions
