"""The page about job files, from the dataclasses that validate them."""

import dataclasses
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from jobs.docs.markdown import code, escaped, sentence, table
from raydetect.config.jobs import KINDS
from raydetect.config.validation import FieldDoc, describe_fields

INTRODUCTION = """# Job files

A job file is one YAML mapping that begins with `kind`. An unknown or misspelt key is refused with the nearest match,
and `raydetect check` reports every mistake without a cluster. [Write job files](../how-to/job-files.md) explains the
rules.

In the tables, a key without a default is required. *none* means that the setting is not used.

"""
PLAIN = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", SecretStr: "text",
         type(None): "none", Any: "any value"}  # fmt: skip
BOUNDS = (("gt", "> "), ("ge", ">= "), ("lt", "< "), ("le", "<= "))


def page() -> str:
    """The page as Markdown."""
    shared: dict[type, str] = {}
    for kind in KINDS.values():
        _find(kind, shared)
    links = ", ".join(f"[`{kind}`](#kind-{kind})" for kind in KINDS)
    jobs = "\n".join(f"## kind: {name}\n\n{_body(kind, shared)}" for name, kind in KINDS.items())
    parts = "\n".join(f"### {title}\n\n{_body(kind, shared)}" for kind, title in shared.items())
    return f"{INTRODUCTION}Kinds: {links}.\n\n{jobs}\n## Mappings inside jobs\n\n{parts}"


def field_rows(kind: type, shared: Mapping[type, str]) -> list[tuple[str, str, str, str]]:
    """A row for every key of a dataclass: key, type, default, meaning.

    Args:
        kind: the dataclass.
        shared: dataclasses that have a section of their own, and its title.
    """
    hints = get_type_hints(kind, include_extras=True)
    return [_row(field, hints[field.name], shared) for field in describe_fields(kind)]


def _find(kind: Any, found: dict[type, str]) -> None:
    """Gives every dataclass below `kind` a title: the first key under which it appears."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        for part in _dataclasses_in(hints[field.name]):
            if part not in found:
                found[part] = _title(field.name, found)
                _find(part, found)


def _title(name: str, found: Mapping[type, str]) -> str:
    taken = set(found.values())
    return name if name not in taken else next(t for t in (f"{name} {i}" for i in range(2, 99)) if t not in taken)


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from _dataclasses_in(part)


def _body(kind: type, shared: Mapping[type, str]) -> str:
    text = inspect.cleandoc(kind.__doc__ or "")
    summary = re.sub(r"^`kind: \w+`: ", "", text.partition("\n\nAttributes:")[0])
    return f"{sentence(escaped(summary))}\n\n" + table(("Key", "Type", "Default", "Meaning"), field_rows(kind, shared))


def _row(field: FieldDoc, hint: Any, shared: Mapping[type, str]) -> tuple[str, str, str, str]:
    parts = list(_dataclasses_in(hint))
    doc = field.doc or next((_first_line(part) for part in parts), "")
    return code(field.name), type_text(hint, shared), _default(field, parts), sentence(escaped(doc))


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _default(field: FieldDoc, parts: list[type]) -> str:
    if field.default == "required":
        return ""
    value = json.loads(field.default)
    if parts and value is not None and value != []:
        return "see there"
    return "none" if value in (None, [], {}) else code(field.default)


def type_text(hint: Any, shared: Mapping[type, str]) -> str:
    """A type as someone who writes YAML would say it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_text(parts[0], shared) + _bounds(parts[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part, shared) for part in parts if part is not type(None))
    if origin is Literal:
        return ", ".join(code(str(part)) for part in parts)
    if origin is tuple:
        return _list_text(parts, shared)
    if isinstance(origin, type) and issubclass(origin, Mapping | dict):
        return f"mapping of names to {type_text(parts[1], shared)}"
    if hint in shared:
        return f"[{shared[hint]}](#{shared[hint].replace(' ', '-')})"
    return PLAIN[hint]


def _list_text(parts: tuple[Any, ...], shared: Mapping[type, str]) -> str:
    if parts[-1] is Ellipsis:
        return "list" if parts[0] is Any else f"list of {_plural(type_text(parts[0], shared))}"
    names = {type_text(part, shared) for part in parts}
    return f"list of {len(parts)} {_plural(names.pop())}" if len(names) == 1 else ", ".join(sorted(names))


def _plural(text: str) -> str:
    return re.sub(r"^(integer|number|list|mapping)\b", r"\1s", text)


def _bounds(extras: tuple[Any, ...]) -> str:
    found = {}
    for extra in extras:
        for constraint in extra.metadata if isinstance(extra, FieldInfo) else ():
            found.update({name: getattr(constraint, name) for name, _ in BOUNDS if hasattr(constraint, name)})
    said = [f"{sign}{found[name]:,}" for name, sign in BOUNDS if name in found]
    return f" {' and '.join(said)}" if said else ""
