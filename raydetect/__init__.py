"""raydetect: distributed anomaly detection over image archives, on Ray.

The names of the notebook face are loaded when they are first asked for, so that `import raydetect` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raydetect import moved_modules

if TYPE_CHECKING:
    from raydetect.python_api.models import (
        BadImagesError,
        Estimator,
        NotFittedError,
        RaydetectError,
        SpecError,
        create_ensemble,
        create_model,
        list_models,
    )

moved_modules.install()
__version__ = "0.1.0"
__all__ = [
    "BadImagesError",
    "Estimator",
    "NotFittedError",
    "RaydetectError",
    "SpecError",
    "create_ensemble",
    "create_model",
    "list_models",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("raydetect.python_api.models"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
