"""Makes models by name, for Python: `from raydetect import create_model, list_models`."""

from typing import Any

from raydetect.config import validate
from raydetect.detectors._registry import list_models
from raydetect.estimator import Estimator
from raydetect.spec import DetectorSpec, Preset

__all__ = ["Estimator", "create_model", "list_models"]


class _CreateModel:
    """Makes a model by the name of its algorithm; `list_models()` names them all.

    >>> create_model("patchcore", backbone="resnet18")
    create_model('patchcore', backbone='resnet18')
    >>> create_model("patchcoer")
    Traceback (most recent call last):
    raydetect.errors.SpecError: detector 'patchcoer' is unknown. Did you mean 'patchcore'? Known: ...
    """

    def __call__(self, name: str, preset: Preset = "paper", seed: int = 0, **params: Any) -> Estimator:
        """An unfitted model; nothing is loaded yet.

        Args:
            name: one of `list_models()`.
            preset: "paper", the published parameters; "smoke", small and quick ones for trying things out.
            seed: of every random choice.
            **params: what differs from the preset; `raydetect detectors NAME` describes them.

        Raises:
            SpecError: an unknown name or parameter, with the nearest match, or a bad value.
        """
        values = {"name": name, "preset": preset, "params": params}
        return Estimator(validate(DetectorSpec, values, "create_model"), seed)

    def load(self, uri: str, **settings: Any) -> Estimator:
        """A fitted model from an artifact; see `Estimator.load`."""
        return Estimator.load(uri, **settings)


create_model = _CreateModel()
