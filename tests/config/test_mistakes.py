"""No word of pydantic reaches a person: every field of every job gets values of every wrong kind."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

from raydetect.config import parse_job
from raydetect.config.jobs import KINDS
from raydetect.config.mistakes import OTHERS, VALUE_ERROR, WORDS
from raydetect.config.validation import validate
from raydetect.detectors._registry import detector_class, list_models
from raydetect.errors import SpecError

WRONG: tuple[Any, ...] = (
    None, True, 3, -3, 0, 0.5, -0.5, 1.5, 1e40, float("nan"), float("inf"), "", "x" * 300, "none", "2.5", "\ud800", [],
    [None], [1, "a"], ["a", "b"], {}, {"a": 1}, {1: 2}, {"": None}, [[]], [{}], {"uri": 3}, {"x": {"y": []}},
)  # fmt: skip
FOREIGN = re.compile(
    r"Input|valid (string|integer|number|list|tuple|dict|bool)|instance of|dictionary|pydantic|[a-z]Spec\b"
)
EXEMPT = {"missing", "missing_argument", "unexpected_keyword_argument", "extra_forbidden", VALUE_ERROR}


def specs_in(hint: Any) -> Iterator[type]:
    """All dataclasses that a type hint names."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for part in get_args(hint):
        yield from specs_in(part)


def paths(kind: type, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields of a spec and of the specs in it."""
    for name, hint in get_type_hints(kind).items():
        if name.startswith("__"):
            continue
        yield (*before, name)
        if len(before) < 4:
            for inner in specs_in(hint):
                yield from paths(inner, (*before, name))


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def kinds_of(kind: type, values: dict[str, Any]) -> set[str]:
    try:
        TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        return {item["type"] for item in error.errors(include_url=False, include_input=False)}
    return set()


@pytest.mark.parametrize("name", KINDS)
def test_every_wrong_value_is_refused_in_our_words(name: str) -> None:
    seen, kind = set[str](), KINDS[name]
    for path in paths(kind):
        for wrong in WRONG:
            values = {"kind": name, **with_value(path, wrong)} if path != ("kind",) else {"kind": wrong}
            seen |= kinds_of(kind, values)
            try:
                validate(kind, values, "job")
            except SpecError as error:
                for line in str(error).splitlines():
                    assert line.startswith("job: ") and not FOREIGN.search(line), line
                    assert OTHERS not in line, (path, wrong, line)
    assert seen <= WORDS.keys() | EXEMPT, seen - WORDS.keys()
    assert len(seen & WORDS.keys()) >= 8


@pytest.mark.parametrize("name", list_models())
def test_so_is_every_parameter_of_a_detector(name: str) -> None:
    kind = detector_class(name).Params
    for field in dataclasses.fields(kind):
        for wrong in WRONG:
            try:
                validate(kind, {field.name: wrong}, "params")
            except SpecError as error:
                assert not FOREIGN.search(str(error)) and OTHERS not in str(error), str(error)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"source": 3}, "source: should be a mapping of settings, given 3."),
        ({"source": {"uri": 3}}, "source.uri: should be text or a list, given 3. Put text in quotes."),
        ({"batch_size": "x"}, "batch_size: should be a whole number, given 'x'."),
        ({"batch_size": 1.5}, "batch_size: should be a whole number, given 1.5."),
        ({"batch_size": 0}, "batch_size: should be at least 1, given 0."),
        ({"max_bad_fraction": []}, "max_bad_fraction: should be a number."),
        ({"sink": {"uri": "x", "close_ups": "maybe"}}, "sink.close_ups: should be true or false, given 'maybe'."),
        ({"sink": {"uri": "x", "style": "neon"}}, "sink.style: should be 'overlay' or 'map', given 'neon'."),
        ({"flag": "off"}, "flag: should be a mapping of settings, given 'off'."),
        ({"flag": {"alpha": 1.5}}, "flag.alpha: should be less than 1, given 1.5."),
    ],
)
def test_the_words(values: dict[str, Any], text: str) -> None:
    whole = {"kind": "score", "source": {"uri": "a"}, "artifact": "b", "sink": {"uri": "c"}, **values}
    with pytest.raises(SpecError) as error:
        parse_job(whole, "job")
    assert str(error.value) == f"job: {text}"
