"""Creates models by name, for Python: `from raydetect import create_ensemble, create_model, list_models`."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from raydetect.config import DetectorSpec, MemberSpec, Preset
from raydetect.config.fit import STANDARD
from raydetect.config.validation import validate
from raydetect.detectors._base import NotFittedError
from raydetect.detectors._registry import detector_class, list_models
from raydetect.errors import RaydetectError, SpecError
from raydetect.python_api.estimator import Estimator
from raydetect.python_api.inputs import BadImagesError

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


ELSEWHERE = {
    "device": "create_model(...).configure(device=...)",
    "threads": "create_model(...).configure(threads=...)",
    "storage": "create_model(...).configure(storage=...)",
    "batch_size": "create_model(...).configure(batch_size=...)",
    "progress": "fit(images, progress=...), and likewise in every call that scores",
    "holdout_ratio": "fit(images, holdout_ratio=...)",
    "view": "fit(images, view=...)",
    "auxiliary": "fit(images, auxiliary=...)",
    "jpeg_scale": "fit(images, jpeg_scale=...)",
    "alpha": "predict(images, alpha=...)",
}
"""Arguments that are no parameters of an algorithm, and where they go."""


class _CreateModel:
    """Creates a model by the name of its algorithm; `list_models()` lists the names.

    >>> create_model("patchcore", backbone="resnet18")
    create_model('patchcore', backbone='resnet18')
    >>> create_model("patchcoer")
    Traceback (most recent call last):
    raydetect.errors.SpecError: detector 'patchcoer' is unknown. Did you mean 'patchcore'? Known: ...
    """

    def __call__(self, name: str, preset: Preset = STANDARD, seed: int = 0, **params: Any) -> Estimator:
        """Creates an unfitted model; loads nothing yet.

        Args:
            name: one of `list_models()`.
            preset: "standard" for the published parameters, "paper" for the paper's resize, crop and size of the input
                too, "smoke" for small and fast ones to try things out.
            seed: of every random choice.
            **params: parameters that differ from the preset; `raydetect detectors NAME` describes them.

        Raises:
            SpecError: the name or a parameter is unknown (the message suggests the nearest match), or a value is
                invalid.
        """
        _refuse_settings(name, params)
        values = {"name": name, "preset": preset, "params": params}
        return Estimator(validate(DetectorSpec, values, "create_model"), seed)

    def load(self, uri: str, **settings: Any) -> Estimator:
        """Loads a fitted model from an artifact; see `Estimator.load`."""
        return Estimator.load(uri, **settings)


create_model = _CreateModel()


def create_ensemble(
    members: Sequence[Estimator | str], weights: Sequence[float] | None = None, seed: int = 0
) -> Estimator:
    """Creates an unfitted model that scores by the weighted mean of several detectors on a common scale.

    All members are fitted on the same images and saved in one artifact. `raydetect/detectors/_ensemble.py` defines the
    scale.

    Args:
        members: models of one detector each, or names. Earlier fits of the models are not used.
        weights: of the mean; only their ratios matter; None = equal.
        seed: of every member.

    Raises:
        SpecError: there are no members, a member is an ensemble or has another seed, members differ in image_size, or
            the weights are invalid.

    >>> create_ensemble([create_model("patchcore", image_size=(224, 224)), create_model("stfpm")])
    Traceback (most recent call last):
    raydetect.errors.SpecError: ensemble: patchcore has image_size (224, 224) and stfpm (256, 256), ...
    >>> create_ensemble([create_model("patchcore", n_neighbors=1), "stfpm"], weights=[2, 1])
    create_ensemble([create_model('patchcore', n_neighbors=1), create_model('stfpm')], weights=[2.0, 1.0])
    """
    if isinstance(members, str) or not members:
        raise SpecError("members: give a list of models or names, such as ['patchcore', 'stfpm'].")
    specs = [_member(member, seed) for member in members]
    values = {"ensemble": specs, "weights": None if weights is None else list(weights)}
    return Estimator(validate(DetectorSpec, values, "create_ensemble"), seed)


def _refuse_settings(name: str, params: Mapping[str, Any]) -> None:
    """Says where arguments go that are no parameters of the detector.

    Raises:
        SpecError: there are some, or the name is unknown.
    """
    known = {field.name for field in fields(detector_class(name).Params)}
    for given in params:
        if given in ELSEWHERE and given not in known:
            raise SpecError(f"create_model: {given} is no parameter of {name}. Give it to {ELSEWHERE[given]}.")


def _member(member: Estimator | str, seed: int) -> MemberSpec:
    if isinstance(member, str):
        return MemberSpec(name=member)
    if not isinstance(member, Estimator):
        raise SpecError(f"members: one is of type {type(member).__name__}. Give create_model(...) or a name.")
    if member.spec.ensemble:
        raise SpecError(f"members: {member!r} is an ensemble itself. Give its members one by one.")
    if member.seed not in (0, seed):
        raise SpecError(f"members: {member!r} has its own seed, but all members share one. Set create_ensemble's seed.")
    return member.spec.members[0]
