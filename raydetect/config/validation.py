"""Converts YAML job files to frozen, strict dataclasses and back; reports every mistake, not only the first."""

import dataclasses
import difflib
import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, SecretStr, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from raydetect.config.mistakes import merged, reason_of
from raydetect.config.yaml_text import MAX_DEPTH, NotYamlError, read_yaml, shown_key
from raydetect.errors import SpecError
from raydetect.redaction import redacted

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
HIDDEN = frozenset(
    ("storage", "webhook", "key", "secret", "token", "sha256")
)  # values at or below these keys are never shown
MISTAKES_SHOWN, CHARACTERS_SHOWN = 20, 80
RULES = ("alpha", "threshold", "fdr", "nothing")
ALTERNATIVES = {f"flag.{rule}": tuple(other for other in RULES if other != rule) for rule in RULES}


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Reads one YAML mapping by the rules of `yaml_text`.

    Args:
        text: the job file's text.
        name: its name in messages.

    Raises:
        SpecError: it is not YAML, not one mapping, or breaks a rule.
    """
    try:
        value = read_yaml(text)
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        kind = "nothing" if value is None else type(value).__name__
        raise SpecError(f"{name}: a job file is one mapping, found {kind}. Start with `kind:`.")
    return value


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of `values` with `a.b=c` overrides; the right side is parsed as YAML, or else kept as text.

    So `pattern={category}/{name}.png` needs no quotes. A rule for flags replaces the rule of `values`.

    Raises:
        SpecError: an override has no `=`, its path goes through something that is not a mapping, or its right side
            breaks a rule of `yaml_text`.
    """
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    stated = set[str]()
    for number, text in enumerate(overrides, start=1):
        path, equals, right = text.partition("=")
        if not equals or not path:
            raise SpecError(f"--set number {number}: expected key=value, such as --set seed=1.")
        target = result
        *parents, last = path.split(".")
        if path in ALTERNATIVES and not isinstance(target.get("flag"), dict):
            target.pop("flag", None)  # `flag: none`
        if len(parents) >= MAX_DEPTH:
            raise SpecError(f"--set number {number}: has more than {MAX_DEPTH} levels. Shorten the key.")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise SpecError(f"--set {shown_key(path)}: {parent!r} is not a mapping. Set it as a whole.")
        target[last] = _yaml_or_text(path, right)
        stated.add(path)
        for other in ALTERNATIVES.get(path, ()):
            if f"{'.'.join(parents)}.{other}" not in stated:
                target.pop(other, None)
    return result


def _yaml_or_text(path: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except NotYamlError:
        return text
    except SpecError as error:
        raise SpecError(f"--set {shown_key(path)}: {error}") from None


def validate(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Converts plain values to a dataclass of type `kind`, strictly at every level.

    Raises:
        SpecError: lists every mistake with its path and, for a misspelt key, the nearest match.
    """
    try:
        adapter = _adapter(cast(Any, kind))
        return cast(T, adapter.validate_python(dict(values)))
    except ValidationError as error:
        mistakes = dict.fromkeys(f"{where}: {text}" for text in _mistakes(kind, error.errors(include_url=False)))
        lines = list(mistakes)[:MISTAKES_SHOWN]
        if len(mistakes) > MISTAKES_SHOWN:
            lines.append(f"{where}: {len(mistakes) - MISTAKES_SHOWN:,} more mistakes. Fix these first.")
        raise SpecError("\n".join(lines)) from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_plain(value: Any) -> Any:
    """Converts dataclasses, tuples and mappings to JSON-ready values with all defaults; masks secrets."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, SecretStr) else value


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `to_plain(value)`, hex."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The differences between two plain values as `a.b: 1 -> 2` lines, sorted by path."""
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
    """Name, type, default and description of every field, in order of declaration."""
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
    """A type hint as readable text."""
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(type_name(part) for part in get_args(hint))
    if hint is type(None):
        return "none"
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'? Known: a, b.`, for messages about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"{guess} Known: {', '.join(sorted(known))}."


def _mistakes(kind: type, items: Sequence[Any]) -> Iterator[str]:
    """One sentence for each mistake; the branches of a union that fit none make one."""
    places: dict[tuple[str, ...], list[Any]] = {}
    for item in items:
        places.setdefault(tuple(str(part) for part in item["loc"] if not _is_branch(part)), []).append(item)
    for found in places.values():
        yield _mistake(kind, found)


def _mistake(kind: type, found: Sequence[Any]) -> str:
    item = found[0]
    location = [part for part in item["loc"] if not _is_branch(part)]
    path = ".".join(shown_key(str(part)) for part in location)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown_key(kind, [part for part in item["loc"][:-1] if not _is_branch(part)], item["loc"][-1])
    if item["type"] in ("missing", "missing_argument"):
        return f"{path}: this required key is missing. Add it."
    reason = merged(map(reason_of, found))
    shown = "" if _is_hidden(location) else _given_text(item["input"])
    quotes = " Put text in quotes." if item["type"] == "string_type" and item["input"] is not None else ""
    return f"{path or 'the job file'}: {reason}{shown}.{quotes}"


def _unknown_key(kind: type, parents: Sequence[Any], key: Any) -> str:
    known, name = _fields_at(kind, parents), shown_key(str(key))
    path = [shown_key(str(part)) for part in parents]
    if _is_hidden(parents) and not difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"{'.'.join(path)}: contains an unknown key. Known: {', '.join(sorted(known))}."
    return f"{'.'.join((*path, name))}: unknown key.{nearest(name, known) if known else ''}"


def _given_text(value: Any) -> str:
    """The given value for a message; never a list or mapping, which may contain secrets."""
    if not isinstance(value, str | int | float | None):
        return ""
    text = redacted(repr(value))  # before truncation, which could split a URI
    return f", given {text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + '...'}"


def _is_hidden(location: Sequence[Any]) -> bool:
    return not HIDDEN.isdisjoint(str(part) for part in location)


def _is_branch(part: Any) -> bool:
    """Whether pydantic added this part to the path for a branch of a union (`list[str]`, `str`)."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part)


def _fields_at(kind: Any, path: Sequence[Any]) -> list[str]:
    for part in path:
        if not dataclasses.is_dataclass(kind):
            return []
        hint = get_type_hints(kind).get(str(part))
        options = [hint, *get_args(hint)]
        kind = next((option for option in options if dataclasses.is_dataclass(option)), None)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
