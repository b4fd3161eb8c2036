"""Metrics, with numpy and scipy only.

For use in Python: of image scores `auroc(labels, scores)`, `average_precision(labels, scores)` and
`best_f1(labels, scores)`; of anomaly maps `pixel_auroc(maps, masks)`, `pixel_average_precision(maps, masks)`,
`pixel_best_f1(maps, masks)` and `aupro(maps, masks, fpr_limit)`; of scores of held-out normal images
`p_values(held_out, scores)`. All are exact. The names are loaded when they are first asked for.

>>> from raydetect.metrics import auroc, best_f1
>>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
0.75
>>> best_f1([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
(0.8, 0.35)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydetect.metrics.conformal import p_values
    from raydetect.metrics.f1 import best_f1
    from raydetect.metrics.of_maps import pixel_auroc, pixel_average_precision, pixel_best_f1
    from raydetect.metrics.pro import aupro
    from raydetect.metrics.roc import auroc, average_precision

MODULES = {
    "aupro": "pro",
    "auroc": "roc",
    "average_precision": "roc",
    "best_f1": "f1",
    "p_values": "conformal",
    "pixel_auroc": "of_maps",
    "pixel_average_precision": "of_maps",
    "pixel_best_f1": "of_maps",
}
__all__ = [
    "aupro",
    "auroc",
    "average_precision",
    "best_f1",
    "p_values",
    "pixel_auroc",
    "pixel_average_precision",
    "pixel_best_f1",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
