"""The one door to torchvision, which opens faster than torchvision's own.

As it is loaded, torchvision 0.29's `ops.roi_align` takes one function out of `torch._dynamo`, and with it come torch's
compiler, sympy and sharded training: as much time as all the rest of torchvision and half of torch. Nothing here calls
that function. While torchvision is loaded, one of the same name stands there alone, and fetches torch's own when it is
called. Training loads the compiler all the same: torch's optimizers ask for it.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo.utils"


class _Later(ModuleType):
    """Stands for the compiler's module; anything but the one function loads it."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """torch's own answer."""
        found: bool = _compiler().is_compile_supported(device_type)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for such
            raise AttributeError(name)
        return getattr(_compiler(), name)


def _compiler() -> ModuleType:
    """torch's own module, whatever stands for it."""
    _make_way()
    return importlib.import_module(COMPILER)


def _make_way() -> None:
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
        _make_way()


with _without_the_compiler():
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.models.resnet import BasicBlock
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms  # their second version loads the compiler too

__all__ = ["BasicBlock", "InterpolationMode", "create_feature_extractor", "models", "transforms"]
