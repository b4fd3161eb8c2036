"""Building blocks of encoder-decoder networks: double convolutions, keyed initialisation, padding.

Shapes: B images, C channels, H W pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.seeding import keyed_seed


@contextmanager
def keyed_init(seed: int, *purpose: str) -> Iterator[None]:
    """Seeds torch's global generator from `seed` and `purpose` within the block, then restores it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, *purpose))
        yield


def convolutions(in_channels: int, *widths: int) -> nn.Sequential:
    """A 3 x 3 convolution, batch norm and ReLU for each of `widths`."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        in_channels = width
    return nn.Sequential(*layers)


class UpConvolution(nn.Sequential):
    """Bilinear upsampling by 2 with aligned corners, then convolution, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Builds the block."""
        upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        super().__init__(upsample, *convolutions(in_channels, out_channels))


def normal_init(network: nn.Module, std: float = 0.02) -> None:
    """DCGAN initialisation: convolutions N(0, std), batch norm weights N(1, std) and biases 0."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(part.weight, 0.0, std)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, std)
            nn.init.zeros_(part.bias)


def padded(images_BCHW: Tensor, multiple: int) -> Tensor:
    """Replicates the last row and column until both sizes are multiples; crop the output with `cropped`."""
    height, width = images_BCHW.shape[-2:]
    below, right = -height % multiple, -width % multiple
    return F.pad(images_BCHW, (0, right, 0, below), mode="replicate") if below or right else images_BCHW


def cropped(maps_X: Tensor, size_px: Sequence[int]) -> Tensor:
    """The top left region of (height, width) `size_px`."""
    return maps_X[..., : size_px[0], : size_px[1]]
