"""Finds detectors by name: every module of this package whose name does not start with `_` is one detector."""

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args, get_type_hints

import raydetect.detectors as package
from raydetect.config import ENSEMBLE, DetectorSpec, MemberSpec, Precision, Preset
from raydetect.config.fit import STANDARD
from raydetect.config.geometry.paper_views import paper_view
from raydetect.config.validation import nearest, to_plain, validate
from raydetect.detectors._base import Detector, UsedIf
from raydetect.detectors._ensemble import Ensemble
from raydetect.errors import SpecError

ALIASES = {
    "april_gan": "aprilgan",
    "cflow_ad": "cflow",
    "rd++": "reverse_distillation_pp",
    "rdpp": "reverse_distillation_pp",
}
"""Alternative names of detectors."""

VARIANTS = dict.fromkeys(
    ("reverse_distillation", "rd4ad", "rd"), "reverse_distillation_pp with params {projector: false, batch_size: 16}"
)
"""Names of algorithms that are a detector with certain parameters, and how to ask for them."""


@cache
def list_models() -> tuple[str, ...]:
    """The names of all detectors, sorted. Imports no detector."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"))


def detector_class(name: str) -> type[Detector]:
    """The class of a detector, by its name or an alias.

    Raises:
        SpecError: no detector has this name; the message suggests the closest one.
    """
    name = ALIASES.get(name, name)
    if name in VARIANTS:
        raise SpecError(f"detector {name!r} is {VARIANTS[name]}. Use that.")
    if name not in list_models():
        raise SpecError(f"detector {name!r} is unknown.{nearest(name, list_models())}")
    module = importlib.import_module(f"{package.__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Detector) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Detector, found {len(found)}")
    return found[0]


def build_detector(name: str, params: Mapping[str, Any], seed: int = 0, preset: Preset = STANDARD) -> Detector:
    """An unfitted detector; its weights are not loaded yet.

    Args:
        name: a name of `list_models()`, or "ensemble" with the parameters of an artifact's record.
        params: overrides of the preset.
        seed: seed of all random choices of the fit.
        preset: "standard", the detector's defaults, "paper", with the paper's input, or "smoke", a small
            one for tests.

    Raises:
        SpecError: an unknown name, or unknown or invalid parameters.
    """
    if name == ENSEMBLE:
        stored = validate(Ensemble.Params, params, f"detector {name}")
        return _build_ensemble(stored.members, stored.weights, seed)
    kind = detector_class(name)
    presets: Mapping[str, Mapping[str, Any]] = {
        "smoke": kind.smoke,
        "paper": paper_view(ALIASES.get(name, name)).params,
    }
    chosen = {**presets.get(preset, {}), **params}
    return kind(validate(kind.Params, chosen, f"detector {name}"), seed)


def build_from(spec: DetectorSpec, seed: int) -> Detector:
    """The unfitted detector described by a spec.

    Raises:
        SpecError: an unknown name, unknown or invalid parameters, a stated parameter that has no effect with the
            others, an unknown backbone, or ensemble members that differ in image_size.
    """
    detector = (
        _build_ensemble(spec.ensemble, spec.weights or (1.0,) * len(spec.ensemble), seed)
        if spec.ensemble
        else build_detector(spec.name, spec.params, seed, spec.preset)
    )
    built = detector.members if isinstance(detector, Ensemble) else [detector]
    for member, one in zip(spec.members, built, strict=True):
        _refuse_unused(member, one.params)
        _check_backbone(one.params)
    return detector


def unused_params(params: Detector.Params) -> dict[str, UsedIf]:
    """The parameters that have no effect with the values of others, and why."""
    return {
        name: condition
        for name, conditions in _conditions(type(params)).items()
        for condition in conditions
        if not condition.holds(params)
    }


def _conditions(kind: type[Detector.Params]) -> dict[str, tuple[UsedIf, ...]]:
    hints = get_type_hints(kind, include_extras=True)
    found = {name: tuple(e for e in get_args(hint)[1:] if isinstance(e, UsedIf)) for name, hint in hints.items()}
    return {name: conditions for name, conditions in found.items() if conditions}


def _refuse_unused(member: MemberSpec, params: Detector.Params) -> None:
    """Refuses stated parameters without an effect; none says so itself. Records of artifacts do not come here."""
    for name, condition in unused_params(params).items():
        if member.params.get(name) is not None:
            other = condition.other
            given = getattr(params, other)
            advice = " or ".join(f"{other}: {_shown(value)}" for value in condition.values)
            advice = advice or (other if given is None else f"another {other}")
            raise SpecError(
                f"detector {member.name}: {name} has no effect with {other}: {_shown(given)}. "
                f"Remove it, or set {advice}."
            )


def _check_backbone(params: Detector.Params) -> None:
    from raydetect.blocks.backbones.backbone import bare_name  # slow, and loaded already by what has a backbone

    name = getattr(params, "backbone", None)
    if name is not None:
        bare_name(name)


def _shown(value: Any) -> str:
    """A value as in a job file."""
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value)


def _build_ensemble(specs: Sequence[MemberSpec], weights: Sequence[float], seed: int) -> Ensemble:
    members = [build_detector(spec.name, spec.params, seed, spec.preset) for spec in specs]
    sizes = [member.params.image_size for member in members]
    for spec, size in zip(specs, sizes, strict=True):
        if size != sizes[0]:
            raise SpecError(
                f"{ENSEMBLE}: {specs[0].name} has image_size {sizes[0]} and {spec.name} {size}, and all members see "
                "the same pixels. Set image_size alike in their params."
            )
    whole = [MemberSpec(name=s.name, params=to_plain(m.params)) for s, m in zip(specs, members, strict=True)]
    precision: Precision = "bfloat16" if any(m.params.precision == "bfloat16" for m in members) else "float32"
    shares = tuple(map(float, weights))
    params = Ensemble.Params(image_size=sizes[0], precision=precision, members=tuple(whole), weights=shares)
    return Ensemble(params, members, seed)
