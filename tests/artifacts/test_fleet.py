"""Fleets: one detector for each category; the same rows as each category alone; every refusal."""

import gc
import json
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from raydetect.artifacts.fleet import (
    FOLDER,
    ArtifactIndex,
    ArtifactRef,
    category_folder,
    member_uri,
    read_index,
    read_records,
    write_fleet,
)
from raydetect.artifacts.record import FORMAT_VERSION, FORMATS
from raydetect.artifacts.store import Artifact, StoredDetectors, load_artifact
from raydetect.cli.main import main
from raydetect.config import ScoreSpec, parse_job, result_digest
from raydetect.config.validation import apply_overrides
from raydetect.errors import ArchiveError, ArtifactError, RaydetectError, ResumeError, SpecError, TooManyBadRows
from raydetect.local import jobs
from raydetect.planning.forecast import scoring_rate
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.records import BAD_STATUSES
from raydetect.scoring.detector_cache import DetectorCache, LoadedDetector
from raydetect.scoring.device_queue import DeviceQueue
from raydetect.sinks.run_progress import labelled_auroc, progress
from raydetect.storage import Storage, join_uri
from tests.builders.archives import pack, tar_bytes
from tests.builders.fleet import BOLTS, CATEGORIES, NUTS, RINGS, fit_category, fit_fleet, picture, sample, write_mixed
from tests.whole_jobs.runs import rows_of

ROOT = "memory://data"
FLEET = f"{ROOT}/fleet"
SCORE: dict[str, Any] = {
    "kind": "score",
    "source": {"uri": f"{ROOT}/mixed"},
    "artifact": FLEET,
    "sink": {"uri": f"{ROOT}/results", "heatmaps": "all", "style": "map"},
    "flag": {"alpha": 0.2},
    "batch_size": 4,
    "resources": {"cpus_per_worker": 1},
}


@pytest.fixture(scope="module")
def fitted() -> dict[str, bytes]:
    """All files of the fleet and of its archive by path; fitted once."""
    fit_fleet(ROOT)
    write_mixed(ROOT)
    files = fsspec.filesystem("memory").store
    return {path: file.getvalue() for path, file in files.items()}


@pytest.fixture
def fleet(fitted: dict[str, bytes]) -> None:
    """Copies these files to `memory://`."""
    for path, data in fitted.items():
        Storage().write(f"memory://{path}", data)


@pytest.fixture
def folder(fitted: dict[str, bytes], tmp_path: Path) -> Path:
    """Copies these files to a disk, with a job file."""
    for path, data in fitted.items():
        if path.startswith(("/data/fleet/", "/data/mixed/")):
            Storage().write(f"file://{tmp_path}{path.removeprefix('/data')}", data)
    text = yaml.safe_dump(SCORE).replace(ROOT, str(tmp_path))
    (tmp_path / "score.yaml").write_text(text)
    return tmp_path


def plan(*overrides: str) -> ScorePlan:
    spec = parse_job(apply_overrides(SCORE, overrides), "job")
    assert isinstance(spec, ScoreSpec)
    return plan_score(spec)


def run(*overrides: str) -> tuple[ScorePlan, dict[str, Any]]:
    planned = plan(*overrides)
    return planned, jobs.score(planned, lambda *_: None)


def rows(planned: ScorePlan) -> list[dict[str, Any]]:
    return rows_of(planned.ledger.uri, planned.ledger.storage)


def call(folder: Path, command: str, *options: str) -> Result:
    result = CliRunner().invoke(main, [command, str(folder / "score.yaml"), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def comparable(planned: ScorePlan, category: str) -> list[dict[str, Any]]:
    """Rows of a category with heatmap bytes instead of URIs and without the names of containers."""
    found = []
    for row in rows(planned):
        if row["category"] == category:
            name = row["key"].rpartition("/")[2]
            heatmap = heatmap_bytes(planned, row["heatmap_uri"]) if row["heatmap_uri"] else b""
            found.append({**row, "key": name, "image_uri": name, "heatmap_uri": heatmap})
    return found


def heatmap_bytes(planned: ScorePlan, uri: str) -> bytes:
    member, _, container = uri.partition("::")
    with Storage().open(planned.ledger.uri + container) as handle:
        return bytes(fsspec.filesystem("zip", fo=handle).cat_file(member.removeprefix("zip://")))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Categories in the order in which their detectors were loaded."""
    found: list[str] = []
    plain = StoredDetectors.load

    def watched(self: StoredDetectors, ref: Any) -> Artifact:
        found.append(next(name for name in CATEGORIES if member_uri(self.index.uri, name) == ref.uri))
        return plain(self, ref)

    monkeypatch.setattr(StoredDetectors, "load", watched)
    return found


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize(("heatmaps", "style", "count"), [("all", "map", 30), ("top_k", "overlay", 12)])
def test_rows_and_heatmaps_equal_those_of_each_category_scored_alone(heatmaps: str, style: str, count: int) -> None:
    overrides = [f"sink.heatmaps={heatmaps}", f"sink.style={style}", "sink.top_k=2"]
    whole, manifest = run(*overrides)
    assert manifest["rows"] == 30 and manifest["statuses"] == {"ok": 30} and manifest["heatmaps"] == count
    found = rows(whole)
    assert [row["category"] for row in found[:3]] == list(CATEGORIES), "the archive must mix categories"
    clipped = 0
    for number, category in enumerate(CATEGORIES):
        where = [f"source.uri={ROOT}/only-{number}", f"artifact={member_uri(FLEET, category)}"]
        alone, alone_manifest = run(*overrides, *where, f"sink.uri={ROOT}/results-{number}")
        assert comparable(whole, category) == comparable(alone, category)
        assert manifest["heatmap_scale"]["categories"][category] == alone_manifest["heatmap_scale"]
        assert {row["artifact"] for row in rows(alone)} == {alone.artifact.digest}
        clipped += alone_manifest["clipped_pixels"]
    assert manifest["clipped_pixels"] == clipped
    assert len({row["artifact"] for row in found}) == len({row["threshold"] for row in found}) == 3


@pytest.mark.usefixtures("fleet")
def test_top_k_is_counted_for_each_category() -> None:
    planned, _ = run("sink.heatmaps=top_k", "sink.top_k=1")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows(planned):
        groups.setdefault((row["chunk"], row["category"]), []).append(row)
    best = {max(group, key=lambda row: row["image_score"])["key"] for group in groups.values()}
    assert len(best) == 6 and best == {row["key"] for row in rows(planned) if row["heatmap_uri"]}


@pytest.mark.usefixtures("fleet")
def test_one_detector_in_memory_gives_the_rows_of_eight(loads: list[str]) -> None:
    many, _ = run()
    assert sorted(loads) == sorted(CATEGORIES)
    loads.clear()
    one, _ = run("resources.detectors_in_memory=1", f"sink.uri={ROOT}/one")
    assert 3 <= len(loads) <= 6 and set(loads) == set(CATEGORIES), "three categories in each of two shards"
    assert [r | {"heatmap_uri": ""} for r in rows(one)] == [r | {"heatmap_uri": ""} for r in rows(many)]
    assert result_digest(one.spec) == result_digest(replace(one.spec, resources=many.spec.resources))


@pytest.mark.usefixtures("fleet")
def test_the_least_recently_used_detector_is_dropped(loads: list[str]) -> None:
    index = read_index(FLEET, Storage())
    cache = DetectorCache(StoredDetectors(index, Storage()), plan().spec.flag, DeviceQueue("cpu"), limit=2)
    for category in (NUTS, BOLTS, NUTS, RINGS, NUTS, BOLTS):
        ref = index.categories[category]
        assert cache.use(ref, lambda loaded: loaded.digest) == ref.digest
    assert loads == [NUTS, BOLTS, RINGS, BOLTS]


@pytest.mark.usefixtures("fleet")
def test_a_thread_waits_for_a_detector_while_all_in_memory_are_in_use(loads: list[str]) -> None:
    index = read_index(FLEET, Storage())
    cache = DetectorCache(StoredDetectors(index, Storage()), plan().spec.flag, DeviceQueue("cpu"), limit=1)
    nuts, bolts = index.categories[NUTS], index.categories[BOLTS]
    entered, leave = threading.Barrier(3), threading.Event()

    def hold(loaded: LoadedDetector) -> None:
        entered.wait(20)
        assert leave.wait(20)

    with ThreadPoolExecutor(3) as pool:
        holders = [pool.submit(cache.use, nuts, hold) for _ in range(2)]  # two may use the same one
        entered.wait(20)
        other = pool.submit(cache.use, bolts, lambda loaded: loaded.digest)
        with pytest.raises(TimeoutError):
            other.result(0.2)
        assert loads == [NUTS]
        leave.set()
        assert other.result(20) == bolts.digest and [holder.result(20) for holder in holders] == [None, None]


@pytest.mark.usefixtures("fleet")
def test_no_more_detectors_are_in_memory_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: weakref.WeakSet[torch.nn.Parameter] = weakref.WeakSet()
    before: list[int] = []
    plain = StoredDetectors.load

    def watched(self: StoredDetectors, ref: Any) -> Artifact:
        before.append(len(weights))
        artifact = plain(self, ref)
        modules = [value for value in vars(artifact.detector).values() if isinstance(value, torch.nn.Module)]
        weights.update(parameter for module in modules for parameter in module.parameters())
        return artifact

    monkeypatch.setattr(StoredDetectors, "load", watched)
    gc.disable()
    try:
        run("resources.detectors_in_memory=1")
    finally:
        gc.enable()
    assert 3 <= len(before) <= 6 and not any(before)


@pytest.mark.usefixtures("fleet")
def test_only_detectors_that_are_needed_are_loaded(loads: list[str]) -> None:
    run(f"source.uri={ROOT}/only-{CATEGORIES.index(BOLTS)}")
    assert loads == [BOLTS]


def strangers() -> bytes:
    """A tar with images of a known category, of an unknown one and of none, and two bad members."""
    files = [
        *sample(1, picture(BOLTS, 1), category=BOLTS),
        *sample(2, b"no image", category="bolt"),
        *sample(3, picture(BOLTS, 3)),
        *sample(4, b"no image", category=BOLTS),
        ("../5.png", b"x"),
    ]
    return tar_bytes(files)


@pytest.mark.usefixtures("fleet")
def test_an_image_without_a_detector_is_a_row_with_a_status() -> None:
    Storage().write(f"{ROOT}/strange/a.tar", strangers())
    with pytest.raises(TooManyBadRows, match="2 unknown_category"):
        run(f"source.uri={ROOT}/strange")
    planned, manifest = run(f"source.uri={ROOT}/strange", "max_bad_fraction=0.8")
    assert manifest["statuses"] == {"not_an_image": 1, "ok": 1, "unknown_category": 2, "unsafe_name": 1}
    assert set(manifest["statuses"]) - {"ok"} <= BAD_STATUSES
    found = {row["key"].rpartition("#")[2]: row for row in rows(planned)}
    assert found["001.png"]["image_score"] is not None
    assert "category 'bolt'. Did you mean 'bolts'? Known: ../rings, Hex nuts/M4, bolts." in found["002.png"]["error"]
    assert "has no category" in found["003.png"]["error"]
    for name in ("002.png", "003.png"):
        assert found[name]["status"] == "unknown_category" and found[name]["artifact"] == planned.artifact.digest
        assert {found[name][column] for column in ("image_score", "p_value", "threshold", "flagged")} == {None}
    assert found["004.png"]["artifact"] == planned.artifact.categories[BOLTS].digest
    Storage().write(f"{ROOT}/fail/a.tar", tar_bytes(sample(2, picture(BOLTS, 2), category="bolt")))
    with pytest.raises(ArchiveError, match=r"002\.png: .*\(status unknown_category\)"):
        run(f"source.uri={ROOT}/fail", f"sink.uri={ROOT}/failed", "source.on_bad_member=fail")


@pytest.mark.usefixtures("fleet")
def test_the_error_of_a_row_stays_short_when_there_are_many_categories() -> None:
    digest = read_index(FLEET, Storage()).categories[BOLTS].digest
    data = {name: Storage().read(f"{member_uri(FLEET, BOLTS)}/{name}") for name in bolt_files()}
    names = [f"line-{i}" for i in range(40)]
    for category in names:
        for name, content in data.items():
            Storage().write(f"{member_uri(f'{ROOT}/many', category)}/{name}", content)
    write_fleet(f"{ROOT}/many", Storage(), dict.fromkeys(names, digest), {})
    overrides = [f"artifact={ROOT}/many", f"source.uri={ROOT}/only-1", "max_bad_fraction=1"]
    errors = {row["error"].partition(": ")[2] for row in rows(run(*overrides)[0])}
    assert errors == {"the fleet has no detector for category 'bolts'. It has 40 others."}


def bolt_files() -> list[str]:
    return [file.uri.rpartition("/")[2] for file in Storage().list(member_uri(FLEET, BOLTS))]


@pytest.mark.usefixtures("fleet")
def test_a_fleet_resumes_and_a_changed_member_is_refused_with_its_name() -> None:
    whole, _ = run()
    expected = rows(whole)
    Storage().delete(f"{ROOT}/results/ledger/00001.json")
    Storage().delete(f"{ROOT}/results/manifest.json")
    again, _ = run("resources.detectors_in_memory=2", "resources.num_workers=3")
    assert [shard.index for shard in again.todo] == [1] and rows(again) == expected
    members = {category: ref.digest for category, ref in again.artifact.categories.items()}
    changed = fit_category(ROOT, BOLTS, seed=1)
    with pytest.raises(ArtifactError, match=rf"category 'bolts': .* has the digest {changed[:16]}, the index says"):
        plan()
    write_fleet(FLEET, Storage(), {**members, BOLTS: changed}, {})
    with pytest.raises(ResumeError, match=rf'categories\.bolts: "{members[BOLTS]}" -> "{changed}"') as refused:
        plan()
    assert "categories.Hex" not in str(refused.value) and "artifact: " in str(refused.value)


@pytest.mark.usefixtures("fleet")
def test_a_member_that_is_replaced_while_the_job_runs_stops_it() -> None:
    planned = plan()
    fit_category(ROOT, RINGS, seed=1)
    with pytest.raises(ArtifactError, match="was replaced after the job was planned"):
        jobs.score(planned, lambda *_: None)


@pytest.mark.usefixtures("fleet")
def test_the_smallest_calibration_decides_whether_alpha_is_allowed() -> None:
    with pytest.raises(SpecError, match=r"category '\.\./rings': flag\.alpha = 0\.13 needs at least 7 .* has 6\."):
        plan("flag.alpha=0.13")
    assert len(plan("flag={threshold: 1}").records) == 3


@pytest.mark.usefixtures("fleet")
def test_loose_images_without_a_category_in_their_path_are_refused() -> None:
    pack(f"{ROOT}/loose", "", [("bolts/1.png", picture(BOLTS, 1)), ("bolts/2.png", picture(BOLTS, 2))], 1)
    for pattern in ("null", "{name}.png"):
        with pytest.raises(SpecError, match=r"source\.pattern: has no \{category\}"):
            plan(f"source.uri={ROOT}/loose", f"source.pattern={pattern}")
    _, manifest = run(f"source.uri={ROOT}/loose", "source.pattern={category}/{name}.png")
    assert manifest["statuses"] == {"ok": 2}
    plan(f"source.uri={ROOT}/loose", f"artifact={member_uri(FLEET, BOLTS)}", f"sink.uri={ROOT}/other")


@pytest.mark.usefixtures("fleet")
def test_auroc_is_the_mean_over_categories_and_progress_shows_the_fleet() -> None:
    planned, _ = run()
    found = [[row for row in rows(planned) if row["category"] == category] for category in CATEGORIES]
    each = [roc_auc_score([r["label"] for r in mine], [r["image_score"] for r in mine]) for mine in found]
    value = labelled_auroc(planned.ledger)
    assert value is not None and value[0] == pytest.approx(sum(each) / 3, abs=1e-12) and value[1] == 30
    assert "Fleet      of 3 categories" in progress(planned.ledger).lines()


@pytest.mark.usefixtures("fleet")
def test_the_rate_assumes_equally_many_images_of_each_category() -> None:
    records = list(plan().records.values())
    rates = [replace(r, body={**r.body, "images_per_second": rate}) for r, rate in zip(records, (2, 4, 4), strict=True)]
    assert scoring_rate(rates) == 3.0  # one image each: 1/2 + 1/4 + 1/4 seconds
    assert scoring_rate([*rates, replace(records[0], body={})]) == 0.0


def rewrite_index(uri: str, change: Callable[[dict[str, Any]], None]) -> None:
    index_uri = join_uri(uri, "artifact.json")
    body = json.loads(Storage().read(index_uri))
    change(body)
    Storage().write(index_uri, json.dumps(body).encode())


BREAKS: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("digest", lambda body: body["categories"][BOLTS].update(digest="0" * 64)),
    ("outside of categories/", lambda body: body["categories"][BOLTS].update(folder="categories/x/../../bolts")),
    ("outside of categories/", lambda body: body["categories"][BOLTS].update(folder="/etc")),
    ("not found", lambda body: body["categories"][BOLTS].update(folder="categories/gone-123")),
    ("has format 3", lambda body: body.update(format_version=3)),
    ("is of kind 'flock'", lambda body: body.update(kind="flock")),
    ("names no category", lambda body: body.update(categories={})),
    ("is damaged", lambda body: body.update(categories={BOLTS: {"folder": "categories/x"}})),
    ("is damaged", lambda body: body.update(categories=[1])),
]


@pytest.mark.parametrize(("message", "change"), BREAKS)
def test_a_broken_fleet_ends_with_one_sentence_and_exit_code_2(
    folder: Path, message: str, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite_index(f"file://{folder}/fleet", change)
    for command in ("check", "plan", "score"):
        ended = call(folder, command)
        assert ended.exit_code == 2 and message in ended.output, ended.output
        assert ended.output.count("\n") == 1


def test_the_command_line_shows_the_fleet(folder: Path) -> None:
    assert "ready to score" in call(folder, "check").output
    plan_text = call(folder, "plan", "--workers", "2").output
    assert "Fleet      3 categories: ../rings, Hex nuts/M4, bolts\n" in plan_text
    assert "measured when the artifact was fitted (equally many images of each category)\n" in plan_text
    ended = call(folder, "score", "--local")
    assert ended.exit_code == 0 and "over 30 labelled images, mean of the fleet's categories: " in ended.output
    names = {path.name for path in (folder / "fleet" / "categories").iterdir()}
    assert names == {category_folder(category).removeprefix("categories/") for category in CATEGORIES}


@pytest.mark.usefixtures("fleet")
def test_readers_of_ordinary_artifacts_refuse_a_fleet_and_read_its_members() -> None:
    index = read_index(FLEET, Storage())
    assert index.body["format_version"] == FORMATS["fleet"]
    with pytest.raises(ArtifactError, match="is a fleet, but one detector is needed"):
        load_artifact(FLEET, Storage())
    for record in read_records(index, Storage()).values():
        assert record.body["format_version"] == FORMAT_VERSION
    with pytest.raises(RaydetectError, match="the fleet has no category"):
        write_fleet(f"{ROOT}/none", Storage(), {}, {})


@given(st.text(), st.text())
def test_folders_are_safe_and_different_for_different_names(first: str, second: str) -> None:
    for name in (first, second):
        assert FOLDER.fullmatch(category_folder(name)) and len(category_folder(name)) < 70
    assert (category_folder(first) == category_folder(second)) == (first == second)
    assert category_folder("Bolt") != category_folder("bolt")


def test_a_category_is_found_however_its_name_is_composed() -> None:
    ref = ArtifactRef("memory:///f/categories/x", "0" * 64)
    for known, asked in (("Geh\u00e4use", "Geha\u0308use"), ("Geha\u0308use", "Geh\u00e4use")):
        index = ArtifactIndex("memory:///f", "1" * 64, {}, {known: ref})
        assert index.for_category(asked) == ref and index.for_category("Haube") is None
