"""Describes a model as Python: the call that creates it, and its parameters with all defaults."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from raydetect.config import ENSEMBLE, DetectorSpec, MemberSpec
from raydetect.config.fit import STANDARD
from raydetect.config.validation import to_plain, validate
from raydetect.detectors._registry import build_detector, build_from, detector_class, unused_params
from raydetect.errors import SpecError

CLASS_NAME = "class_name"  # parameter of detectors that use text prompts


def plain_spec(spec: DetectorSpec, seed: int) -> DetectorSpec:
    """The spec with its parameters as plain values, as in a job file.

    Raises:
        SpecError: an unknown name, unknown or invalid parameters, or members that differ in image_size.
    """
    build_from(spec, seed)
    if spec.ensemble:
        return replace(spec, ensemble=tuple(replace(member, params=_plain_params(member)) for member in spec.ensemble))
    return replace(spec, params=_plain_params(spec.members[0]))


def spec_of_record(body: Mapping[str, Any]) -> DetectorSpec:
    """The spec stored in an artifact's record; every parameter that has an effect is explicit."""
    params = body["params"]
    if body["detector"] != ENSEMBLE:
        return DetectorSpec(name=body["detector"], params=_used_params(body["detector"], params))
    members = tuple(MemberSpec(name=m["name"], params=_used_params(m["name"], m["params"])) for m in params["members"])
    return DetectorSpec(ensemble=members, weights=tuple(params["weights"]))


def changed_spec(spec: DetectorSpec, changed: Mapping[str, Any]) -> DetectorSpec:
    """The spec of one detector with `preset` or parameters changed.

    Earlier parameters that have no effect with the changed ones are left out.

    Raises:
        SpecError: an unknown or invalid parameter.
    """
    values = dict(changed)
    preset = values.pop("preset", spec.preset)
    stated = {**spec.params, **values}
    built = validate(DetectorSpec, {"name": spec.name, "preset": preset, "params": stated}, "set_params")
    unused = unused_params(build_detector(built.name, built.params, preset=built.preset).params)
    return replace(built, params={n: v for n, v in stated.items() if n in values or n not in unused})


def with_class_name(spec: DetectorSpec, name: str, seed: int) -> DetectorSpec:
    """The spec with the class name set.

    Raises:
        SpecError: no detector in the spec uses text prompts.
    """
    named = tuple(
        replace(member, params={**member.params, CLASS_NAME: name}) if _uses_text(member) else member
        for member in spec.members
    )
    if named == spec.members and not any(map(_uses_text, named)):
        raise SpecError(f"{spec.title}: does not use text prompts, so it takes no class name. Remove it.")
    return plain_spec(replace(spec, ensemble=named) if spec.ensemble else replace(spec, params=named[0].params), seed)


def full_params(member: MemberSpec, seed: int) -> dict[str, Any]:
    """All arguments of `create_model` that have an effect together, with defaults filled in."""
    params = build_detector(member.name, member.params, seed, member.preset).params
    unused = unused_params(params)
    named = {f.name: getattr(params, f.name) for f in fields(params) if f.name not in unused}
    return {"name": member.name, "preset": member.preset, "seed": seed, **named}


def call_text(spec: DetectorSpec, seed: int) -> str:
    """The call that creates a model, with only the arguments that differ from the preset."""
    last = [f"seed={seed}"] if seed else []
    if not spec.ensemble:
        return _member_text(spec.members[0], last)
    weights = [] if spec.weights is None else [f"weights={list(spec.weights)}"]
    members = ", ".join(_member_text(member, []) for member in spec.ensemble)
    return f"create_ensemble({', '.join([f'[{members}]', *weights, *last])})"


def _member_text(member: MemberSpec, seed: list[str]) -> str:
    preset = [] if member.preset == STANDARD else [f"preset={member.preset!r}"]
    changed = [f"{name}={value!r}" for name, value in _changed_params(member).items()]
    return f"create_model({', '.join([repr(member.name), *preset, *seed, *changed])})"


def _changed_params(member: MemberSpec) -> dict[str, Any]:
    """Parameters that differ from the preset, in declaration order."""
    found = full_params(member, 0)
    plain = build_detector(member.name, {}, preset=member.preset).params
    same = {"name": member.name, "preset": member.preset, "seed": 0}
    return {name: value for name, value in found.items() if value != same.get(name, getattr(plain, name, None))}


def _plain_params(member: MemberSpec) -> dict[str, Any]:
    params = build_detector(member.name, member.params, preset=member.preset).params
    return {name: to_plain(getattr(params, name)) for name in member.params}


def _used_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    unused = unused_params(build_detector(name, params).params)
    return {name: value for name, value in params.items() if name not in unused}


def _uses_text(member: MemberSpec) -> bool:
    return CLASS_NAME in {f.name for f in fields(detector_class(member.name).Params)}
