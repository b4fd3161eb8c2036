"""Image and mask losses: SSIM, gradient magnitude similarity, focal, dice.

All are computed in float32 even under autocast: variances as differences of large means lose precision in bfloat16.

Shapes: B images, C channels, H W pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.device_constants import kept_on_device

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
GMS_C = 0.0026
GMS_SCALES = 4
FOCAL_SMOOTH = 1e-5
DICE_SMOOTH = 1.0  # in pixels
TINY = 1e-12  # avoids infinite gradients of square roots at 0


def ssim_map(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """Structural similarity at every pixel of two images in [0, 1], at most 1, (B, C, H, W) float32.

    Gaussian windows of 11 x 11, sigma 1.5; zero padding.

    Source: Wang et al., IEEE TIP 13 (2004), eq. 13.
    """
    with torch.autocast(first_BCHW.device.type, enabled=False):
        x, y = first_BCHW.float(), second_BCHW.float()
        mean_x, mean_y, xx, yy, xy = _window_means([x, y, x * x, y * y, x * y])
        product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
        similarity = (2 * product + SSIM_C1) * (2 * (xy - product) + SSIM_C2)
        return similarity / ((squares + SSIM_C1) * (xx + yy - squares + SSIM_C2))


def ssim_loss(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """One minus the mean structural similarity."""
    return 1 - ssim_map(first_BCHW, second_BCHW).mean()


def _window_means(images: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Local Gaussian means of several (B, C, H, W) tensors, in one channels-last pass for speed."""
    together = torch.cat(list(images), 1).contiguous(memory_format=torch.channels_last)
    channels = together.shape[1]
    kernel = _window(together.device).expand(channels, 1, SSIM_WINDOW, SSIM_WINDOW)
    return F.conv2d(together, kernel, padding=SSIM_WINDOW // 2, groups=channels).chunk(len(images), 1)


@kept_on_device
def _window() -> Tensor:
    """The Gaussian window, (11, 11), with sum 1."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    return torch.outer(weights, weights).float()


def gms_map(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """Gradient magnitude similarity of two images in [0, 1], in (0, 1], (B, H, W) float32.

    Prewitt gradients of the channel mean, with replicate padding.

    Source: Xue et al., IEEE TIP 23 (2014), eqs. 1-4; RIAD, eq. 3.
    """
    with torch.autocast(first_BCHW.device.type, enabled=False):
        x, y = (_gradient_squares(images.float().mean(1, keepdim=True)) for images in (first_BCHW, second_BCHW))
        return (2 * ((x + TINY) * (y + TINY)).sqrt() + GMS_C) / (x + y + GMS_C)


def _gradient_squares(grey_B1HW: Tensor) -> Tensor:
    """Squared magnitude of the Prewitt gradient, (B, H, W); differences and sums are faster than convolutions."""
    padded = F.pad(grey_B1HW, (1, 1, 1, 1), mode="replicate")[:, 0]
    across = padded[:, :, 2:] - padded[:, :, :-2]
    down = padded[:, 2:] - padded[:, :-2]
    across = (across[:, :-2] + across[:, 1:-1] + across[:, 2:]) / 3
    down = (down[:, :, :-2] + down[:, :, 1:-1] + down[:, :, 2:]) / 3
    return across.square() + down.square()


def msgms_maps(first_BCHW: Tensor, second_BCHW: Tensor) -> list[Tensor]:
    """`gms_map` at four scales, each half the size of the previous one (fewer if the image would fall below 2 px)."""
    maps = [gms_map(first_BCHW, second_BCHW)]
    while len(maps) < GMS_SCALES and min(first_BCHW.shape[-2:]) >= 4:
        first_BCHW, second_BCHW = F.avg_pool2d(first_BCHW, 2), F.avg_pool2d(second_BCHW, 2)
        maps.append(gms_map(first_BCHW, second_BCHW))
    return maps


def msgms_loss(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """Mean over scales of one minus the mean gradient magnitude similarity (RIAD, eq. 4)."""
    maps = msgms_maps(first_BCHW, second_BCHW)
    return torch.stack([1 - each.mean() for each in maps]).mean()


def focal_loss(anomalous_BHW: Tensor, mask_BHW: Tensor, gamma: float) -> Tensor:
    """Mean of -(1 - p)^gamma log p, where p is the predicted probability of a pixel's true class.

    Args:
        anomalous_BHW: anomaly probability, in [0, 1].
        mask_BHW: 1 where a pixel is anomalous, else 0; any dtype.
        gamma: down-weighting of well-classified pixels.

    Source: Lin et al., ICCV 2017, eq. 4, with p smoothed by 1e-5 as in DRAEM's code.
    """
    with torch.autocast(anomalous_BHW.device.type, enabled=False):
        anomalous, mask = anomalous_BHW.float(), mask_BHW.float()
        right = mask * anomalous + (1 - mask) * (1 - anomalous)
        right = (1 - 2 * FOCAL_SMOOTH) * right + 2 * FOCAL_SMOOTH
        return ((1 - right).clamp(min=0).pow(gamma) * -right.log()).mean()


def dice_loss(anomalous_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Mean over images of one minus the Dice coefficient, (2 |p m| + 1) / (|p| + |m| + 1) with sums over pixels.

    Args:
        anomalous_BHW: anomaly probability, in [0, 1].
        mask_BHW: 1 where a pixel is anomalous, else 0; any dtype.

    Source: Milletari et al., 3DV 2016, eq. 2, without squares and smoothed by one pixel as in APRIL-GAN's code, so that
        an image without defects has a gradient.
    """
    with torch.autocast(anomalous_BHW.device.type, enabled=False):
        anomalous_BN, mask_BN = anomalous_BHW.float().flatten(1), mask_BHW.float().flatten(1)
        common_B = (anomalous_BN * mask_BN).sum(1)
        sizes_B = anomalous_BN.sum(1) + mask_BN.sum(1)
        return (1 - (2 * common_B + DICE_SMOOTH) / (sizes_B + DICE_SMOOTH)).mean()
