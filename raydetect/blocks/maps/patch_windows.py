"""Square image windows: their mean features, and maps from window scores.

Shapes: B images, C channels, h w grid of windows, R windows of one image, H W pixels, D feature dim.
"""

import torch
from torch import Tensor

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.device_constants import kept_on_device

WINDOWS_AT_ONCE = 512


def pooled_windows(backbone: Backbone, images_BCHW: Tensor, side_px: int, stride_px: int) -> Tensor:
    """Spatial mean of the last layer's features per window, (B, h, w, D).

    Each window is passed to the backbone as a separate image, without its surroundings. Windows are processed in chunks
    that are the same for every image of a batch.
    """
    windows_BChwpp = images_BCHW.unfold(2, side_px, stride_px).unfold(3, side_px, stride_px)
    batch, _, height, width = windows_BChwpp.shape[:4]
    pooled = []
    for part_BCrpp in windows_BChwpp.flatten(2, 3).split(max(1, WINDOWS_AT_ONCE // batch), 2):
        flat = part_BCrpp.transpose(1, 2).flatten(0, 1)
        pooled.append(backbone(flat)[-1].mean((2, 3)).view(batch, part_BCrpp.shape[2], -1))
    return torch.cat(pooled, 1).view(batch, height, width, -1)


def upsample_windows(
    grid_Bhw: Tensor, size_px: tuple[int, int], field_px: int, stride_px: int, sigma_px: float
) -> Tensor:
    """Pixel map of window scores: every pixel is the mean of all windows, weighted by a Gaussian of their distance.

    Args:
        grid_Bhw: scores of windows of `field_px`, starting at the top left, with stride `stride_px`.
        size_px: (height, width) of the image.
        field_px: side of a window.
        stride_px: stride between windows.
        sigma_px: sigma of the Gaussian around a window's centre.

    Returns:
        map_BHW: float32.

    Source: Liznerski et al., "Explainable Deep One-Class Classification", ICLR 2021, algorithm 1 (receptive field
    upsampling), but normalised by the sum of weights, so equal scores give a constant map up to the edges.
    """
    height, width = grid_Bhw.shape[1:]
    rows_Hh, columns_Ww = (
        _window_matrix(grid_Bhw.device, length, size, field_px, stride_px, sigma_px)
        for length, size in ((height, size_px[0]), (width, size_px[1]))
    )
    return rows_Hh @ grid_Bhw.float() @ columns_Ww.T


@kept_on_device
def _window_matrix(length: int, size_px: int, field_px: int, stride_px: int, sigma_px: float) -> Tensor:
    """Weights of `length` windows for every pixel of an axis, (size, length), via float64; rows sum to one."""
    centres = torch.arange(length, dtype=torch.float64) * stride_px + (field_px - 1) / 2
    distance = torch.arange(size_px, dtype=torch.float64)[:, None] - centres
    return torch.softmax(-0.5 * (distance / sigma_px) ** 2, 1).float()
