"""The text of job files: any text quickly gives a spec or one error, without guessed types, within limits."""

import contextlib
import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetect.cli.main import main
from raydetect.config import AuditSpec, ScoreSpec, parse_job
from raydetect.config.jobs import KINDS
from raydetect.config.validation import apply_overrides, parse_yaml
from raydetect.config.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, PARSER, read_text, read_yaml
from raydetect.errors import SpecError

SCORE = {"kind": "score", "source": {"uri": "a"}, "artifact": "b", "sink": {"uri": "c"}}
AUDIT = {**SCORE, "kind": "audit"}
SOURCE, STORAGE = {"uri": "a"}, {"endpoint_url": "http://h:1", "key": "k", "secret": "s"}
JOBS: list[dict[str, Any]] = [
    {**SCORE, "storage": STORAGE, "flag": {"alpha": 0.02}},
    {**AUDIT, "storage": STORAGE, "night": "x", "alarm_when": ["flagged_rate > 0.02"], "webhook": {"url": "https://h"}},
    {"kind": "fit", "source": SOURCE, "detector": {"name": "patchcore", "params": {"seed": 1}}, "artifact": "b"},
    {"kind": "calibrate", "source": SOURCE, "artifact": "b", "output": "c", "storage": STORAGE},
    {"kind": "serve", "detectors": {"a": {"artifact": "b"}}, "storage": STORAGE, "hosts": ["h"]},
    {"kind": "evaluate", "output": "c", "results": ["a"], "storage": STORAGE},
]
LEVELS = "abcdefghij"
BOMB = f"a: &a [{','.join('x' * 9)}]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in itertools.pairwise(LEVELS)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join(['*' + old] * 9)}]}}\n" for old, new in itertools.pairwise(LEVELS)
)


def plain_reading() -> float:
    """The seconds in which PyYAML alone reads as many values as a job may have, on this machine at this moment."""
    started = time.thread_time()
    for _ in yaml.parse("[" + "a, " * MAX_VALUES + "]", Loader=PARSER):
        pass
    return time.thread_time() - started


def refusal(text: str) -> str:
    """The error of a text, raised within a second of a machine that reads 100,000 values in 0.05 s."""
    started = time.thread_time()
    with pytest.raises(SpecError) as caught:
        parse_job(parse_yaml(text, "job.yaml"), "job.yaml")
    taken = time.thread_time() - started
    assert taken < 1.0 or taken < 20 * plain_reading()
    assert str(caught.value).startswith("job.yaml: ") and len(str(caught.value)) < 4000
    return str(caught.value)


def job(**lines: str) -> str:
    """A scoring job with extra lines of YAML."""
    return yaml.safe_dump(SCORE) + "".join(f"{name}: {text}\n" for name, text in lines.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, f"has more than {MAX_VALUES:,} values"),
        (MERGES, f"has more than {MAX_VALUES:,} values"),
        ("a: &a [*a]", "has no anchor"),
        ("a: &a {b: *a}", "has no anchor"),
        ("a: *b", "has no anchor"),
        ("? [a, b]\n: 1", "a key is not a plain name"),
        ("? {a: b}\n: 1", "a key is not a plain name"),
        ("? !!int 1\n: 1", "a key is not a plain name"),
        (job(**{"2026-11-28": "1"}), "2026-11-28: unknown key"),
        (job(no="1"), "no: unknown key"),
        (job(null="1"), "null: unknown key"),
        (job(artifact="d"), "the key 'artifact' occurs twice"),
        ("<<: {a: 1}\n<<: {b: 1}", "the key '<<' occurs twice"),
        ("<<: 3", "`<<` merges mappings only"),
        ("[" * 20_000, f"more than {MAX_DEPTH} levels"),
        ("{a: " * 20_000, f"more than {MAX_DEPTH} levels"),
        ("- " * 20_000, f"more than {MAX_DEPTH} levels"),
        ("a: &a " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*a" + "]" * 20, f"more than {MAX_DEPTH} levels"),
        (job(chunk_images="9" * 5000), "chunk_images"),
        (job(chunk_images="9" * 40), "chunk_images: does not fit into 64 bits"),
        (job(chunk_images=str(1 << 63)), "chunk_images: does not fit into 64 bits"),
        (job(flag="{threshold: .nan}"), "flag.threshold: should be a finite number"),
        (job(flag="{threshold: -.inf}"), "flag.threshold: should be a finite number"),
        (job(flag="{threshold: 1.0e+999}"), "flag.threshold: should be a finite number"),
        (job(max_bad_fraction=".nan"), "max_bad_fraction"),
        (job(resources="{gpus_per_worker: .inf}"), "resources.gpus_per_worker"),
        ("kind: score\0", "line 1: contains the character U+0000"),
        ('kind: "score\\0"', "line 1: a text contains U+0000"),
        ("kind: score\n\tartifact: a", "line 2"),
        ("kind: !!python/name:os.system", "line 1: a tag"),
        ("kind: !!bool maybe", "line 1: a tag"),
        ("kind: !!int ''", "line 1: a tag"),
        ("kind: !!timestamp x", "line 1: a tag"),
        ("kind: !!set {a, b}", "line 1: a tag"),
        ("kind: score\n---\nkind: fit\n", "line 2: a second document starts"),
        ("# nothing\n", "found nothing"),
        ("---\n...\n", "found nothing"),
        ("[kind, score]", "found list"),
        ("kind", "found str"),
        ("2026-11-28", "found str"),
        ("kind: [score]", "kind is missing"),
        ("kind: {score: 1}", "kind is missing"),
        (job(artifact2="x" * 50_000), "artifact2: unknown key"),
        (job(**{"k" * 1000: "1"}), "(1,000 characters): unknown key"),
        (job(**{"k" * 50_000: "1"}), "not valid YAML (line 7"),
        (job(night="x"), "night: unknown key"),
        (yaml.safe_dump({**AUDIT, "night": 1.10}), "night: should be text, given 1.1. Put text in quotes"),
        (yaml.safe_dump({**SCORE, "artifact": True}), "artifact: should be text, given True. Put text"),
        ("kind: score\nsource: {uri: a, pattern: {category}/{name}.png}", "line 2"),
        ("x: [" + "a, " * 150_000 + "]", f"has more than {MAX_VALUES:,} values"),
        ("a" * (MAX_BYTES + 1), "characters, which is the limit"),
        ("".join(f"k{i}: 1\n" for i in range(5000)) + yaml.safe_dump(SCORE), "more mistakes. Fix these first"),
    ],
    ids=lambda text: text[:40].replace("\0", "NUL"),
)
def test_a_job_file_with_a_mistake_is_refused_within_a_second(text: str, message: str) -> None:
    assert message in refusal(text)


def test_text_is_read_literally() -> None:
    words = ["no", "on", "Y", "010", "0x1F", "12:30", "2026-11-28", "2026-11-28 10:00", "1_000", "=", "0b1", "1e3"]
    text = "kind: audit\n" + yaml.safe_dump({name: AUDIT[name] for name in ("source", "artifact", "sink")})
    spec = parse_job(parse_yaml(f"{text}alarm_when: [{', '.join(words)}]\n", "job"), "job")
    assert isinstance(spec, AuditSpec) and spec.alarm_when == tuple(words)
    for night in ("2026-11-28", "20261128", "012", "1_000"):
        for values in (parse_yaml(f"{text}night: {night}\n", "job"), apply_overrides(AUDIT, [f"night={night}"])):
            found = parse_job(values, "job")
            assert isinstance(found, AuditSpec) and found.night == night


def test_numbers_are_decimal_and_booleans_may_be_yes() -> None:
    text = job(chunk_images="0064", batch_size="1_6", storage="{anon: yes}", flag="{alpha: 1e-2}")
    spec = parse_job(parse_yaml(text, "job"), "job")
    assert isinstance(spec, ScoreSpec)
    assert (spec.chunk_images, spec.batch_size, spec.storage.anon, spec.flag.alpha) == (64, 16, True, 0.01)


def test_aliases_and_merge_keys_are_expanded() -> None:
    """As the YAML specification of merge keys states: own keys win, then the first mapping that has the key."""
    text = """
base: &base {x: 1, y: 2}
other: &other {y: 9, z: 3}
mid: &mid {<<: *base, y: 3}
last: {z: 1, <<: [*mid, *other]}
text: {'<<': 3}
again: [*base, *base]
"""
    found = read_yaml(text)
    assert found["mid"] == {"x": 1, "y": 3} and found["last"] == {"x": 1, "y": 3, "z": 1}
    assert found["text"] == {"<<": 3} and found["again"] == [{"x": 1, "y": 2}] * 2
    del found["text"]
    assert found == yaml.safe_load(text.replace("text: {'<<': 3}\n", ""))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 62), 1 << 62) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(plain, st.booleans())
@settings(max_examples=200, deadline=None)
def test_what_pyyaml_writes_is_read_back(value: Any, in_lines: bool) -> None:
    """Jobs are sent to a cluster as PyYAML writes them."""
    text = yaml.safe_dump(value, default_flow_style=not in_lines)
    try:
        assert read_yaml(text) == value
    except SpecError as error:
        assert "\0" in text or "\\0" in text, error


def is_spec_or_refused(text: str) -> None:
    started = time.thread_time()
    try:
        spec = parse_job(parse_yaml(text, "job"), "job")
        assert isinstance(spec, tuple(KINDS.values()))
    except SpecError as error:
        assert str(error).startswith("job: ")
    assert time.thread_time() - started < 5.0


@given(st.text(max_size=60) | st.text("{}[]&*!|>%@`:,-?#'\"<\\ \n\tab0.1~", max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_job_or_refused(text: str) -> None:
    is_spec_or_refused(text)


odd: Any = st.sampled_from(
    [None, True, 0, -1, 1 << 70, float("nan"), float("inf"), "", "x" * 300, "a: b", [], [[]], {}, {"a": {}}, [{"b": 1}]]
)


@given(st.sampled_from(JOBS), st.lists(st.integers(0, 5), max_size=4), odd, st.sampled_from(["value", "key", "cut"]))
@settings(max_examples=400, deadline=None)
def test_a_job_with_any_value_anywhere_is_a_job_or_refused(job: Any, path: list[int], value: Any, how: str) -> None:
    """Replaces a value or key somewhere in a job, or truncates its text."""
    text = yaml.safe_dump(job)
    if how == "cut":
        return is_spec_or_refused(text[: 40 * (1 + sum(path))] + yaml.safe_dump(value))
    values = target = read_yaml(text)
    *steps, last = [0, *path]
    for step in steps:
        names = sorted(target) if isinstance(target, dict) else range(len(target))
        inner = target[names[step % len(names)]] if names else None
        if not isinstance(inner, dict | list) or not inner:
            break
        target = inner
    if isinstance(target, list):
        target[last % len(target)] = value
    elif how == "key":
        target[str(value)[:50]] = value
    else:
        target[sorted(target)[last % len(target)]] = value
    is_spec_or_refused(yaml.safe_dump(values))


@given(st.text("abc.=[]{}*&!:\0 01", max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_override_is_a_job_or_refused(text: str) -> None:
    with contextlib.suppress(SpecError):
        parse_job(dict(SCORE), "job", (text,))


def test_overrides_keep_the_rules_of_files() -> None:
    for text in (f"x={BOMB}", "x=&a [*a]", "x=!!int 1", f"{'a.' * 100}b=1", "kind=[1]", "flag.threshold=.nan"):
        with pytest.raises(SpecError):
            parse_job(dict(SCORE), "job", (text,))
    assert apply_overrides({}, ["a=b: c: d"]) == {"a": "b: c: d"}  # not YAML, so it is text


def test_a_file_that_is_not_regular_or_too_large_is_refused_at_once(tmp_path: Path) -> None:
    large, fifo = tmp_path / "large.yaml", tmp_path / "fifo.yaml"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    os.mkfifo(fifo)
    expected = {large: "has more than 1,048,576 bytes", fifo: "is not a regular file", tmp_path: "directory"}
    expected |= {tmp_path / "none.yaml": "cannot be read (No such file", Path("/dev/zero"): "is not a regular file"}
    started = time.thread_time()
    for path, message in expected.items():
        ended = CliRunner().invoke(main, ["check", str(path)])
        assert ended.exit_code == 2 and message in ended.output and ended.output.count("Error:") == 1, ended.output
    assert time.thread_time() - started < 5.0


def test_files_of_other_encodings_are_read_or_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "job.yaml", "kind: score # \u00e9\n"
    for data in (
        text.encode(),
        b"\xef\xbb\xbf" + text.encode(),
        text.encode("utf-16"),
        b"\xfe\xff" + text.encode("utf-16-be"),
    ):
        path.write_bytes(data)
        assert read_yaml(read_text(path, "job file")) == {"kind": "score"}
    for data in (text.encode("latin-1"), b"\xff\xfe\x00", b"\x80"):
        path.write_bytes(data)
        with pytest.raises(SpecError, match="UTF-8"):
            read_text(path, "job file")
