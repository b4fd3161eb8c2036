"""Normalising flows: invertible maps with exact log-determinants, and chains of them.

Every map takes and returns tensors (B, C, ...): vectors (B, C) or feature maps (B, C, h, w); it splits, scales and
mixes channels. `forward` also returns log |det d out / d in| for each of the B.

Shapes: B vectors or images, C channels, P dims of a condition.

Source: Dinh et al., "Density estimation using Real NVP", ICLR 2017, eqs. 7-8 (couplings); Kingma and Dhariwal, "Glow",
NeurIPS 2018, sec. 3 (a scale and a shift of every channel, rotations); Ardizzone et al., "Analyzing Inverse Problems
with Invertible Neural Networks", ICLR 2019 (soft clamping, coupling of both halves). `flow_step` follows
AllInOneBlock of the FrEIA library, which CFLOW-AD and FastFlow use.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.precision import in_float32

Subnet = Callable[[int, int], nn.Module]
"""Maps (channels in, channels out) to any network; it need not be invertible."""

DAMPING = 0.1  # makes a new coupling close to the identity
SHARPNESS = 0.5


class Invertible(nn.Module, abc.ABC):
    """An invertible map."""

    @abc.abstractmethod
    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output for x, and log |det| of the Jacobian, (B,)."""

    @abc.abstractmethod
    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The x with forward(x) = z."""


class Chain(Invertible):
    """A sequence of maps; log-determinants are summed."""

    def __init__(self, maps: Sequence[Invertible]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Applies all maps."""
        total_B = x.new_zeros(len(x))
        for part in self.maps:
            x, log_det_B = part(x, condition)
            total_B = total_B + log_det_B
        return x, total_B

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Inverts all maps in reverse order."""
        for part in reversed(self.maps):
            assert isinstance(part, Invertible)
            z = part.inverse(z, condition)
        return z


class HalfCoupling(Invertible):
    """Scales and shifts the second half of the channels by a subnet of the first half and the condition.

    The log-scale is clamp * tanh, so scales stay within (exp(-clamp), exp(clamp)).
    """

    def __init__(self, channels: int, subnet: Subnet, clamp: float, condition_dims: int = 0) -> None:
        super().__init__()
        self.kept, self.moved, self.clamp = channels - channels // 2, channels // 2, clamp
        self.subnet = subnet(self.kept + condition_dims, 2 * self.moved)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transforms the second half."""
        kept, moved = x.split((self.kept, self.moved), 1)
        log_scale, shift = self._coefficients(kept, condition)
        return torch.cat([kept, moved * log_scale.exp() + shift], 1), log_scale.flatten(1).sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Inverts the transform; the unchanged first half determines it."""
        kept, moved = z.split((self.kept, self.moved), 1)
        log_scale, shift = self._coefficients(kept, condition)
        return torch.cat([kept, (moved - shift) * (-log_scale).exp()], 1)

    def _coefficients(self, kept: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = kept if condition is None else torch.cat([kept, condition], 1)
        output = self.subnet(inputs).to(kept.dtype)  # autocast's bfloat16 is too coarse for sums of logarithms
        raw, shift = (DAMPING * output).split(self.moved, 1)
        return self.clamp * torch.tanh(raw), shift


class BothCoupling(Invertible):
    """Scales and shifts each half of the channels by a subnet of the other: first half, then second.

    The log-scale is (2 clamp / pi) * arctan(raw / clamp).
    """

    def __init__(self, channels: int, subnet: Subnet, clamp: float) -> None:
        super().__init__()
        self.first, self.second, self.clamp = channels // 2, channels - channels // 2, clamp
        self.of_second = subnet(self.second, 2 * self.first)
        self.of_first = subnet(self.first, 2 * self.second)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transforms both halves."""
        first, second = x.split((self.first, self.second), 1)
        log_scale, shift = self._coefficients(self.of_second, second)
        first, log_det_B = first * log_scale.exp() + shift, log_scale.flatten(1).sum(1)
        log_scale, shift = self._coefficients(self.of_first, first)
        second, log_det_B = second * log_scale.exp() + shift, log_det_B + log_scale.flatten(1).sum(1)
        return torch.cat([first, second], 1), log_det_B

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Inverts the second half, then the first."""
        first, second = z.split((self.first, self.second), 1)
        log_scale, shift = self._coefficients(self.of_first, first)
        second = (second - shift) * (-log_scale).exp()
        log_scale, shift = self._coefficients(self.of_second, second)
        return torch.cat([(first - shift) * (-log_scale).exp(), second], 1)

    def _coefficients(self, subnet: nn.Module, half: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = subnet(half).to(half.dtype).chunk(2, 1)
        return 2 * self.clamp / math.pi * torch.atan(raw / self.clamp), shift


class ChannelAffine(Invertible):
    """A learned positive scale (softplus) and shift per channel; initialised to the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        one = math.log(math.expm1(SHARPNESS / DAMPING)) / SHARPNESS
        self.raw_C = nn.Parameter(torch.full((channels,), one))
        self.shift_C = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales, then shifts."""
        scale_C, shape = self._scale(), _along_channels(x)
        positions = x[0, 0].numel()
        log_det_B = (positions * scale_C.log().sum()).expand(len(x))
        return torch.addcmul(self.shift_C.view(shape), x, scale_C.view(shape)), log_det_B

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Shifts back, then scales back."""
        shape = _along_channels(z)
        return (z - self.shift_C.view(shape)) / self._scale().view(shape)

    def _scale(self) -> Tensor:
        return DAMPING * F.softplus(self.raw_C, beta=SHARPNESS)


class Permutation(Invertible):
    """A fixed permutation of the channels."""

    def __init__(self, order_C: Tensor) -> None:
        """`order_C[i]` is the input channel at output position i."""
        super().__init__()
        self.order_C: Tensor
        self.register_buffer("order_C", order_C)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Permutes the channels."""
        return _Reorder.apply(x, self.order_C, self.order_C.argsort()), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Restores the channel order."""
        return z.index_select(1, self.order_C.argsort())


class Rotation(Invertible):
    """Multiplies the channels of vectors by a fixed orthogonal matrix."""

    def __init__(self, matrix_CC: Tensor) -> None:
        """Stores the matrix, which must be orthogonal; see `random_rotation`."""
        super().__init__()
        self.matrix_CC: Tensor
        self.register_buffer("matrix_CC", matrix_CC)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotates."""
        return in_float32(F.linear, x, self.matrix_CC), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Rotates back, using the transpose."""
        return z @ self.matrix_CC


def flow_step(channels: int, subnet: Subnet, clamp: float, mixing: Invertible, condition_dims: int = 0) -> Chain:
    """A coupling, a scale and shift per channel, and a mixing of channels for the next step."""
    return Chain([HalfCoupling(channels, subnet, clamp, condition_dims), ChannelAffine(channels), mixing])


def random_permutation(channels: int, generator: torch.Generator) -> Permutation:
    """A uniformly random permutation."""
    return Permutation(torch.randperm(channels, generator=generator))


def random_rotation(channels: int, generator: torch.Generator) -> Rotation:
    """A uniformly random orthogonal matrix; cost is cubic in the channels (seconds at 2048)."""
    gaussian_CC = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    q_CC, r_CC = torch.linalg.qr(gaussian_CC)  # float64, so that |det| of the rounded matrix is 1 within 1e-6
    return Rotation((q_CC * r_CC.diagonal().sign()).float())


def log_likelihood(z: Tensor, log_det_B: Tensor) -> Tensor:
    """Log-likelihood, by change of variables, of inputs a flow maps to standard normal z, (B,)."""
    flat = z.flatten(1)
    return log_det_B - 0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


class _Reorder(torch.autograd.Function):
    """`index_select` over channels with an `index_select` backward; torch's accumulates, which is slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order_C: Tensor, back_C: Tensor) -> Tensor:
        ctx.save_for_backward(order_C, back_C)
        return x.index_select(1, order_C)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        order_C, back_C = ctx.saved_tensors
        return _Reorder.apply(gradients[0], back_C, order_C), None, None


def _along_channels(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.ndim - 2)]
