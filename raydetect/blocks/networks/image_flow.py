"""Likelihood of an image's pooled features under a flow, averaged over rotations, and its pixel gradients.

Shapes: B images, C channels, D feature dim of all levels and scales, H W pixels.

Source: DifferNet (arXiv 2008.12577), sec. 3, and its official code (marco-rudolph/differnet).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.backbones.vision import transforms
from raydetect.blocks.maps.anomaly_map import smooth
from raydetect.blocks.maps.rotation import rotated
from raydetect.blocks.networks.flows import BothCoupling, Chain, Invertible, log_likelihood, random_permutation
from raydetect.blocks.seeding import keyed_generator
from raydetect.errors import SpecError

HIDDEN_LAYERS = 3


def image_flow(dims: int, n_flows: int, hidden_dims: int, clamp: float, seed: int) -> Chain:
    """Couplings of both halves, each after a random permutation; subnets use torch's global generator."""
    maps: list[Invertible] = []
    for number in range(n_flows):
        maps.append(random_permutation(dims, keyed_generator(seed, "permutation", number)))
        maps.append(BothCoupling(dims, partial(deep_subnet, hidden_dims), clamp))
    return Chain(maps)


def deep_subnet(hidden_dims: int, inside: int, outside: int) -> nn.Module:
    """Three hidden layers with ReLU (official code)."""
    parts: list[nn.Module] = []
    for number in range(HIDDEN_LAYERS):
        parts += [nn.Linear(hidden_dims if number else inside, hidden_dims), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(hidden_dims, outside))


def mean_features(backbone: Backbone, normal_BCHW: Tensor, num_scales: int) -> Tensor:
    """Features averaged over positions, (B, D) float32, concatenated over levels and scales.

    Args:
        backbone: frozen.
        normal_BCHW: normalised images; each scale halves height and width by nearest-neighbour sampling.
        num_scales: at least 1.

    Raises:
        SpecError: the images of a scale are too small for the backbone.

    Source: sec. 3.2 of the paper.
    """
    height, width = normal_BCHW.shape[2:]
    found: list[Tensor] = []
    for scale in range(num_scales):
        size_px = (max(1, height >> scale), max(1, width >> scale))
        scaled = F.interpolate(normal_BCHW, size=size_px, mode="nearest") if scale else normal_BCHW
        try:
            found += [level.float().mean((2, 3)) for level in backbone.features(scaled)]
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise SpecError(
                f"{backbone.name} does not take images of {size_px[0]} x {size_px[1]} px, which are {height} x {width} "
                f"px at scale {scale + 1} of {num_scales} ({str(error).splitlines()[0][:120]}). Enlarge image_size or "
                "lower num_scales."
            ) from None
    return torch.cat(found, 1)


def rotated_features(backbone: Backbone, images_BCHW: Tensor, degrees_B: Sequence[float], num_scales: int) -> Tensor:
    """Mean features of uint8 images, each rotated counterclockwise by its own angle (nearest, black corners)."""
    turned = [transforms.rotate(image_CHW, degrees) for image_CHW, degrees in zip(images_BCHW, degrees_B, strict=True)]
    return mean_features(backbone, backbone.normalised(torch.stack(turned)), num_scales)


def negative_log_likelihood(z_BD: Tensor, log_det_B: Tensor) -> Tensor:
    """Negative log-likelihood per dim of features mapped to z, without the constant, (B,) (eq. 4)."""
    return (0.5 * z_BD.square().sum(1) - log_det_B) / z_BD.shape[1]


def scores_and_gradient_maps(
    backbone: Backbone, flow: nn.Module, images_BCHW: Tensor, num_scales: int, degrees: Sequence[float], sigma_px: float
) -> tuple[Tensor, Tensor]:
    """Scores (eq. 5) and gradient maps (sec. 3.4); costs a forward and a backward pass per angle.

    Args:
        backbone: frozen.
        flow: flow over its mean features.
        images_BCHW: uint8 RGB.
        num_scales: see `mean_features`.
        degrees: counterclockwise rotation angles (nearest, black corners).
        sigma_px: sigma of the Gaussian that smooths gradients.

    Returns:
        score_B: negative log-density of z under a standard normal, per dim, averaged over the angles.
        map_BHW: gradient of the log-likelihood with respect to the normalised pixels, rotated back and smoothed; the
            square of its mean magnitude over angles and channels.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images_BCHW = images_BCHW.clone()
        score_B = torch.zeros(len(images_BCHW), device=images_BCHW.device)
        map_BHW = torch.zeros_like(images_BCHW[:, 0], dtype=torch.float32)
        for angle in degrees:
            normal_BCHW = backbone.normalised(rotated(images_BCHW, angle)).requires_grad_(True)
            z_BD, log_det_B = flow(mean_features(backbone, normal_BCHW, num_scales))
            (slope_BCHW,) = torch.autograd.grad(log_likelihood(z_BD, log_det_B).sum(), normal_BCHW)
            score_B += 0.5 * (z_BD.detach().square().mean(1) + math.log(2 * math.pi)) / len(degrees)
            back_BCHW = rotated(slope_BCHW, -angle, "bilinear")
            smooth_BCHW = smooth(back_BCHW.flatten(0, 1), sigma_px).view(back_BCHW.shape)
            map_BHW += smooth_BCHW.abs().mean(1) / len(degrees)
    return score_B, map_BHW.square()
