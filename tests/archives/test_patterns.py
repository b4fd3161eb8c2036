"""Patterns of members: the meaning of the regular expressions that they replace, in linear time."""

import re
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetect.archives.path_patterns import FIELD, FIELDS, Naming, Pattern
from raydetect.config import SourceSpec
from raydetect.errors import SpecError
from raydetect.storage import Storage
from raydetect.storage.globs import linear_glob

ALL = "{category}{split}{defect}{label}{name}"


def regex_fields(template: str, name: str) -> tuple[int, dict[str, str]] | None:
    """The same by a regular expression."""
    parts = FIELD.split(template)
    text = "".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>[^/]+)" for i, part in enumerate(parts))
    found = re.search(rf"(?:^|/)(?P<whole>{text})$", name)
    if found is None:
        return None
    return found.start("whole"), {key: value for key, value in found.groupdict().items() if key != "whole"}


few_letters = st.text("ab/.\n", max_size=4)
templates = st.tuples(st.permutations(FIELDS), st.lists(few_letters, min_size=1, max_size=6)).map(
    lambda drawn: "".join(
        text + (f"{{{field}}}" if place < len(drawn[1]) - 1 else "")
        for place, (field, text) in enumerate(zip([*drawn[0], ""], drawn[1], strict=False))
    )
)


@given(templates, st.lists(few_letters, max_size=6).map("".join))
@settings(max_examples=1500, deadline=None)
def test_a_pattern_means_what_its_regular_expression_does(template: str, name: str) -> None:
    found = Pattern.of(template, "source.pattern").match(name)
    assert (None if found is None else (found.start, dict(found.fields))) == regex_fields(template, name)


@given(templates, st.lists(st.text("ab.", min_size=1, max_size=3), min_size=5, max_size=5), few_letters)
@settings(max_examples=500, deadline=None)
def test_names_made_of_a_pattern_match_it_as_the_regular_expression_does(
    template: str, values: list[str], before: str
) -> None:
    filled = FIELD.sub(lambda found: values[FIELDS.index(found.group(1))], template)
    for name in (filled, f"{before}/{filled}", f"{filled}\n"):
        found = Pattern.of(template, "source.pattern").match(name)
        assert found is not None and (found.start, dict(found.fields)) == regex_fields(template, name)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (f"{ALL}!", "a" * 30_000),
        ("{category}a{split}a{defect}a{label}a{name}!", "a" * 30_000),
        ("{category}a{split}b{defect}a{label}b{name}!", "ab" * 15_000),
        ("{category}/{split}/{defect}/{label}/{name}!", "a/" * 15_000),
        ("{category}" + "a" * 400 + "b{name}!", "a" * 30_000 + "!"),
        ("b" + "a" * 400 + "{name}!", "a" * 30_000 + "!"),
    ],
)
def test_no_name_takes_long(pattern: str, name: str) -> None:
    """A regular expression takes 10 s for 180 letters and the first pattern, and 32 times as long for twice as many."""
    naming = Naming.of(SourceSpec(uri="a", pattern=pattern, mask_pattern=pattern))
    started = time.thread_time()
    for _ in range(10):
        assert naming.read(name) is None
    assert time.thread_time() - started < 2.0


def test_a_pattern_without_end_is_refused() -> None:
    with pytest.raises(SpecError, match=r"source.pattern: has 1,006 characters; at most 1,000 are allowed"):
        Naming.of(SourceSpec(uri="a", pattern="{name}" + "a" * 1000))


LETTERS = st.sampled_from(["*", "a", "b", "?", "[ab]", "-"])
GLOBS = st.lists(LETTERS, min_size=1, max_size=9).map("".join).filter(lambda name: "**" not in name)
NAMES = st.lists(st.sampled_from("ab-"), min_size=1, max_size=8).map("".join)


@given(st.lists(GLOBS, min_size=1, max_size=3), st.lists(st.lists(NAMES, min_size=1, max_size=3), max_size=12))
@settings(max_examples=150, deadline=None)
def test_a_glob_names_what_fsspec_says(segments: list[str], paths: list[list[str]]) -> None:
    fs = fsspec.filesystem("memory", skip_instance_cache=True)
    fs.store, fs.pseudo_dirs = {}, [""]
    for path in paths:
        for depth in range(1, len(path)):
            fs.pseudo_dirs.append("/" + "/".join(path[:depth]))
        fs.store["/" + "/".join(path)] = MemoryFile(fs, "/" + "/".join(path))
    pattern = "/" + "/".join(segments)
    wide, is_meant = linear_glob(pattern)
    assert [name for name in fs.glob(wide) if is_meant(name)] == fs.glob(pattern)


def test_no_glob_takes_long_and_too_many_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / ("a" * 250)).write_bytes(b"")
    (tmp_path / "cam1_2026_11_28.tar").write_bytes(b"")
    started = time.thread_time()
    assert not list(Storage().glob(f"file://{tmp_path}/{'*a' * 20}b"))
    assert [file.uri for file in Storage().glob(f"file://{tmp_path}/*_*_*_*.tar")] == [
        f"file://{tmp_path}/cam1_2026_11_28.tar"
    ]
    assert time.thread_time() - started < 1.0
    for pattern in ("**/a/**/b/**/c", "**/*a*b*c", "a**b"):
        with pytest.raises(SpecError, match=r"Use fewer of them|stands for whole folders"):
            list(Storage().glob(f"file://{tmp_path}/{pattern}"))
