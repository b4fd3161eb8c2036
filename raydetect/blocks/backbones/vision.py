"""Imports torchvision, faster than importing it directly; use this module for all torchvision imports.

At import, torchvision 0.29's `ops.roi_align` imports one function from `torch._dynamo`, which loads torch's compiler,
sympy and sharded training: as much time as the rest of torchvision and half of torch. Nothing here calls that function.
While torchvision is imported, a stub module with that function takes its place and loads torch's own module on use.
Training loads the compiler anyway, because torch's optimizers import it.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo.utils"


class _Later(ModuleType):
    """Stub for the compiler's module; any use loads the real one."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """Calls torch's own function."""
        found: bool = _compiler().is_compile_supported(device_type)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked up by the import system
            raise AttributeError(name)
        return getattr(_compiler(), name)


def _compiler() -> ModuleType:
    """torch's own module, replacing the stub."""
    _remove_stub()
    return importlib.import_module(COMPILER)


def _remove_stub() -> None:
    if isinstance(sys.modules.get(COMPILER), _Later):
        del sys.modules[COMPILER]


@contextmanager
def _without_the_compiler() -> Iterator[None]:
    if COMPILER in sys.modules:
        yield
        return
    sys.modules[COMPILER] = _Later(COMPILER)
    try:
        yield
    finally:
        _remove_stub()


with _without_the_compiler():
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms  # v2 also loads the compiler

__all__ = ["BasicBlock", "Bottleneck", "InterpolationMode", "create_feature_extractor", "models", "transforms"]
