"""The page about the Python interface, from signatures and docstrings."""

import inspect
import re
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from docstring_parser import Docstring, DocstringStyle, parse

import raydetect
from jobs.docs.markdown import escaped
from raydetect.python_api.estimator import Estimator
from raydetect.python_api.models import create_model
from raydetect.python_api.results import Result, Results

INTRODUCTION = """# Python

`from raydetect import create_model` runs detectors in this process, without Ray. Fits and scores equal those of
jobs to the bit, and `save` writes the artifact that a scoring job reads.
[Use raydetect in Python](../how-to/python.md) is an introduction.

"""
CALLED = {"__call__": "detector"}  # what a reader types
EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


def page() -> str:
    """The page as Markdown."""
    parts = [_function(name, getattr(raydetect, name)) for name in ("create_ensemble", "list_models")]
    errors = [_kind(name) for name in raydetect.__all__ if name.endswith("Error")]
    classes = [_class(kind) for kind in (Estimator, Results, Result)]
    return INTRODUCTION + "\n".join([_create_model(), *parts, *classes, "## Errors\n", *errors])


def _create_model() -> str:
    kind = type(create_model)
    return (
        f"## create_model\n\n{_signature('create_model', create_model.__call__)}{_text(kind.__doc__)}"
        f"{_text(kind.__call__.__doc__)}### create_model.load\n\n"
        f"{_signature('create_model.load', create_model.load)}{_text(create_model.load.__doc__)}"
    )


def _function(name: str, function: Callable[..., Any]) -> str:
    return f"## {name}\n\n{_signature(name, function)}{_text(function.__doc__)}"


def _class(kind: type) -> str:
    """A class with its public methods, those that it inherits last."""
    own = [base for base in kind.__mro__[:-1] if base.__module__.startswith("raydetect")]
    public = {
        name: value
        for base in own
        for name, value in ((name, _plain(value)) for name, value in vars(base).items())
        if (name[0] != "_" or name == "__call__") and callable(value)
    }
    sections = [
        f"### {CALLED.get(name, name)}\n\n{_signature(CALLED.get(name, name), function)}{_text(function.__doc__)}"
        for name, function in public.items()
    ]
    return f"## {kind.__name__}\n\n{_text(kind.__doc__)}" + "".join(sections)


def _kind(name: str) -> str:
    kind = getattr(raydetect, name)
    above = ", ".join(f"`{base.__name__}`" for base in kind.__mro__[1:-3] if base is not Exception)
    return f"### {name}\n\n{_text(kind.__doc__)}" + (f"A kind of {above}.\n" if above else "")


def _plain(value: Any) -> Any:
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value


def _signature(name: str, function: Callable[..., Any]) -> str:
    found = inspect.signature(function)
    kept = [_shown(value) for key, value in found.parameters.items() if key not in ("self", "cls")]
    shown = str(found.replace(parameters=kept, return_annotation=_bare(found.return_annotation)))
    return f"```text\n{name}{shown}\n```\n\n"


def _shown(parameter: inspect.Parameter) -> inspect.Parameter:
    default = _Shown("{}") if is_dataclass(parameter.default) else parameter.default
    return parameter.replace(annotation=_bare(parameter.annotation), default=default)


def _bare(annotation: Any) -> Any:
    """The annotation without modules and quotes."""
    if annotation is inspect.Signature.empty:
        return annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _Shown(re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", text))


class _Shown(str):
    """Text that shows itself without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _text(docstring: str | None) -> str:
    plain = inspect.cleandoc(docstring or "")
    parsed = parse(EXAMPLE.sub("", plain), DocstringStyle.GOOGLE)
    prose = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    examples = "".join(f"```python\n{example}\n```\n\n" for example in EXAMPLE.findall(plain))
    return f"{escaped(prose)}\n\n{_lists(parsed)}{examples}"


def _lists(parsed: Docstring) -> str:
    return (
        _list("Arguments", [(p.arg_name, p.description) for p in parsed.params if p.args[0] == "param"])
        + _list("Attributes", [(p.arg_name, p.description) for p in parsed.params if p.args[0] == "attribute"])
        + _list("Raises", [(error.type_name or "", error.description) for error in parsed.raises])
    )


def _list(title: str, rows: list[tuple[str, str | None]]) -> str:
    lines = [f"- `{name}`: {escaped(' '.join((text or '').split()))}" for name, text in rows]
    return "\n".join([f"**{title}**", "", *lines, "", ""]) if lines else ""
