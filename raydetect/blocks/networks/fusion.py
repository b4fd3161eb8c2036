"""MemSeg components: a feature memory, and a head that fuses multi-scale differences from it and decodes a mask.

Shapes: B images, M memory entries, K neighbours, C channels, h w feature grid, H W pixels.

Source: Yang et al., MemSeg, arXiv 2205.00908, secs. 3.2-3.3, with layers as in the public implementation
TooTouch/MemSeg. Coordinate attention: Hou et al., CVPR 2021, arXiv 2103.02907, eqs. 4-9.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import stage_of
from raydetect.blocks.backbones.vision import BasicBlock
from raydetect.blocks.networks.unet import UpConvolution
from raydetect.blocks.precision import in_float32
from raydetect.blocks.search.matrix_product import product

REDUCTION, LEAST_WIDTH = 32, 8
CLASSES = 2


class Memory(nn.Module):
    """Feature pyramids of normal images."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        """Stores the levels, (M, h, w, C) each, channels last like the backbone's output."""
        super().__init__()
        for number, level_MhwC in enumerate(levels):
            self.register_buffer(f"level{number}", level_MhwC)

    def recall(self, levels: Sequence[Tensor], num_neighbors: int, but_BM: Tensor | None = None) -> list[Tensor]:
        """Normal reference features: those of the nearest memory entry, or an attention average over several.

        Distances are mean squared differences per level, summed over levels. For K > 1, each position takes the mean
        weighted by softmax(-d^2 / sqrt(C)), where d is its distance to the entry's features at that position.

        Args:
            levels: features (B, C, h, w), shallowest first.
            num_neighbors: K, 1 <= K <= M minus the entries excluded by `but_BM`.
            but_BM: True where a memory entry is excluded for an image; None = no exclusions.

        Returns:
            Levels of the same number and shapes.

        Source: MemSeg, sec. 3.2 (K = 1); attention over several entries is ours.
        """
        memories = list(self.buffers())
        pairs = list(zip(levels, memories, strict=True))
        distance_BM = torch.stack([_mean_squares(*pair) for pair in pairs]).sum(0)
        if but_BM is not None:
            distance_BM = distance_BM.masked_fill(but_BM, math.inf)
        nearest_BK = distance_BM.topk(num_neighbors, largest=False).indices
        if num_neighbors == 1:
            return [memory[nearest_BK[:, 0]].permute(0, 3, 1, 2) for memory in memories]
        return [_attended(level, memory[nearest_BK]) for level, memory in pairs]


def _mean_squares(level_BChw: Tensor, memory_MhwC: Tensor) -> Tensor:
    """Mean squared difference of all pairs, (B, M), up to a constant per image; computed as a product for speed."""
    rows_BN = level_BChw.permute(0, 2, 3, 1).flatten(1).float()
    memory_MN = memory_MhwC.flatten(1)
    length_M = torch.linalg.vector_norm(memory_MN, dim=1)
    return (length_M.square() - 2 * product(rows_BN, memory_MN)) / rows_BN.shape[1]


def _attended(level_BChw: Tensor, near_BKhwC: Tensor) -> Tensor:
    """Mean of K memory entries, weighted per position by similarity, (B, C, h, w)."""
    level_B1hwC = level_BChw.permute(0, 2, 3, 1)[:, None]
    squares_BKhw1 = (near_BKhwC - level_B1hwC).square().sum(4, keepdim=True)
    weight_BKhw1 = (-squares_BKhw1 / math.sqrt(level_BChw.shape[1])).softmax(1)
    return (near_BKhwC * weight_BKhw1).sum(1).permute(0, 3, 1, 2)


class CoordinateAttention(nn.Module):
    """Factors per row and per column of each channel, computed from means along the other axis."""

    def __init__(self, channels: int) -> None:
        """Builds it."""
        super().__init__()
        width = max(LEAST_WIDTH, channels // REDUCTION)
        self.squeeze = nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.Hardswish())
        self.rows = nn.Conv2d(width, channels, 1)
        self.columns = nn.Conv2d(width, channels, 1)

    def forward(self, features_BChw: Tensor) -> Tensor:
        """Features times both factors (eq. 9)."""
        height, width = features_BChw.shape[-2:]
        means = torch.cat([features_BChw.mean(3), features_BChw.mean(2)], 2)[..., None]
        rows, columns = self.squeeze(means).split([height, width], 2)
        return features_BChw * self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()


class FusionBlock(nn.Module):
    """Fuses the concatenated features of one level: convolution times coordinate attention, then half the channels."""

    def __init__(self, channels: int) -> None:
        """Builds the block for 2 * `channels` input channels."""
        super().__init__()
        self.convolution = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.attention = CoordinateAttention(2 * channels)
        self.halve = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, information: Tensor) -> Tensor:
        """(B, C, h, w) from (B, 2 C, h, w)."""
        return self.halve(self.convolution(information) * self.attention(information))


class MultiScaleFusion(nn.Module):
    """Fuses levels from deep to shallow and weights them by the differences (secs. 3.2-3.3)."""

    def __init__(self, widths: Sequence[int]) -> None:
        """Builds the module for levels with these channels, shallowest first."""
        super().__init__()
        self.blocks = nn.ModuleList([FusionBlock(width) for width in widths])
        pairs = zip(widths[1:], widths[:-1], strict=True)
        self.lift = nn.ModuleList([nn.Conv2d(deep, shallow, 3, padding=1) for deep, shallow in pairs])

    def forward(self, levels: Sequence[Tensor], differences: Sequence[Tensor]) -> list[Tensor]:
        """Fused levels of the same shapes, from features and their differences from memory, (B, C, h, w) each."""
        parts = zip(self.blocks, levels, differences, strict=True)
        fused = [block(torch.cat([level, difference], 1)) for block, level, difference in parts]
        weights = [difference.mean(1, keepdim=True) for difference in differences]
        for number in reversed(range(len(self.lift))):
            fused[number] = fused[number] + self.lift[number](_doubled(fused[number + 1]))
            weights[number] = weights[number] * _doubled(weights[number + 1])
        return [level * weight for level, weight in zip(fused, weights, strict=True)]


class MaskDecoder(nn.Module):
    """Decodes the deepest features to the image size, with the fused levels and the stem as skip connections."""

    def __init__(self, stem_width: int, widths: Sequence[int], feature_dim: int) -> None:
        """Builds the decoder.

        Args:
            stem_width: channels of the stem.
            widths: channels of the fused levels, shallowest first.
            feature_dim: channels of the deepest features, a multiple of 32; halved at each level, and 3/32 of them
                at the stem's size and above.
        """
        super().__init__()
        last = 3 * feature_dim // 32
        self.up, below = nn.ModuleList(), feature_dim
        for step, skip in enumerate(reversed(widths), start=1):
            self.up.append(UpConvolution(below, feature_dim >> step))
            below = (feature_dim >> step) + skip
        self.up_to_stem = UpConvolution(below, last)
        self.stem = nn.Conv2d(stem_width, last, 3, padding=1)
        self.up_to_mask = UpConvolution(2 * last, last)
        self.last = nn.Conv2d(last, CLASSES, 3, padding=1)

    def forward(self, deepest: Tensor, stem: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """Logits (B, 2, H, W): normal, anomalous."""
        found = deepest
        for up, level in zip(self.up, reversed(levels), strict=True):
            found = torch.cat([up(found), level], 1)
        found = torch.cat([self.up_to_stem(found), self.stem(stem)], 1)
        return in_float32(self.last, self.up_to_mask(found))


def deepest_stage(
    backbone: str, layer: str | None, weights: Mapping[str, Tensor], in_channels: int, feature_dim: int
) -> nn.Sequential:
    """A stage from the last level to half its size and `feature_dim` channels.

    Args:
        backbone: torchvision or timm name.
        layer: the backbone's stage to use; None = two randomly initialised ResNet-18 residual blocks.
        weights: weights of the stage under the library's names; empty = random.
        in_channels: channels of the last level.
        feature_dim: output channels; a 1 x 1 convolution is added if the stage's width differs.

    Raises:
        SpecError: the backbone has no such stage.
    """
    if layer is None:
        shortcut = nn.Sequential(nn.Conv2d(in_channels, feature_dim, 1, 2, bias=False), nn.BatchNorm2d(feature_dim))
        return nn.Sequential(BasicBlock(in_channels, feature_dim, 2, shortcut), BasicBlock(feature_dim, feature_dim))
    stage = stage_of(backbone, layer)
    if weights:
        missing = stage.load_state_dict(weights, strict=False).missing_keys
        assert all(name.endswith("num_batches_tracked") for name in missing), missing
    with torch.no_grad():
        width = stage.eval()(torch.zeros(1, in_channels, 2, 2)).shape[1]
    return nn.Sequential(stage, nn.Identity() if width == feature_dim else nn.Conv2d(width, feature_dim, 1))


def _doubled(level: Tensor) -> Tensor:
    return F.interpolate(level, scale_factor=2.0, mode="bilinear", align_corners=True)
