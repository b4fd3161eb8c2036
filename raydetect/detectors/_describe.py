"""The words of a model in Python: the call that makes it, and its parameters with all defaults."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from raydetect.config import to_plain
from raydetect.detectors._registry import build_detector, build_from, detector_class
from raydetect.errors import SpecError
from raydetect.spec import ENSEMBLE, DetectorSpec, MemberSpec

CLASS_NAME = "class_name"  # the parameter of detectors that score by text


def plain_spec(spec: DetectorSpec, seed: int) -> DetectorSpec:
    """The same with parameters as a job file would have them.

    Raises:
        SpecError: an unknown name, unknown or bad parameters, or members that differ in image_size.
    """
    build_from(spec, seed)
    if spec.ensemble:
        return replace(spec, ensemble=tuple(replace(member, params=_plain_params(member)) for member in spec.ensemble))
    return replace(spec, params=_plain_params(spec.members[0]))


def spec_of_record(body: Mapping[str, Any]) -> DetectorSpec:
    """The spec of an artifact's record; every parameter is stated."""
    params = body["params"]
    if body["detector"] != ENSEMBLE:
        return DetectorSpec(name=body["detector"], params=dict(params))
    members = tuple(MemberSpec(name=words["name"], params=words["params"]) for words in params["members"])
    return DetectorSpec(ensemble=members, weights=tuple(params["weights"]))


def with_class_name(spec: DetectorSpec, name: str, seed: int) -> DetectorSpec:
    """The same, told what the images show.

    Raises:
        SpecError: no detector in it scores by text.
    """
    named = tuple(
        replace(member, params={**member.params, CLASS_NAME: name}) if _knows_text(member) else member
        for member in spec.members
    )
    if named == spec.members and not any(map(_knows_text, named)):
        raise SpecError(f"{spec.title}: scores without text, so it takes no class name. Leave it out.")
    return plain_spec(replace(spec, ensemble=named) if spec.ensemble else replace(spec, params=named[0].params), seed)


def full_params(member: MemberSpec, seed: int) -> dict[str, Any]:
    """Everything that `create_model` takes, with all defaults filled in."""
    params = build_detector(member.name, member.params, seed, member.preset).params
    named = {f.name: getattr(params, f.name) for f in fields(params)}
    return {"name": member.name, "preset": member.preset, "seed": seed, **named}


def call_text(spec: DetectorSpec, seed: int) -> str:
    """The call that makes a model, with what differs from the preset alone."""
    last = [f"seed={seed}"] if seed else []
    if not spec.ensemble:
        return _member_text(spec.members[0], last)
    weights = [] if spec.weights is None else [f"weights={list(spec.weights)}"]
    members = ", ".join(_member_text(member, []) for member in spec.ensemble)
    return f"create_ensemble({', '.join([f'[{members}]', *weights, *last])})"


def _member_text(member: MemberSpec, seed: list[str]) -> str:
    preset = [] if member.preset == "paper" else [f"preset={member.preset!r}"]
    changed = [f"{name}={value!r}" for name, value in _changed_params(member).items()]
    return f"create_model({', '.join([repr(member.name), *preset, *seed, *changed])})"


def _changed_params(member: MemberSpec) -> dict[str, Any]:
    """The parameters that differ from the preset, in order of declaration."""
    found = full_params(member, 0)
    plain = full_params(replace(member, params={}), 0)
    return {name: value for name, value in found.items() if value != plain[name]}


def _plain_params(member: MemberSpec) -> dict[str, Any]:
    params = build_detector(member.name, member.params, preset=member.preset).params
    return {name: to_plain(getattr(params, name)) for name in member.params}


def _knows_text(member: MemberSpec) -> bool:
    return CLASS_NAME in {f.name for f in fields(detector_class(member.name).Params)}
