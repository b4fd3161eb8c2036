"""MemSeg's parts: a memory of features, and a head that fuses differences from it over scales and decodes a mask.

Shapes: B images, M memories, K neighbours, C channels, h w feature grid, H W pixels.

Source: Yang et al., MemSeg, arXiv 2205.00908, sec. 3.2-3.4; layers as in TooTouch/MemSeg. Coordinate attention: Hou et
al., CVPR 2021, arXiv 2103.02907.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.unet import UpConvolution

REDUCTION, LEAST_WIDTH = 32, 8
CLASSES = 2


class Memory(nn.Module):
    """Feature pyramids of normal images."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        """Keeps the levels, (M, C, h, w) each."""
        super().__init__()
        self.count = len(levels)
        for number, level in enumerate(levels):
            self.register_buffer(f"level{number}", level)

    def recall(self, features: Sequence[Tensor], num_neighbors: int) -> list[Tensor]:
        """What normal features look like here: those of the nearest memory, or of several by attention.

        Distances are mean squares of every level, summed over levels. Of K > 1 memories, each position takes the mean
        weighted by softmax(-d^2 / sqrt(C)), where d is its distance from the memory's features at this position.

        Source: MemSeg, sec. 3.2; attention over several is ours.
        """
        memories = [self.get_buffer(f"level{number}") for number in range(self.count)]
        distance_BM = torch.stack([_mean_squares(*pair) for pair in zip(features, memories, strict=True)]).sum(0)
        nearest_BK = distance_BM.topk(num_neighbors, largest=False).indices
        if num_neighbors == 1:
            return [memory[nearest_BK[:, 0]] for memory in memories]
        found = []
        for level, memory in zip(features, memories, strict=True):
            near_BKChw = memory[nearest_BK]
            squares = (near_BKChw - level[:, None]).square().sum(2, keepdim=True)
            found.append((near_BKChw * (-squares / math.sqrt(level.shape[1])).softmax(1)).sum(1))
        return found


def _mean_squares(level_BChw: Tensor, memory_MChw: Tensor) -> Tensor:
    """Mean squared difference of all pairs, (B, M), up to a term of the image alone; as a product, for speed."""
    rows_BN, memory_MN = level_BChw.flatten(1), memory_MChw.flatten(1)
    return (memory_MN.square().sum(1) - 2 * rows_BN @ memory_MN.T) / rows_BN.shape[1]


class CoordinateAttention(nn.Module):
    """A factor for every row and one for every column of each channel, from means along the other axis."""

    def __init__(self, channels: int) -> None:
        """Builds it."""
        super().__init__()
        width = max(LEAST_WIDTH, channels // REDUCTION)
        self.squeeze = nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.Hardswish())
        self.rows = nn.Conv2d(width, channels, 1)
        self.columns = nn.Conv2d(width, channels, 1)

    def forward(self, features_BChw: Tensor) -> Tensor:
        """The features times both factors."""
        height, width = features_BChw.shape[-2:]
        means = torch.cat([features_BChw.mean(3), features_BChw.mean(2)], 2)[..., None]
        rows, columns = self.squeeze(means).split([height, width], 2)
        return features_BChw * self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()


class FusionBlock(nn.Module):
    """Concatenated information of one level: a convolution times coordinate attention, then half the channels."""

    def __init__(self, channels: int) -> None:
        """Builds it for 2 * `channels` that come in."""
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
    """Levels fused from deep to shallow, each then weighted by where the differences are (sec. 3.2)."""

    def __init__(self, widths: Sequence[int]) -> None:
        """Builds it for levels of these channels, shallowest first."""
        super().__init__()
        self.blocks = nn.ModuleList([FusionBlock(width) for width in widths])
        pairs = zip(widths[1:], widths[:-1], strict=True)
        self.lift = nn.ModuleList([nn.Conv2d(deep, shallow, 3, padding=1) for deep, shallow in pairs])

    def forward(self, features: Sequence[Tensor], differences: Sequence[Tensor]) -> list[Tensor]:
        """Levels of the same shapes, from features and their differences from memory."""
        pairs = zip(self.blocks, features, differences, strict=True)
        fused = [block(torch.cat([level, other], 1)) for block, level, other in pairs]
        for number in reversed(range(len(self.lift))):
            fused[number] = fused[number] + self.lift[number](_doubled(fused[number + 1]))
        weights = [difference.mean(1, keepdim=True) for difference in differences]
        for number in reversed(range(len(self.lift))):
            weights[number] = weights[number] * _doubled(weights[number + 1])
        return [level * weight for level, weight in zip(fused, weights, strict=True)]


class MaskDecoder(nn.Module):
    """From the deepest features up to the image's size, with the fused levels and the stem as skips."""

    def __init__(self, stem_width: int, widths: Sequence[int], feature_dim: int) -> None:
        """Builds it; `feature_dim`, of the deepest features, is a multiple of 32."""
        super().__init__()
        shares = [feature_dim // 2, feature_dim // 4, feature_dim // 8]
        last = 3 * feature_dim // 32
        self.up, below = nn.ModuleList(), feature_dim
        for width, skip in zip(shares, reversed(widths), strict=True):
            self.up.append(UpConvolution(below, width))
            below = width + skip
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
        return self.last(self.up_to_mask(found))


def _doubled(level: Tensor) -> Tensor:
    return F.interpolate(level, scale_factor=2.0, mode="bilinear", align_corners=True)
