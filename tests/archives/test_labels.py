"""What a value of a label means, and that no value ends a job or is coerced."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydetect.archives.directory import with_cls, with_json
from raydetect.archives.labels import labels_text, read_label
from raydetect.archives.path_patterns import Naming
from raydetect.config import SourceSpec
from raydetect.records import Member

NORMAL = frozenset({"good", "normal", "ok"})
ALPHABETICAL = ("broken", "good")  # the order that Hugging Face's imagefolder gives
NAMING = Naming.of(SourceSpec(uri=""))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just("\ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0), (1, 1), (3, 1), (0.0, 0), (1.0, 1), (False, 0), (True, 1), ("0", 0), ("1", 1), ("1.0", 1), ("-1", None),
        ("good", 0), (" Good ", 0), ("OK", 0), ("bad", 1), ("broken", 1), ("true", 1), ("False", 0),
        (None, None), (math.nan, None), (-1, None), (-1.0, None), ("", None), ("unknown", None), ("NaN", None),
        (-7, None), (0.5, None), (math.inf, None), (10**30, None), ([0], None), ({"a": 1}, None), (b"good", None),
    ],
)  # fmt: skip
def test_a_value_has_a_meaning_by_rule_or_none(value: Any, label: int | None) -> None:
    assert read_label(value, NORMAL).label == label


@pytest.mark.parametrize("value", [-7, 0.5, math.inf, 10**30, [0], {"a": 1}, b"good"])
def test_what_means_nothing_is_told(value: Any) -> None:
    assert read_label(value, NORMAL).note.startswith("label_not_read: ")


def test_unlabelled_is_no_mistake() -> None:
    for value in (None, math.nan, -1, "unknown"):
        assert read_label(value, NORMAL).note == ""


def test_numbers_of_classes_are_judged_by_their_names() -> None:
    readings = [read_label(number, NORMAL, ALPHABETICAL) for number in (0, 1, 5, -1)]
    assert [reading.label for reading in readings] == [1, 0, None, None]
    assert readings[0].raw == "0 = broken" and readings[2].note


def test_classes_of_which_none_is_normal_say_nothing() -> None:
    readings = [read_label(number, NORMAL, ("intakt", "kaputt")) for number in (0, 1)]
    assert [reading.label for reading in readings] == [None, None]
    assert "source.normal_names" in readings[0].note
    assert read_label(0, frozenset({"intakt"}), ("intakt", "kaputt")).label == 0


def test_the_reading_is_told_with_counts() -> None:
    counts = [(1, "0 = broken", 63), (0, "1 = good", 209), (None, "", 2)]
    assert labels_text(counts) == "0 = good (209), 1 = broken (63), none (2)"


@given(ANYTHING, st.lists(st.text(max_size=5), max_size=3))
def test_no_value_raises(value: Any, classes: list[str]) -> None:
    found = read_label(value, NORMAL, classes)
    assert found.label in (0, 1, None)
    (found.raw + found.note).encode()


@given(st.binary(max_size=60) | ANYTHING.map(lambda value: json.dumps(value, default=str).encode()))
def test_no_sidecar_raises_anything_but_what_is_noted(data: bytes) -> None:
    for apply in (with_json, with_cls):
        try:
            member = apply(Member("k", "u"), data, NAMING)
        except (ValueError, RecursionError, OverflowError):
            continue
        json.loads(member.meta or "null", parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        for text in (member.meta, member.category or "", member.defect or "", *member.notes):
            text.encode()
