"""Finds detectors by name: every module of this folder that does not begin with `_` is one detector."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import raydetect.detectors as room
from raydetect.config import nearest, validate
from raydetect.detectors._base import Detector
from raydetect.errors import SpecError
from raydetect.spec import DetectorSpec, Preset


@cache
def list_models() -> tuple[str, ...]:
    """The names of all detectors, sorted. Imports none of them."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(room.__path__) if m.name[0] != "_"))


def detector_class(name: str) -> type[Detector]:
    """The class of a detector.

    Raises:
        SpecError: no detector has this name; the message has the nearest one.
    """
    if name not in list_models():
        raise SpecError(f"detector {name!r} is unknown.{nearest(name, list_models())}")
    module = importlib.import_module(f"{room.__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Detector) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Detector, it has {len(found)}")
    return found[0]


def build_detector(name: str, params: Mapping[str, Any], seed: int = 0, preset: Preset = "paper") -> Detector:
    """An unfitted detector, without weights yet.

    Args:
        name: a name of `list_models()`.
        params: what differs from the preset.
        seed: seeds every random choice of the fit.
        preset: "paper", the detector's defaults, or "smoke", which is small and for tests.

    Raises:
        SpecError: an unknown name, or unknown or bad parameters.
    """
    kind = detector_class(name)
    chosen = {**(kind.smoke if preset == "smoke" else {}), **params}
    return kind(validate(kind.Params, chosen, f"detector {name}"), seed)


def build_from(spec: DetectorSpec, seed: int) -> Detector:
    """The unfitted detector that a job file describes.

    Raises:
        SpecError: an unknown name, or unknown or bad parameters.
    """
    return build_detector(spec.name, spec.params, seed, spec.preset)


def changed_params(spec: DetectorSpec) -> dict[str, Any]:
    """The parameters that differ from the preset, in order of declaration.

    Raises:
        SpecError: an unknown name, or unknown or bad parameters.
    """
    params = build_detector(spec.name, spec.params, preset=spec.preset).params
    plain = build_detector(spec.name, {}, preset=spec.preset).params
    values = {f.name: getattr(params, f.name) for f in fields(params)}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}
