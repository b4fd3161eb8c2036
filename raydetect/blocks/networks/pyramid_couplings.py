"""Couplings between the levels of a pyramid: a level is scaled and shifted by its neighbours; volumes are preserved.

Shapes: B images, C channels, h w feature grid of a level; a pyramid is a list of maps, finest first.

Source: PyramidFlow (arXiv 2303.02595), sec. 3.2-3.3, fig. 3 and appendix, and its official code
(gasharper/PyramidFlow); Kingma and Dhariwal, "Glow", NeurIPS 2018, eq. 10 (1x1 convolutions in LU form).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.networks.flows import random_rotation
from raydetect.blocks.networks.volume_norm import VolumeNorm, VolumeNormKind
from raydetect.blocks.precision import in_float32
from raydetect.blocks.seeding import keyed_generator

CLAMP, ATAN_FACTOR = 2.0, 0.636  # official code; 0.636 is about 2 / pi, so log-scales stay within +- CLAMP


class LevelCoupling(nn.Module):
    """Transforms one level of a pyramid given the levels next to it, and mixes its channels.

    The neighbours are sampled on the grid of the level, except that for the coarsest level the subnet works on the
    grid of its only neighbour, and log-scales and shifts are sampled (official code).

    Attributes:
        target: index of the level that is transformed.
        sources: indices of its neighbours.
    """

    def __init__(
        self,
        target: int,
        channels: int,
        grids: Sequence[tuple[int, int]],
        kernel_size: int,
        norm: VolumeNormKind,
        generator: torch.Generator,
    ) -> None:
        """Initially an orthogonal mixing of channels; the subnet uses torch's global generator."""
        super().__init__()
        self.target = target
        self.sources = [level for level in (target - 1, target + 1) if 0 <= level < len(grids)]
        self.samples_last = target == len(grids) - 1
        inside, hidden = channels * len(self.sources), 2 * channels
        self.subnet = nn.Sequential(
            nn.Conv2d(inside, hidden, kernel_size, padding=kernel_size // 2, bias=False),
            nn.LeakyReLU(),
            nn.Conv2d(hidden, 2 * channels, kernel_size, padding=kernel_size // 2, bias=False),
        )
        last = self.subnet[-1]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)
        self.norm = VolumeNorm(norm, channels, grids[self.sources[0] if self.samples_last else target])
        self.mixing = UnitMixing(channels, generator)

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        """The pyramid with the transformed level."""
        log_scale, shift = self.coefficients(pyramid)
        level = self.mixing(pyramid[self.target] * log_scale.exp() + shift)
        return [*pyramid[: self.target], level, *pyramid[self.target + 1 :]]

    def inverse(self, pyramid: list[Tensor]) -> list[Tensor]:
        """The pyramid that `forward` maps to this one, in evaluation mode."""
        log_scale, shift = self.coefficients(pyramid)
        level = (self.mixing.inverse(pyramid[self.target]) - shift) * (-log_scale).exp()
        return [*pyramid[: self.target], level, *pyramid[self.target + 1 :]]

    def coefficients(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the level, (B, C, h, w); they depend on its neighbours alone.

        The log-determinant of the coupling is the sum of the log-scales.
        """
        level, sources = pyramid[self.target], [pyramid[source] for source in self.sources]
        if not self.samples_last:
            sources = [_sampled(source, level) for source in sources]
        raw, shift = self.subnet(torch.cat(sources, 1)).to(level.dtype).chunk(2, 1)
        log_scale = self.norm(CLAMP * ATAN_FACTOR * torch.atan(raw / CLAMP))
        return _sampled(log_scale, level), _sampled(shift, level)


class UnitMixing(nn.Module):
    """A 1x1 convolution with |det| = 1: P L U, where L has a diagonal of ones that of U has logarithms of mean 0."""

    def __init__(self, channels: int, generator: torch.Generator) -> None:
        """Initially a random orthogonal matrix."""
        super().__init__()
        orders, lower, upper = torch.linalg.lu(random_rotation(channels, generator).matrix_CC.double())
        self.order_CC: Tensor
        self.sign_C: Tensor
        self.register_buffer("order_CC", orders.float())
        self.register_buffer("sign_C", upper.diagonal().sign().float())
        self.lower_CC = nn.Parameter(lower.tril(-1).float())
        self.upper_CC = nn.Parameter(upper.triu(1).float())
        self.log_diagonal_C = nn.Parameter(upper.diagonal().abs().log().float())

    def weight(self) -> Tensor:
        """The matrix, (C, C)."""
        diagonal_C = self.sign_C * (self.log_diagonal_C - self.log_diagonal_C.mean()).exp()
        lower_CC = self.lower_CC.tril(-1) + torch.eye(len(diagonal_C), device=diagonal_C.device)
        return self.order_CC @ lower_CC @ (self.upper_CC.triu(1) + diagonal_C.diag())

    def forward(self, level_BChw: Tensor) -> Tensor:
        """Mixes the channels."""
        return in_float32(self._mixed, level_BChw)

    def _mixed(self, level_BChw: Tensor) -> Tensor:
        return F.conv2d(level_BChw, self.weight()[:, :, None, None])

    def inverse(self, level_BChw: Tensor) -> Tensor:
        """Undoes the mixing."""
        inverse_CC = torch.linalg.inv(self.weight().double()).to(level_BChw.dtype)
        return F.conv2d(level_BChw, inverse_CC[:, :, None, None])


class PyramidCouplings(nn.Module):
    """Stacks of couplings: of the odd levels given the even ones, then of the even levels given the odd ones."""

    def __init__(
        self,
        channels: int,
        grids: Sequence[tuple[int, int]],
        stacks: int,
        kernel_size: int,
        norm: VolumeNormKind,
        seed: int,
    ) -> None:
        """New couplings.

        Args:
            channels: C, of every level.
            grids: (h, w) of every level, finest first; at least two.
            stacks: passes over all levels.
            kernel_size: of the subnets, odd.
            norm: what the volume norms average.
            seed: of the mixings; the subnets use torch's global generator.
        """
        super().__init__()
        targets = [*range(1, len(grids), 2), *range(0, len(grids), 2)]
        self.couplings = nn.ModuleList(
            LevelCoupling(target, channels, grids, kernel_size, norm, keyed_generator(seed, "mixing", stack, target))
            for stack in range(stacks)
            for target in targets
        )

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        """z of every level."""
        for coupling in self.couplings:
            pyramid = coupling(pyramid)
        return pyramid

    def inverse(self, pyramid: list[Tensor]) -> list[Tensor]:
        """The pyramid that `forward` maps to this one, in evaluation mode."""
        for coupling in reversed(self.couplings):
            assert isinstance(coupling, LevelCoupling)
            pyramid = coupling.inverse(pyramid)
        return pyramid


def _sampled(features: Tensor, like: Tensor) -> Tensor:
    """Nearest neighbours on the grid of another map."""
    size = like.shape[2:]
    return features if features.shape[2:] == size else F.interpolate(features, size=size, mode="nearest")
