"""The bottleneck and the decoder of Reverse Distillation, for torchvision's ResNets.

Source: Deng and Li, CVPR 2022 (arXiv 2201.10703), secs. 3.2-3.3, and its code.

Shapes: B images, C channels, h w feature grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import bare_name
from raydetect.blocks.backbones.vision import BasicBlock, Bottleneck, models

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
MULTIPLE = 32
PLANES = (64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class ResNetPlan:
    """What the mirrored networks need to know of a ResNet.

    Attributes:
        block: BasicBlock or Bottleneck.
        counts: residual blocks of layer1 to layer3.
        base_width: 64, or 128 for wide networks.
    """

    block: type[BasicBlock] | type[Bottleneck]
    counts: tuple[int, int, int]
    base_width: int

    @property
    def widths(self) -> list[int]:
        """Channels of layer1 to layer3."""
        return [planes * self.block.expansion for planes in PLANES[:3]]


def resnet_plan(name: str) -> ResNetPlan:
    """The plan of a network in `RESNETS`."""
    with torch.device("meta"):
        whole: Any = models.get_model(bare_name(name), weights=None)
    counts = (len(whole.layer1), len(whole.layer2), len(whole.layer3))
    return ResNetPlan(type(whole.layer1[0]), counts, whole.base_width)


class OneClassEmbedding(nn.Module):
    """Levels brought to the grid of the deepest, concatenated, and compressed by residual blocks (sec. 3.3)."""

    def __init__(self, plan: ResNetPlan) -> None:
        """Builds the network."""
        super().__init__()
        first, second, third = plan.widths
        self.first = nn.Sequential(*_halving(first, second), *_halving(second, third))
        self.second = nn.Sequential(*_halving(second, third))
        blocks = 2 if plan.counts == (2, 2, 2) else 3  # as in the ResNet's layer4
        self.blocks = _stage(plan, 3 * third, PLANES[3], blocks, _conv1x1)
        _initialise(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """The code (B, C, h / 2, w / 2), where (h, w) is the grid of the deepest level."""
        joined = torch.cat([self.first(levels[0]), self.second(levels[1]), levels[2]], 1)
        code: Tensor = self.blocks(joined)
        return code


class Decoder(nn.Module):
    """A ResNet in reverse: its stages double the size, by transposed convolutions (sec. 3.2).

    The deepest stage has as many blocks as the ResNet's layer1, and the shallowest as its layer3 (code).
    """

    def __init__(self, plan: ResNetPlan) -> None:
        """Builds the network."""
        super().__init__()
        widths = [planes * plan.block.expansion for planes in PLANES]
        self.stages = nn.ModuleList(
            _stage(plan, below, planes, count, _deconv2x2)
            for below, planes, count in zip(widths[:0:-1], PLANES[2::-1], plan.counts, strict=True)
        )
        _initialise(self)

    def forward(self, code: Tensor) -> list[Tensor]:
        """Rebuilt levels, shallowest first."""
        found = [code]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found[:0:-1]


def _stage(
    plan: ResNetPlan, channels: int, planes: int, count: int, resample: Callable[..., nn.Module]
) -> nn.Sequential:
    """Residual blocks, the first of which halves (`_conv1x1` on its skip) or doubles (`_deconv2x2`) the size."""
    width = planes * plan.block.expansion
    skip = nn.Sequential(resample(channels, width), nn.BatchNorm2d(width))
    doubles = resample is _deconv2x2
    first = plan.block(channels, planes, 1 if doubles else 2, skip, base_width=plan.base_width)
    if doubles:  # in place of the convolution that halves
        name = "conv2" if isinstance(first, Bottleneck) else "conv1"
        halving = getattr(first, name)
        setattr(first, name, _deconv2x2(halving.in_channels, halving.out_channels))
    others = (plan.block(width, planes, base_width=plan.base_width) for _ in range(count - 1))
    return nn.Sequential(first, *others)


def _conv1x1(channels: int, width: int) -> nn.Module:
    return nn.Conv2d(channels, width, 1, 2, bias=False)


def _deconv2x2(channels: int, width: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, width, 2, 2, bias=False)


def _halving(channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


def _initialise(network: nn.Module) -> None:
    """Kaiming's normal initialisation of convolutions; transposed ones keep torch's (code)."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
