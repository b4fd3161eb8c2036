"""Anomaly maps from grids of patch scores: upsampling and Gaussian smoothing."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.device_constants import kept_on_device
from raydetect.blocks.search.matrix_product import product

LEAST_LIKELIHOOD = 1e-300


def upsample(grid_Bhw: Tensor, size_px: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear upsampling to (height, width), float32; grid and map share the edges of their corner pixels.

    Args:
        grid_Bhw: scores of patches.
        size_px: (height, width).
        align_corners: they share the centres of their corner pixels instead.
    """
    return F.interpolate(grid_Bhw[:, None].float(), size=size_px, mode="bilinear", align_corners=align_corners)[:, 0]


def negative_log_mean_likelihood(levels: Sequence[Tensor], size_px: tuple[int, int]) -> Tensor:
    """Negative logarithm of the mean over levels of upsampled likelihoods, (B, H, W) float32.

    Likelihoods are computed in float64, so only log-likelihoods below about -690 are clipped.

    Args:
        levels: log-likelihoods (B, h_i, w_i), each up to a constant per level.
        size_px: (height, width).
    """
    grids = [level_Bhw[:, None].double().exp() for level_Bhw in levels]
    maps = [F.interpolate(grid_B1hw, size=size_px, mode="bilinear") for grid_B1hw in grids]
    return -torch.cat(maps, 1).mean(1).clamp_min(LEAST_LIKELIHOOD).log().float()


def gaussian_kernel(sigma_px: float) -> Tensor:
    """Normalised 1-D Gaussian kernel, truncated at four sigma, float32."""
    radius = int(4.0 * sigma_px + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    return (weights / weights.sum()).float()


def smooth(map_BHW: Tensor, sigma_px: float) -> Tensor:
    """Gaussian smoothing with scipy's `reflect` boundary mode; sigma 0 is the identity."""
    if sigma_px == 0.0:
        return map_BHW
    kernel = _kernel(map_BHW.device, sigma_px)
    radius = len(kernel) // 2
    for dim in (1, 2):
        index = _reflected_on(map_BHW.device, map_BHW.shape[dim], radius)
        padded = map_BHW.index_select(dim, index)[:, None]
        shape = (1, 1, -1, 1) if dim == 1 else (1, 1, 1, -1)
        map_BHW = F.conv2d(padded, kernel.view(shape))[:, 0]
    return map_BHW


def smooth_upsampled(grid_Bhw: Tensor, size_px: tuple[int, int], sigma_px: float) -> Tensor:
    """`smooth(upsample(grid_Bhw, size_px), sigma_px)` up to rounding, as two small matrix products, (B, H, W) float32.

    Both are linear and separable, so each axis is one matrix.
    """
    if sigma_px == 0.0:
        return upsample(grid_Bhw, size_px)
    batch, height, width = grid_Bhw.shape
    rows_Hh, columns_Ww = (
        _axis_matrix(grid_Bhw.device, length, size, sigma_px)
        for length, size in ((height, size_px[0]), (width, size_px[1]))
    )
    wide_BhW = product(grid_Bhw.float().reshape(batch * height, width), columns_Ww).view(batch, height, -1)
    transposed_BWh = wide_BhW.transpose(1, 2).reshape(-1, height)
    return product(transposed_BWh, rows_Hh).view(batch, -1, size_px[0]).transpose(1, 2).contiguous()


def smoothing_reach(grid: tuple[int, int], size_px: tuple[int, int], sigma_px: float) -> int:
    """How far `smooth_upsampled` spreads a patch's score beyond the patch, in px.

    Args:
        grid: (height, width) of the grid of patches.
        size_px: (height, width) of the map.
        sigma_px: of the Gaussian.
    """
    patch_px = max(math.ceil(side / patches) for side, patches in zip(size_px, grid, strict=True))
    return patch_px + len(gaussian_kernel(sigma_px)) // 2 if sigma_px else patch_px


@kept_on_device
def _axis_matrix(length: int, size_px: int, sigma_px: float) -> Tensor:
    """Matrix (size, length) of upsampling from `length` to `size_px` and smoothing along one axis, via float64."""
    wide = F.interpolate(torch.eye(length, dtype=torch.float64)[:, None], size=size_px, mode="linear")[:, 0]
    kernel = gaussian_kernel(sigma_px).double()
    padded = wide[:, _reflected(size_px, len(kernel) // 2)]
    return (padded.unfold(1, len(kernel), 1) @ kernel).T.float().contiguous()


def _reflected(size: int, radius: int) -> Tensor:
    """Indices that extend an axis of `size` by `radius` on both sides: d c b a | a b c d | d c b a, periodically."""
    indices = torch.arange(-radius, size + radius) % (2 * size)
    return torch.where(indices < size, indices, 2 * size - 1 - indices)


_kernel, _reflected_on = kept_on_device(gaussian_kernel), kept_on_device(_reflected)
