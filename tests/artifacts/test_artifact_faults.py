"""Artifacts that say what cannot be, with digests that match: refused in a sentence before an image is scored."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from raydetect.artifacts.fleet import member_uri
from raydetect.artifacts.record import read_record
from raydetect.artifacts.store import load_artifact
from raydetect.cli.main import main
from raydetect.detectors.patchcore import PatchCore
from raydetect.errors import ArtifactError, RaydetectError, SpecError, StorageError
from raydetect.local import jobs
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack
from tests.local.test_local import FIT, SCORE, fit, rows, spec_of

ARTIFACT = "memory://data/artifact"
RECORD = f"{ARTIFACT}/artifact.json"
VALUES: tuple[Any, ...] = (
    *(None, True, "text", "", "1.5", -1, 0, 10**12, 10**400, 1e300, math.nan, math.inf),
    *([], {}, [1], {"a": 1}, [[[]]]),
)
FIT_PARAMS = ("n_neighbors", "smoothing_sigma", "batch_size")  # another value of these is another detector


class Files(dict[str, bytes]):
    """Bytes by URI."""

    def __repr__(self) -> str:
        return "..."


@pytest.fixture(scope="module")
def stored() -> Files:
    """The files of an artifact and of six images, by URI."""
    pack("memory://data/normal", ".tar", normal_files(12), 1)
    pack("memory://data/mixed", ".tar", mixed_files(3, 1), 1)
    fit("calibration.holdout_ratio=0.6")
    storage = Storage()
    return Files({file.uri: storage.read(file.uri) for file in storage.list("memory://data")})


@pytest.fixture
def _placed(stored: Files) -> None:
    for uri, data in stored.items():
        Storage().write(uri, data)


def body_of(stored: Files) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stored["memory:///data/artifact/artifact.json"])
    return found


def place_of(storage: Files) -> str:
    return next(uri for uri in storage if uri.endswith(".safetensors"))


def rewrite(body: dict[str, Any], tensors: bytes | None = None) -> None:
    """Writes the record, and other tensors with a digest and size that match."""
    if tensors is not None:
        entry = {
            "file": "tensors-new.safetensors",
            "sha256": hashlib.sha256(tensors).hexdigest(),
            "bytes": len(tensors),
        }
        body = {**body, "tensors": entry}
        Storage().write(f"{ARTIFACT}/tensors-new.safetensors", tensors)
    Storage().write(RECORD, json.dumps(body).encode())


def planned() -> ScorePlan:
    Storage().delete_folder("memory://data/results")
    return plan_score(spec_of(SCORE, "flag={alpha: 0.2}"))


def scored() -> list[tuple[Any, ...]]:
    plan = planned()
    jobs.score(plan, lambda *_: None)
    return [tuple(row[name] for name in ("key", "image_score", "p_value", "flagged")) for row in rows(plan)]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists the first ones."""
    yield path
    for key in value if isinstance(value, dict) else range(min(3, len(value))) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(body: Any, number: int, how: str, value: Any) -> tuple[Any, tuple[Any, ...]]:
    """A copy with another value at one place, or without it, or with a value beside it; and the place."""
    found = list(places(body))[1:]
    path = found[number % len(found)]
    parent = body = deepcopy(body)
    for key in path[:-1]:
        parent = parent[key]
    if how == "remove":
        del parent[path[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent["new"] = value
    else:
        parent[path[-1]] = value
    return body, path


@pytest.mark.usefixtures("_placed")
@pytest.mark.parametrize("sigma", [10**12, 1001.0])
def test_a_smoothing_wider_than_any_picture_is_refused(stored: Files, sigma: float) -> None:
    body = body_of(stored)
    body["params"]["smoothing_sigma"] = sigma
    rewrite(body)
    with pytest.raises(ArtifactError, match=r"smoothing_sigma.*Fit again"):
        scored()


@pytest.mark.usefixtures("_placed")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 500), how=st.sampled_from(["replace", "remove", "add"]), value=st.sampled_from(VALUES))
def test_a_record_with_another_leaf_is_refused_or_gives_the_same_rows(
    stored: Files, number: int, how: str, value: Any
) -> None:
    expected = _expected(stored)
    body, path = changed(body_of(stored), number, how, value)
    rewrite(body)
    try:
        found = scored()
    except ArtifactError as error:
        assert error.exit_code == 2 and ARTIFACT.removeprefix("memory://") in str(error) and "\n" not in str(error)
        assert len(str(error)) < 700 and any(
            word in str(error) for word in ("Fit again", "Update", "copy the file again")
        )
        return
    if path[0] != "params" or path[-1] not in FIT_PARAMS:
        assert found == expected, path


_known: list[list[tuple[Any, ...]]] = []


def _expected(stored: Files) -> list[tuple[Any, ...]]:
    if not _known:
        Storage().write(RECORD, stored["memory:///data/artifact/artifact.json"])
        _known.append(scored())
    return _known[0]


@pytest.mark.usefixtures("_placed")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["scores"].reverse(), "calibration.scores: is not in ascending order"),
        (lambda c: c["scores"].__setitem__(-1, math.nan), "calibration.scores.6: should be a finite number"),
        (lambda c: c["scores"].__setitem__(0, "0.5"), "calibration.scores.0: should be a number"),
        (lambda c: c.update(scores=[]), "calibration.scores"),
        (lambda c: c["scores"].pop(), "images.held_out is 7, but calibration.scores has 6"),
        (lambda c: c.update(map_low=c["map_high"] + 1), "is below map_low"),
        (lambda c: c.update(map_high=1e300), "calibration.map_high: should be at most"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused_when_the_job_is_planned(
    stored: Files, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    body = body_of(stored)
    change(body["calibration"])
    rewrite(body)
    with pytest.raises(ArtifactError) as caught:
        planned()
    assert message in str(caught.value) and "artifact.json: is damaged or foreign (" in str(caught.value)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**SCORE, "flag": {"alpha": 0.2}}))
    for arguments in (["check"], ["score", "--local"], ["plan"]):
        ended = CliRunner().invoke(main, [*arguments, str(tmp_path / "job.yaml")])
        assert ended.exit_code == 2 and message in ended.output, ended.output
    assert not Storage().exists("memory://data/results/run.json")


def halved(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][..., ::2].contiguous()


@pytest.mark.usefixtures("_placed")
@pytest.mark.parametrize("name", ["bank", "num_embeddings", "backbone.conv1.weight", "backbone.bn1.running_var"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n), "tensor|is missing"),
        (lambda t, n: t.update({n: t[n].double()}), "float64 of .* but the detector needs|is F64 of"),
        (lambda t, n: t.update({n: t[n].half()}), "float16 of .* but the detector needs|is F16 of"),
        (lambda t, n: t.update({n: t[n][None]}), "shape|F32 of|do not fit|int64 of"),
        (lambda t, n: t.update({n: t[n].float() * math.nan}), "not finite|float32 of"),
        (lambda t, n: t.update({f"{n}.more": t[n].clone()}), "has no tensor"),
    ],
)
def test_tensors_of_another_kind_are_refused_before_an_image_is_scored(
    stored: Files, name: str, change: Callable[[dict[str, Tensor], str], object], message: str
) -> None:
    tensors = load(stored[place_of(stored)])
    name = next(known for known in tensors if known == name or known.endswith(name))
    change(tensors, name)
    rewrite(body_of(stored), save(tensors))
    with pytest.raises(ArtifactError, match=message) as caught:
        jobs.score(planned(), lambda *_: None)
    assert "tensors-new.safetensors: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("_placed")
def test_a_bank_of_other_dims_is_refused_when_the_job_is_planned_and_also_when_its_record_agrees(
    stored: Files,
) -> None:
    tensors, body = load(stored[place_of(stored)]), body_of(stored)
    halved(tensors, "bank")
    rewrite(body, save(tensors))
    dims = body["bank"]["dims"]
    with pytest.raises(
        ArtifactError, match=rf"is F32 of \(\d+, {dims // 2}\), but the record says F32 of .*, {dims}\)"
    ):
        planned()
    body["bank"]["dims"] = dims // 2
    rewrite(body, save(tensors))
    for pieces in (1, 2):
        Storage().delete_folder("memory://data/results")
        plan = plan_score(spec_of(SCORE, "flag={alpha: 0.2}", f"resources.bank_shards={pieces}"))
        with pytest.raises(ArtifactError, match=rf"do not fit .* \(patches have {dims} dims, the bank has {dims // 2}"):
            jobs.score(plan, lambda *_: None)


@pytest.mark.usefixtures("_placed")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_tensor_file_that_was_cut_or_changed_is_refused_also_when_its_digest_agrees(
    stored: Files, data: st.DataObject
) -> None:
    whole = stored[place_of(stored)]
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        changed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place = data.draw(st.integers(0, header - 1))
        changed = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    rewrite(body_of(stored), changed)
    try:
        artifact = load_artifact(ARTIFACT, Storage())
    except ArtifactError as error:
        assert "\n" not in str(error)
        return
    expected = load(whole)  # a blank or a name in quotes that means the same
    assert all(torch.equal(value, expected[name]) for name, value in artifact.detector.tensors().items())


@pytest.mark.usefixtures("_placed")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_lack_of_memory_is_no_fault_of_an_artifact(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(PatchCore, "load_tensors", failing)
    with pytest.raises(RaydetectError, match="does not fit into the memory") as caught:
        load_artifact(ARTIFACT, Storage())
    assert caught.value.exit_code == 1 and "Fit again" not in str(caught.value)


@pytest.mark.usefixtures("_placed")
def test_a_storage_that_fails_is_no_fault_of_an_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Storage, uri: str, *_: object) -> bytearray:
        raise StorageError(f"{uri}: the storage cannot be reached (down). Check storage.endpoint_url.")

    monkeypatch.setattr(Storage, "read_range", failing)
    with pytest.raises(StorageError, match="cannot be reached"):
        planned()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(categories=[]), "categories"),
        (lambda b: b["categories"]["widget"].update(digest="x"), "categories.widget.digest: "),
        (lambda b: b["categories"]["widget"].update(folder=5), "categories.widget.folder: "),
        (lambda b: b["categories"].update(more=None), "categories.more: "),
        (lambda b: b.update(format_version="2"), "format_version is '2'"),
    ],
)
def test_an_index_of_a_fleet_that_cannot_be_is_refused(change: Callable[[Any], object], message: str) -> None:
    pack("memory://data/normal", ".tar", normal_files(12), 1)
    pack("memory://data/mixed", ".tar", mixed_files(3, 1), 1)
    fit("per_category=true", "source.pattern={category}/train/{defect}/{name}.png", "calibration.holdout_ratio=0.6")
    body = json.loads(Storage().read(RECORD))
    assert read_record(member_uri(ARTIFACT, "widget"), Storage()).digest == body["categories"]["widget"]["digest"]
    change(body)
    rewrite(body)
    with pytest.raises(ArtifactError) as caught:
        planned()
    assert message in str(caught.value), caught.value


@pytest.mark.usefixtures("_placed")
def test_what_calibrate_would_copy_is_checked_too(stored: Files) -> None:
    tensors = load(stored[place_of(stored)])
    tensors["bank"][0, 0] = math.nan
    rewrite(body_of(stored), save(tensors))
    settings = {"kind": "calibrate", "source": {"uri": "memory://data/mixed"}, "artifact": ARTIFACT}
    spec = spec_of({**settings, "output": "memory://data/new"})
    with pytest.raises(ArtifactError, match="values of 'bank' are not finite"):
        jobs.calibrate(spec, lambda *_: None)
    with pytest.raises((ArtifactError, SpecError)):
        jobs.fit(spec_of(FIT, f"extend={ARTIFACT}", "artifact=memory://data/more"), lambda *_: None)
    assert not Storage().exists("memory://data/new")
