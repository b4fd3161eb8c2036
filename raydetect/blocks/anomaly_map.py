"""From a grid of patch scores to an anomaly map: upsampling and Gaussian smoothing."""

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(grid_Bhw: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Bilinear upsampling (pixel centres, no corner alignment) to (height, width), float32."""
    return F.interpolate(grid_Bhw[:, None].float(), size=size_px, mode="bilinear", align_corners=False)[:, 0]


def gaussian_kernel(sigma_px: float) -> Tensor:
    """Normalised 1-D Gaussian, cut at four sigma, float32."""
    radius = int(4.0 * sigma_px + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    return (weights / weights.sum()).float()


def smooth(map_BHW: Tensor, sigma_px: float) -> Tensor:
    """Gaussian smoothing, the edge pixel mirrored with itself (scipy's `reflect`); sigma 0 changes nothing."""
    if sigma_px == 0.0:
        return map_BHW
    kernel = gaussian_kernel(sigma_px).to(map_BHW.device)
    radius = len(kernel) // 2
    for dim in (1, 2):
        index = _reflected(map_BHW.shape[dim], radius).to(map_BHW.device)
        padded = map_BHW.index_select(dim, index)[:, None]
        shape = (1, 1, -1, 1) if dim == 1 else (1, 1, 1, -1)
        map_BHW = F.conv2d(padded, kernel.view(shape))[:, 0]
    return map_BHW


def _reflected(size: int, radius: int) -> Tensor:
    """Indexes of a line of `size` extended by `radius` on both sides: d c b a | a b c d | d c b a, repeated."""
    places = torch.arange(-radius, size + radius) % (2 * size)
    return torch.where(places < size, places, 2 * size - 1 - places)
