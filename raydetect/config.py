"""YAML job files to frozen, strict dataclasses, and back; every mistake is reported, not only the first."""

import dataclasses
import difflib
import functools
import hashlib
import json
import types
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from raydetect.errors import SpecError

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise SpecError(f"line {line}: the key {key!r} is written twice. Keep one of them.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """One YAML mapping from text.

    Args:
        text: the job file's text.
        name: how to call it in messages.

    Raises:
        SpecError: not YAML, not one mapping, or a key is written twice.
    """
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{name}: not valid YAML ({reason}). Mend the file.") from None
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        raise SpecError(f"{name}: a job file is one mapping, found {found}. Begin with `kind:`.")
    return value


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with `a.b=c` texts applied; the right side is read as YAML, else taken as text.

    So `pattern={category}/{name}.png` needs no quotes.

    Raises:
        SpecError: a text without `=`, or a path through something that is not a mapping.
    """
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for text in overrides:
        path, equals, right = text.partition("=")
        if not equals or not path:
            raise SpecError(f"--set {text}: expected key=value, such as --set seed=1.")
        place = result
        *parents, last = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise SpecError(f"--set {text}: {parent!r} is not a mapping. Set it as a whole.")
        place[last] = _yaml_or_text(right)
    return result


def _yaml_or_text(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def validate(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A `kind` dataclass from plain values, strict at every level.

    Raises:
        SpecError: lists every mistake, each with its path and, for a misspelt key, the nearest match.
    """
    try:
        found: T = _adapter(cast(Hashable, kind)).validate_python(dict(values))
    except ValidationError as error:
        lines = [f"{where}: {_mistake(kind, item)}" for item in error.errors(include_url=False)]
        raise SpecError("\n".join(dict.fromkeys(lines))) from None
    return found


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    """Built once for each kind: that takes longer than to use it."""
    return TypeAdapter(cast(type, kind))


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON-ready values, all defaults filled in."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `to_plain(value)`, hex."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two plain values, as `a.b: 1 -> 2` lines, sorted by path."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        nested = [differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k)) for k in keys]
        return [line for lines in nested for line in lines]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


@dataclasses.dataclass(frozen=True, slots=True)
class FieldDoc:
    """One documented field of a spec or of a detector's parameters."""

    name: str
    type: str
    default: str
    doc: str


def describe_fields(kind: type) -> list[FieldDoc]:
    """Name, type, default and doc line of every field, in order of declaration."""
    hints = get_type_hints(kind, include_extras=True)
    return [_describe(field, hints[field.name]) for field in dataclasses.fields(kind)]


def _describe(field: "dataclasses.Field[Any]", hint: Any) -> FieldDoc:
    doc, plain = "", hint
    if get_origin(hint) is Annotated:
        plain, *extras = get_args(hint)
        doc = next((e.description for e in extras if getattr(e, "description", None)), "")
    default: Any = field.default
    if default is dataclasses.MISSING:
        factory = field.default_factory
        default = factory() if callable(factory) else "required"
    elif default is PydanticUndefined:
        default = "required"
    shown = default if default == "required" else json.dumps(to_plain(default))
    return FieldDoc(field.name, type_name(plain), shown, doc)


def type_name(hint: Any) -> str:
    """A type hint as a person would write it in a document."""
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(type_name(part) for part in get_args(hint))
    if hint is type(None):
        return "none"
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'? Known: a, b.` for messages about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"{guess} Known: {', '.join(sorted(known))}."


def _mistake(kind: type, item: Any) -> str:
    location = [part for part in item["loc"] if not _is_branch(part)]
    path = ".".join(str(part) for part in location)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(kind, location[:-1])
        return f"{path}: unknown key.{nearest(str(location[-1]), known) if known else ''}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{path}: this key is required and missing. Add it."
    reason = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = item.get("input")
    shown = "" if isinstance(given, dict) or _is_secret(path) else f", given {given!r}"
    return f"{path or 'the job file'}: {reason}{shown}."


def _is_secret(path: str) -> bool:
    return path.rsplit(".", 1)[-1] in ("key", "secret", "token")


def _is_branch(part: Any) -> bool:
    """pydantic adds the tried branch of a union (`list[str]`, `str`) to the path; people do not write it."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part)


def _fields_at(kind: Any, path: Sequence[Any]) -> list[str]:
    for part in path:
        if not dataclasses.is_dataclass(kind):
            return []
        hint = get_type_hints(kind).get(str(part))
        options = [hint, *get_args(hint)]
        kind = next((option for option in options if dataclasses.is_dataclass(option)), None)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
