"""raydetect: distributed anomaly detection over image archives, on Ray.

The names of the notebook face are loaded when they are first asked for, so that `import raydetect` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raydetect import moved_modules

if TYPE_CHECKING:
    from raydetect.detectors._base import NotFittedError
    from raydetect.errors import RaydetectError, SpecError
    from raydetect.python_api.inputs import BadImagesError
    from raydetect.python_api.models import Estimator, create_ensemble, create_model, list_models

moved_modules.install()
__version__ = "0.1.0"
_MODULES = {
    "BadImagesError": "python_api.inputs",
    "Estimator": "python_api.models",
    "NotFittedError": "detectors._base",
    "RaydetectError": "errors",
    "SpecError": "errors",
    "create_ensemble": "python_api.models",
    "create_model": "python_api.models",
    "list_models": "python_api.models",
}
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
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"raydetect.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
