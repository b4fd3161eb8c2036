"""Fitted detectors on a GPU that does not exist: every tensor is fake, so only shapes, types and devices are computed.

In torch's FakeTensorMode, a CPU tensor that meets a CUDA one raises, and so does whatever needs a value on the host:
`.item()`, `.tolist()`, `bool(tensor)`, `nonzero`, boolean masks, `bincount`.
"""

import copy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raydetect.blocks.device_constants import forget_constants
from raydetect.blocks.search import exact_search
from raydetect.detectors._base import Detector, Scores

CUDA = torch.device("cuda")
SOURCES = "raydetect/"


class _CpuTensors(TorchDispatchMode):
    """Notes every operation that takes or returns a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            frames = [f for f in traceback.extract_stack() if SOURCES in f.filename or "tests/detectors" in f.filename]
            self.found.append(f"{frames[-1].filename.rpartition(SOURCES)[2]}:{frames[-1].lineno} {func}")
        return result


def _moved_in_place(self: nn.Module, move: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` without swapping the contents of tensors, which fake tensors do not allow."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(move(parameter.data), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = move(buffer)
    return self


def _no_gradient(outputs: Tensor, inputs: Tensor) -> tuple[Tensor]:
    """A gradient's shape and device. Autograd's engine starts a thread per real GPU, so it cannot run on a fake one."""
    assert outputs.requires_grad and inputs.requires_grad
    return (torch.empty_like(inputs),)


@contextmanager
def _pending(patches: int) -> Iterator[list[int]]:
    """Lets exact searches find this many patches unproven; yields a list that grows with every wait of theirs."""
    waits: list[int] = []

    def rows_where(mask_N: Tensor) -> Tensor:
        assert mask_N.device.type == "cuda" and mask_N.dtype == torch.bool
        waits.append(len(mask_N))
        return torch.arange(min(patches, len(mask_N)), device=mask_N.device)

    with patch.object(exact_search, "rows_where", rows_where):
        yield waits


def score_on_fake_gpu(detector: Detector, size_px: tuple[int, int], pending: int = 0) -> int:
    """Moves a copy of a fitted detector to a fake GPU, scores twice there, and checks that all stays there.

    The first call may send constants; the second must neither take nor make a tensor on the CPU.

    Args:
        detector: fitted, on the CPU; it is not changed.
        size_px: (height, width) of the images.
        pending: patches that the first step of an exact search leaves unproven.

    Returns:
        How often the second call waited for the device.
    """
    forget_constants()
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    try:
        with FakeCopyMode(mode):
            moved = copy.deepcopy(detector)
        with (
            mode,
            patch.object(nn.Module, "_apply", _moved_in_place),
            patch.object(torch.autograd, "grad", _no_gradient),
            _pending(pending) as waits,
        ):
            assert moved.to(CUDA) is moved
            images_BCHW = torch.zeros(3, 3, *size_px, dtype=torch.uint8, device=CUDA)
            with torch.inference_mode():
                _require_on_gpu(moved.score(images_BCHW), size_px)
                waits.clear()
                with _CpuTensors() as cpu:
                    _require_on_gpu(moved.score(images_BCHW), size_px)
    finally:
        forget_constants()
    assert not cpu.found, f"tensors on the CPU at the second call: {sorted(set(cpu.found))}"
    return len(waits)


def _require_on_gpu(scores: Scores, size_px: tuple[int, int]) -> None:
    for tensor, shape in ((scores.image_score_B, (3,)), (scores.anomaly_map_BHW, (3, *size_px))):
        assert tensor.device.type == "cuda" and tensor.dtype == torch.float32 and tensor.shape == shape
