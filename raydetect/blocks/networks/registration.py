"""Networks that register images of one category: a ResNet with a spatial transformer after each layer, and two heads.

Shapes: B images, L levels, C channels, h w feature grid, H W pixels.

Source: Huang et al., "Registration based Few-Shot Anomaly Detection", ECCV 2022, arXiv 2207.07361, sec. 3.1 and its
official code (MediaBrain-SJTU/RegAD); Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.backbones.vision import models

LEVELS = ("layer1", "layer2", "layer3")
STRIDES, WIDTHS = (4, 8, 16), (64, 128, 256)  # of ResNet-18 and ResNet-34
HIDDEN = 1024
PADDING = "reflection"


class Registered(NamedTuple):
    """Transformed features of every level, and how they were transformed.

    Attributes:
        levels: (B, C, h, w) of each level, each computed from the one before; float32.
        thetas: (B, 2, 2) of each level: the position that a transformed position was sampled from.
    """

    levels: list[Tensor]
    thetas: list[Tensor]

    def mapped_back(self) -> list[Tensor]:
        """The levels where the image has them: transformed by the inverse of its own theta, then of those before."""
        inverses = [inverse(theta_B22) for theta_B22 in self.thetas]
        found = []
        for number, level_BChw in enumerate(self.levels):
            for inverse_B22 in reversed(inverses[: number + 1]):
                level_BChw = transformed(level_BChw, inverse_B22)
            found.append(level_BChw)
        return found


class SpatialTransformer(nn.Module):
    """Rotates and scales features by an angle and two scales that it reads from them; at first it changes nothing."""

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        """Builds the network for one size of features, which its fully connected layer fixes.

        Args:
            channels: C.
            grid: (height, width) of the features.
        """
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(64, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        height, width = (-(-side // 4) for side in grid)
        last = nn.Linear(HIDDEN, 3)
        self.fully_connected = nn.Sequential(nn.Linear(16 * height * width, HIDDEN), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, 1.0, 1.0]))

    def forward(self, features_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed features and theta, both float32."""
        found_B3 = self.fully_connected(self.convolutions(features_BChw).flatten(1)).float()
        angle_B, across_B, down_B = found_B3.unbind(1)
        cosine_B, sine_B = angle_B.cos(), angle_B.sin()
        rows = torch.stack([cosine_B * across_B, -sine_B], 1), torch.stack([sine_B, cosine_B * down_B], 1)
        theta_B22 = torch.stack(rows, 1)
        return transformed(features_BChw, theta_B22), theta_B22


def transformed(features_BChw: Tensor, theta_B22: Tensor) -> Tensor:
    """Samples features at theta times their position, counted from the centre in half sides; reflected, float32."""
    theta_B23 = F.pad(theta_B22.float(), (0, 1))
    features_BChw = features_BChw.float()
    grid_Bhw2 = F.affine_grid(theta_B23, list(features_BChw.shape), align_corners=False)
    return F.grid_sample(features_BChw, grid_Bhw2, padding_mode=PADDING, align_corners=False)


def inverse(theta_B22: Tensor) -> Tensor:
    """The inverses of 2 x 2 matrices, in closed form, so that no device waits."""
    (a_B, b_B), (c_B, d_B) = (row_B2.unbind(1) for row_B2 in theta_B22.unbind(1))
    adjugate_B22 = torch.stack([torch.stack([d_B, -b_B], 1), torch.stack([-c_B, a_B], 1)], 1)
    return adjugate_B22 / (a_B * d_B - b_B * c_B)[:, None, None]


class RegistrationTrunk(nn.Module):
    """A ResNet up to layer3 with a spatial transformer after each layer; weights have torchvision's names."""

    def __init__(self, backbone: str, image_size: tuple[int, int]) -> None:
        """Builds the network with random weights from torch's global generator.

        Args:
            backbone: "resnet18" or "resnet34".
            image_size: (height, width) of the images in px, multiples of 16.
        """
        super().__init__()
        resnet = models.get_model(backbone, weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3
        height, width = image_size
        self.transformers = nn.ModuleList(
            SpatialTransformer(channels, (height // stride, width // stride))
            for channels, stride in zip(WIDTHS, STRIDES, strict=True)
        )

    def forward(self, images_BCHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The fields of `Registered` for RGB images in [0, 1]; each layer sees the transformed features before it."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images_BCHW))))
        levels, thetas = [], []
        for layer, transformer in zip((self.layer1, self.layer2, self.layer3), self.transformers, strict=True):
            features, theta_B22 = transformer(layer(features))
            levels.append(features)
            thetas.append(theta_B22)
        return levels, thetas


def _pointwise(width: int) -> list[nn.Module]:
    return [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def registration_encoder(width: int) -> nn.Sequential:
    """Three 1 x 1 convolutions; the last one is linear."""
    return nn.Sequential(*_pointwise(width), *_pointwise(width), nn.Conv2d(width, width, 1, bias=False))


def registration_predictor(width: int) -> nn.Sequential:
    """Two 1 x 1 convolutions; the last one is linear."""
    return nn.Sequential(*_pointwise(width), nn.Conv2d(width, width, 1, bias=False))


def registration_loss(encoded: Sequence[Tensor], predicted: Sequence[Tensor]) -> Tensor:
    """Mean over images and positions of -1/2 (cos(p1, z2) + cos(p2, z1)), without gradients to z (eqs. 2 and 3).

    Args:
        encoded: z1 and z2, (B, C, h, w) each.
        predicted: p1 and p2, likewise.
    """
    (z1, z2), (p1, p2) = encoded, predicted
    cosines = F.cosine_similarity(p1, z2.detach(), dim=1), F.cosine_similarity(p2, z1.detach(), dim=1)
    return -(cosines[0].mean() + cosines[1].mean()) / 2
