"""Constant tensors: computed once on the CPU, in an order that no device changes, and kept on every device that asks.

Without this, a constant would be sent with every batch, and sending waits for all work that the device still has.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

MOST_KEPT = 64  # results per function and process


class Movable(Protocol):
    """A tensor, or an object of tensors."""

    def to(self, device: torch.device, /) -> Any:
        """The same on a device."""


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", bound=Movable)
_forgetters: list[Callable[[], None]] = []


def kept_on_device(make: Callable[Arguments, Result]) -> Callable[Concatenate[torch.device, Arguments], Result]:
    """Adds a first argument, the device, to a function of hashable positional values, and keeps its results there.

    The result is shared by all callers and must not be changed in place. It is made outside inference mode, so that
    gradients may flow past it, and on the CPU, so that every device gets equal numbers. The least recently used of
    more than `MOST_KEPT` results is dropped.
    """

    @lru_cache(maxsize=MOST_KEPT)
    def kept(device: torch.device, *args: Any) -> Result:
        with torch.inference_mode(False), torch.no_grad():
            found: Result = make(*args).to(device)  # type: ignore[call-arg]
            return found

    @wraps(make)
    def on(device: torch.device, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        found: Result = kept(device, *args)
        return found

    _forgetters.append(kept.cache_clear)
    return on


def sent_ahead(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, sent without waiting for the work that the device still has.

    For random numbers, which are drawn on the CPU so that they are the same for any device.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def forget_constants() -> None:
    """Drops all constants on all devices; they are computed again when they are needed."""
    for forget in _forgetters:
        forget()
