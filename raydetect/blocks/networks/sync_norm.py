"""Normalisation over batches with statistics over the images of all workers.

torch's SyncBatchNorm does not support the CPU.

Shapes: B images of this worker, C channels.

Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1, with sums over all workers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydetect.blocks.networks.volume_norm import VolumeNorm


class _Sum(torch.autograd.Function):
    """Sum over workers; the backward pass sums the gradients over workers."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


@contextmanager
def shared_norms(module: nn.Module) -> Iterator[None]:
    """Within the block, all batch norms and volume norms of `module` in training mode use means over all workers."""
    batch_norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    volume_norms = [part for part in module.modules() if isinstance(part, VolumeNorm)]
    for norm in batch_norms:
        norm.forward = partial(_forward, norm)  # type: ignore[method-assign]
    for volume_norm in volume_norms:
        volume_norm.mean_of = partial(_mean, volume_norm.dims)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in batch_norms:
            del norm.forward
        for volume_norm in volume_norms:
            del volume_norm.mean_of


def _mean(dims: tuple[int, ...], values: Tensor) -> Tensor:
    """Mean over dimensions that include the batch, each of size 1 in the result."""
    sums = values.sum(dims, keepdim=True)
    here = values.new_tensor([values.numel() // sums.numel()])
    total = _Sum.apply(torch.cat([sums.flatten(), here]))
    return (total[:-1] / total[-1].detach()).view_as(sums)


def _forward(norm: nn.modules.batchnorm._BatchNorm, values: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, values)
    dims = [0, *range(2, values.ndim)]
    shape = [1, -1, *[1] * (values.ndim - 2)]
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    here = wide.new_tensor([wide.numel() // wide.shape[1]])
    sums = _Sum.apply(torch.cat([wide.sum(dims), here]))
    count = sums[-1].detach()
    mean_C = sums[:-1] / count
    centred = wide - mean_C.view(shape)
    variance_C = _Sum.apply(centred.square().sum(dims)) / count
    _track(norm, mean_C.detach(), variance_C.detach(), count)
    scaled = centred * torch.rsqrt(variance_C + norm.eps).view(shape)
    return scaled if norm.weight is None else scaled * norm.weight.view(shape) + norm.bias.view(shape)


@torch.no_grad()
def _track(norm: nn.modules.batchnorm._BatchNorm, mean_C: Tensor, variance_C: Tensor, count: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean_C, share)
    norm.running_var.lerp_(variance_C * count / (count - 1), share)
