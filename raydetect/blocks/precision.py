"""Networks in bfloat16 by torch's autocast, and everything else in float32.

Only calls through `run_network` are affected: what is computed from their outputs, such as distances, likelihoods and
losses, is float32 at either precision.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raydetect.config import Precision


def run_network(network: Callable[..., Any], *inputs: Any, precision: Precision, device: torch.device) -> Any:
    """Calls a network at a precision.

    Args:
        network: a module, or a method of one.
        *inputs: its inputs; tensors are float32.
        precision: "float32" calls it as it is; "bfloat16" computes its convolutions and matrix products in bfloat16
            with float32 sums, from float32 weights that are rounded for each call.
        device: of the network.

    Returns:
        Its output: a tensor, or a list or tuple of them, of float32 at either precision.
    """
    if precision == "float32":
        return network(*inputs)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        return _widened(network(*inputs))


def in_float32(network: Callable[..., Any], *inputs: Tensor) -> Any:
    """Calls a part of a network in float32, or wider if its inputs are, whatever the precision of the whole.

    For last layers, whose outputs would otherwise have the 8 significant bits of bfloat16 and tie often, and for
    maps whose log-determinant assumes float32.
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        return network(*map(_widened, inputs))


def _widened(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float() if output.dtype == torch.bfloat16 else output
    return type(output)(_widened(part) for part in output)
