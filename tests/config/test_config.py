"""Job files: strict parsing, reports of every mistake, and secrets that are never written."""

import json

import pytest
import yaml

from raydetect.config import FitSpec, FlagSpec, ScoreSpec, ServeSpec, parse_job, public_spec, result_digest
from raydetect.config.validation import apply_overrides, describe_fields, differences, parse_yaml, to_plain, validate
from raydetect.errors import SpecError
from raydetect.gateway.single_images import online_spec
from raydetect.records import Part, Receipt

SCORE = """
kind: score
source: {uri: "s3://line4/day/*.tar", storage: {key: AKIA1, secret: very-secret, token: tok}}
artifact: s3://models/line4
sink: {uri: "s3://results/line4"}
storage: {endpoint_url: "http://127.0.0.1:9000", key: AKIA2, secret: other-secret}
flag: {alpha: 0.02}
"""


def score_spec(*overrides: str) -> ScoreSpec:
    spec = parse_job(parse_yaml(SCORE, "job"), "job", overrides)
    assert isinstance(spec, ScoreSpec)
    return spec


def test_a_rule_of_the_command_line_replaces_that_of_the_file() -> None:
    assert score_spec("flag.threshold=2.5").flag == FlagSpec(threshold=2.5)
    assert score_spec("flag.fdr=0.1").flag == FlagSpec(fdr=0.1)
    assert score_spec("flag.alpha=0.3").flag == FlagSpec(alpha=0.3)
    assert score_spec("flag={}").flag == FlagSpec()


def test_a_job_file_becomes_a_spec_with_defaults() -> None:
    spec = score_spec()
    assert spec.flag.alpha == 0.02 and spec.sink.heatmaps == "flagged" and spec.resources.num_workers == 1


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["sink.heatmap=all"], ["sink.heatmap: unknown key. Did you mean 'heatmaps'?"]),
        (["chunk_images=many"], ["chunk_images", "many"]),
        (["batch_size=0"], ["batch_size", "should be at least 1"]),
        (["flag.threshold=3", "flag.fdr=0.1"], ["set only one of alpha, threshold and fdr"]),
        (["sink.style=png"], ["sink.style", "'overlay'"]),
        (["resource.num_workers=3"], ["resource: unknown key. Did you mean 'resources'?"]),
        (["batch_size=0", "sink.uri=3", "nonsense=1"], ["batch_size", "sink.uri", "nonsense"]),
        (["kind=scores"], ["kind 'scores' is unknown", "'score'"]),
        (["seed"], ["expected key=value"]),
        (["artifact.x.y=1"], ["is not a mapping"]),
    ],
)
def test_all_mistakes_are_reported_with_the_nearest_key(overrides: list[str], messages: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        score_spec(*overrides)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("- a\n", "found list"),
        ("kind: fit\nkind: score\n", "line 2: the key 'kind' occurs twice"),
        ("sink: {uri: a, uri: b}", "occurs twice"),
        ("kind: [", "not valid YAML"),
        ("kind: !!python/object/apply:os.system [ls]", "a tag"),
    ],
)
def test_a_file_that_is_not_a_job_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_yaml(text, "job.yaml")


def test_a_missing_key_and_a_secret_of_a_wrong_type() -> None:
    with pytest.raises(SpecError, match=r"artifact: this required key is missing"):
        parse_job({"kind": "score", "source": {"uri": "a"}, "sink": {"uri": "b"}}, "job")
    with pytest.raises(SpecError) as caught:
        score_spec("storage.secret=[hush-hush]")
    assert "storage.secret" in str(caught.value) and "hush" not in str(caught.value)


def test_public_specs_contain_no_secrets() -> None:
    text = json.dumps(public_spec(score_spec()))
    for secret in ("very-secret", "other-secret", "AKIA1", "AKIA2", "tok"):
        assert f'"{secret}"' not in text
    assert "http://127.0.0.1:9000" in text


def test_only_settings_that_determine_rows_are_in_the_digest() -> None:
    plain = result_digest(score_spec())
    assert plain == result_digest(score_spec("resources.num_workers=7", "engine=serve"))
    assert plain == result_digest(score_spec("storage.endpoint_url=http://elsewhere", "max_bad_fraction=1"))
    changed = ["batch_size=8", "chunk_images=8", "flag.alpha=0.05", "sink.heatmaps=all", "source.max_pixels=9"]
    changed += ["resources.cpus_per_worker=3", "source.exif_orientation=ignore", "artifact=s3://models/line5"]
    assert len({plain, *(result_digest(score_spec(change)) for change in changed)}) == len(changed) + 1


def test_a_spec_survives_yaml_and_back() -> None:
    open_job = parse_yaml(SCORE.replace("key: AKIA", "region: AKIA").replace("secret: ", "profile: "), "job")
    del open_job["source"]["storage"]["token"]
    spec = parse_job(open_job, "job")
    assert parse_job(yaml.safe_load(yaml.safe_dump(to_plain(spec))), "job") == spec


def test_every_key_has_a_type_and_a_description() -> None:
    for kind in (FitSpec, ScoreSpec):
        for field in describe_fields(kind):
            assert field.type and field.default
    docs = {field.name: field.doc for field in describe_fields(ScoreSpec)}
    assert docs["chunk_images"] == "images that a worker scores at a time, at most"


def test_overrides_copy_and_differences_name_paths() -> None:
    values = {"a": {"b": 1}, "c": [1]}
    changed = apply_overrides(values, ["a.b=2", "a.d=[x, y]"])
    assert values == {"a": {"b": 1}, "c": [1]} and changed["a"] == {"b": 2, "d": ["x", "y"]}
    pattern = "{category}/test/{name}.png"
    assert apply_overrides({}, [f"source.pattern={pattern}"]) == {"source": {"pattern": pattern}}
    assert differences(values, changed) == ["a.b: 1 -> 2", 'a.d: null -> ["x", "y"]']


def test_records_survive_json() -> None:
    part = Part(shard=0, number=0, last=True, path="p", sha256="s", rows=2, statuses={"ok": 2})
    receipt = Receipt(shard=0, uri="u", fingerprint="f", rows=2, statuses={"ok": 2}, parts=(part,))
    assert validate(Receipt, json.loads(json.dumps(to_plain(receipt))), "r") == receipt


@pytest.mark.parametrize(("stated", "gpus", "online", "archive"), [(None, 0, 1, 16), (None, 1, 16, 16), (8, 0, 8, 8)])
def test_single_images_are_answered_one_by_one_on_cpus(
    stated: int | None, gpus: int, online: int, archive: int
) -> None:
    values = {"kind": "serve", "detectors": {"line4": {"artifact": "a"}}, "resources": {"gpus_per_worker": gpus}}
    spec = parse_job(values if stated is None else {**values, "batch_size": stated}, "serve")
    assert isinstance(spec, ServeSpec)
    assert (spec.online_batch_size, spec.archive_batch_size) == (online, archive)
    assert online_spec(spec, "a", FlagSpec()).batch_size == online
