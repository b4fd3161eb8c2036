"""The whole job in one process: fit, score, resume, bad input, forecast."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydetect.artifacts.record import read_record
from raydetect.artifacts.store import load_artifact
from raydetect.config import FitSpec, ScoreSpec, parse_job
from raydetect.config.validation import apply_overrides
from raydetect.errors import ArtifactError, ChangedError, ResumeError, SpecError, TooManyBadRows
from raydetect.local import jobs
from raydetect.planning.forecast import forecast
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.records import Receipt
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.storage import Storage, join_uri
from tests.builders.archives import mixed_files, normal_files, pack, tar_bytes
from tests.builders.images import encode, normal_image

FIT: dict[str, Any] = {
    "kind": "fit",
    "source": {"uri": "memory://data/normal"},
    "detector": {
        "name": "patchcore",
        "params": {
            "backbone": "resnet18",
            "weights": "random",
            "image_size": [64, 64],
            "coreset_sampling_ratio": 0.05,
            "smoothing_sigma": 2,
        },
    },
    "artifact": "memory://data/artifact",
    "calibration": {"holdout_ratio": 0.4},
    "resources": {"cpus_per_worker": 1},
}
SCORE: dict[str, Any] = {
    "kind": "score",
    "source": {
        "uri": "memory://data/mixed",
        "pattern": "{category}/test/{defect}/{name}.png",
        "mask_pattern": "{category}/ground_truth/{defect}/{name}_mask.png",
    },
    "artifact": "memory://data/artifact",
    "sink": {"uri": "memory://data/results"},
    "flag": {"alpha": 0.1},
    "chunk_images": 4,
    "batch_size": 4,
    "resources": {"cpus_per_worker": 1},
}


def spec_of(base: dict[str, Any], *overrides: str) -> Any:
    return parse_job(apply_overrides(base, overrides), "job")


def fit(*overrides: str) -> jobs.FitReport:
    spec = spec_of(FIT, *overrides)
    assert isinstance(spec, FitSpec)
    return jobs.fit(spec, lambda *_: None)


def run(*overrides: str) -> tuple[ScorePlan, dict[str, Any]]:
    spec = spec_of(SCORE, *overrides)
    assert isinstance(spec, ScoreSpec)
    plan = plan_score(spec)
    return plan, jobs.score(plan, lambda *_: None)


def rows(plan: ScorePlan) -> list[dict[str, Any]]:
    found = []
    for uri in plan.ledger.part_uris():
        with plan.ledger.storage.open(uri) as handle:
            found += pq.read_table(handle).to_pylist()
    return sorted(found, key=lambda row: row["key"])


@pytest.fixture
def data() -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()


@pytest.mark.usefixtures("data")
def test_a_job_leaves_rows_heatmaps_ledger_and_manifest() -> None:
    plan, manifest = run("sink.heatmaps=all")
    found = rows(plan)
    assert len(found) == manifest["rows"] == 17 and manifest["statuses"] == {"ok": 17}
    for row in found:
        assert row["flagged"] == (row["image_score"] >= row["threshold"]) == (row["p_value"] <= 0.1)
        assert (
            Storage().filesystem(row["heatmap_uri"].partition("::")[2])[0].exists(row["heatmap_uri"].partition("::")[2])
        )
        assert (row["mask_uri"] is not None) == (row["label"] == 1)
        assert (row["width"], row["height"], row["artifact"]) == (96, 96, plan.artifact.digest)
    assert manifest["result"] == plan.run["result"]
    assert manifest["heatmap_scale"]["high"] > manifest["heatmap_scale"]["low"]
    anomalous = np.mean([row["image_score"] for row in found if row["label"] == 1])
    assert anomalous > np.mean([row["image_score"] for row in found if row["label"] == 0])


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(("heatmaps", "expected"), [("none", 0), ("all", 17), ("top_k", 6)])
def test_heatmaps_are_made_for_whom_the_job_says(heatmaps: str, expected: int) -> None:
    plan, manifest = run(f"sink.heatmaps={heatmaps}", "sink.top_k=1", "sink.style=map")
    drawn = [row for row in rows(plan) if row["heatmap_uri"]]
    assert len(drawn) == manifest["heatmaps"] == expected
    if heatmaps == "top_k":  # the best of every chunk
        by_chunk: dict[str, list[dict[str, Any]]] = {}
        for row in rows(plan):
            by_chunk.setdefault(row["chunk"], []).append(row)
        assert {max(c, key=lambda r: r["image_score"])["key"] for c in by_chunk.values()} == {r["key"] for r in drawn}


@pytest.mark.usefixtures("data")
def test_a_second_start_goes_on_and_opens_no_finished_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run()
    expected = rows(whole)
    Storage().delete("memory://data/results/ledger/00001.json")
    Storage().delete("memory://data/results/manifest.json")
    opened: list[str] = []
    plain_open = Storage.open

    def watched(self: Storage, uri: str, *words: Any) -> Any:
        opened.append(uri)
        return plain_open(self, uri, *words)

    monkeypatch.setattr(Storage, "open", watched)
    plan = plan_score(spec_of(SCORE))
    assert [shard.index for shard in plan.todo] == [1]
    jobs.score(plan, lambda *_: None)
    monkeypatch.undo()
    assert {uri for uri in opened if uri.endswith(".tar")} == {plan.shards[1].uri}
    assert rows(plan) == expected
    assert plan_score(spec_of(SCORE)).todo == ()


@pytest.mark.usefixtures("data")
def test_another_spec_artifact_or_archive_is_refused() -> None:
    run()
    for change in ("chunk_images=5", "flag.alpha=0.2", "sink.heatmaps=all", "source.max_pixels=99999"):
        with pytest.raises(ResumeError, match=change.partition("=")[0].rpartition(".")[2]):
            run(change)
    run("resources.num_workers=7", "max_bad_fraction=0.5")
    Storage().write("memory://data/mixed/part-0.tar", tar_bytes([("widget/test/good/z.png", b"x")]))
    with pytest.raises(ResumeError, match="archive has changed, and committed shard 00000 has other content"):
        run()
    fit("seed=1")
    with pytest.raises(ResumeError, match="artifact"):
        run()


@pytest.mark.usefixtures("data")
def test_bad_images_are_rows_with_a_status_and_no_score() -> None:
    good = encode(normal_image(1))
    files = [
        ("widget/test/good/a.png", good),
        ("widget/test/good/b.png", b""),
        ("widget/test/good/c.png", b"text"),
        ("../widget/test/good/d.png", good),
        ("widget/test/good/a.png", good),
        ("widget/test/good/e.png", good[: len(good) // 2]),
    ]
    Storage().write("memory://data/bad/a.tar", tar_bytes(files))
    Storage().write("memory://data/bad/b.tar", tar_bytes(mixed_files(4, 0))[:20_000])
    Storage().write("memory://data/bad/c.tar", b"no tar at all")
    with pytest.raises(TooManyBadRows, match=r"max_bad_fraction = 0\.05"):
        run("source.uri=memory://data/bad")
    plan, manifest = run("source.uri=memory://data/bad", "max_bad_fraction=1")
    found = rows(plan)
    assert manifest["statuses"] == {
        "bad_shard": 2,
        "corrupt": 1,
        "duplicate_key": 1,
        "empty": 1,
        "not_an_image": 1,
        "ok": 1 + sum(row["status"] == "ok" and "b.tar" in row["key"] for row in found),
        "unsafe_name": 1,
    }
    for row in found:
        assert (row["status"] == "ok") == (row["image_score"] is not None) == (row["p_value"] is not None)
        assert (row["error"] == "") == (row["status"] == "ok")
        assert row["status"] == "ok" or (row["flagged"] is None and row["heatmap_uri"] is None)


@pytest.mark.usefixtures("data")
def test_an_archive_of_nothing_but_text_is_refused_with_what_it_holds() -> None:
    Storage().write("memory://data/none/a.tar", tar_bytes([("notes.txt", b"x")]))
    with pytest.raises(SpecError, match=r"has no images; left out: 1 other_suffix \(notes.txt\)") as caught:
        run("source.uri=memory://data/none")
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("data")
def test_a_score_that_is_not_finite_is_a_status() -> None:
    plan = plan_score(spec_of(SCORE))
    artifact = load_artifact("memory://data/artifact", Storage())
    tensors = artifact.detector.tensors()
    tensors["bank"] = tensors["bank"] * float("nan")
    artifact.detector.load_tensors(tensors)
    scorer = jobs.Scorer(artifact, plan.spec)
    shard = plan.shards[0]
    chunk = next(jobs.read_chunks(plan.archive, shard, plan.spec.source, 4, 1 << 30))
    result = scorer.score_chunk(chunk)
    assert {row.status for row in result.rows} == {"not_finite"} and not result.pictures
    assert all(row.image_score is None and row.flagged is None for row in result.rows)


@pytest.mark.usefixtures("data")
def test_damaged_artifacts_are_refused() -> None:
    storage = Storage()
    record = read_record("memory://data/artifact", storage)
    place = join_uri("memory://data/artifact", record.body["tensors"]["file"])
    data = storage.read(place)
    storage.write(place, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="sha256"):
        load_artifact("memory://data/artifact", storage)
    body = dict(record.body)
    for change, message in (
        ({"format_version": 5}, "has format 5"),
        ({"calibration": None}, "damaged or foreign"),
        ({"tensors": {**body["tensors"], "file": "../x"}}, "outside the folder"),
        ({"detector": "patchcoer"}, "cannot build"),
    ):
        storage.write("memory://data/artifact/artifact.json", json.dumps({**body, **change}).encode())
        with pytest.raises(ArtifactError, match=message):
            load_artifact("memory://data/artifact", storage)
    with pytest.raises(ArtifactError, match="raydetect fit"):
        load_artifact("memory://data/nowhere", storage)


@pytest.mark.usefixtures("data")
def test_too_small_a_calibration_is_refused_before_anything_runs() -> None:
    with pytest.raises(SpecError, match="at least 99 held-out normal images, but the artifact has 12"):
        run("flag.alpha=0.01")
    _, manifest = run("flag={threshold: 0.0}", "sink.heatmaps=none")
    assert manifest["flagged"] == 17


@pytest.mark.usefixtures("data")
def test_the_forecast_counts_what_the_run_writes() -> None:
    spec = spec_of(SCORE, "sink.heatmaps=all")
    found = forecast(plan_score(spec), [1, 4], 2.0)
    before = len(Storage().filesystem("memory://data")[0].find("/data"))
    jobs.score(plan_score(spec), lambda *_: None)
    written = len(Storage().filesystem("memory://data")[0].find("/data")) - before
    assert (found.images, found.images_from) == (17, "counted")
    assert written <= found.puts + 6
    assert found.estimates[0].hours == pytest.approx(4 * found.estimates[1].hours)
    assert found.estimates[0].cost == pytest.approx(found.estimates[1].cost)
    assert forecast(plan_score(spec), [1], None).shards_left == 0


def test_held_out_images_are_not_fitted_and_labelled_anomalies_are_left_out() -> None:
    pack("memory://data/normal", ".tar", [*normal_files(20), *mixed_files(0, 2, masks=False)], 2)
    report = fit("source.pattern={category}/{split}/{defect}/{name}.png")
    assert report.facts["images"] == {"fitted": 12, "held_out": 8, "labelled_anomalous_left_out": 6, "bad": 0}
    record = read_record("memory://data/artifact", Storage())
    assert list(record.calibration.scores) == sorted(record.calibration.scores)


def test_bad_fit_jobs_are_refused() -> None:
    pack("memory://data/normal", ".tar", normal_files(3), 1)
    Storage().write("memory://data/one/a.tar", tar_bytes(normal_files(1)))
    with pytest.raises(SpecError, match="1 usable normal image"):
        fit("source.uri=memory://data/one")
    Storage().write("memory://data/bad/a.tar", tar_bytes([*normal_files(3), ("x.png", b""), ("y.png", b"")]))
    with pytest.raises(TooManyBadRows, match="2 of 5 images cannot be used"):
        fit("source.uri=memory://data/bad")


def test_padding_and_threads_do_not_change_a_score(tmp_path: Path) -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(5, 1), 1)
    fit()
    first, _ = run()
    again, _ = run(f"sink.uri={tmp_path}/again")
    scores = [[row["image_score"] for row in rows(plan)] for plan in (first, again)]
    assert scores[0] == scores[1]
    other, _ = run(f"sink.uri={tmp_path}/other", "batch_size=3", "chunk_images=5")
    np.testing.assert_allclose([r["image_score"] for r in rows(other)], scores[0], rtol=1e-4)
    assert replace(first.spec, batch_size=3) != first.spec


def test_training_in_bfloat16_is_close_to_float32_and_not_the_same() -> None:
    pack("memory://data/normal", ".tar", normal_files(24), 2)
    overrides = (
        "detector={name: stfpm, params: {backbone: resnet18, weights: random, image_size: [64, 64], epochs: 2, "
        "batch_size: 8, learning_rate: 0.02}}",
    )
    whole, half = fit(*overrides).facts["losses"], fit(*overrides, "precision=bfloat16").facts["losses"]
    assert half != whole
    assert half == pytest.approx(whole, rel=0.02)


@pytest.mark.usefixtures("data")
def test_notes_reach_rows_receipts_and_the_manifest() -> None:
    pages, turned = io.BytesIO(), io.BytesIO()
    first, second = (Image.fromarray(normal_image(i)) for i in (1, 2))
    first.save(pages, "TIFF", save_all=True, append_images=[second])
    first.save(turned, "PNG", exif=b"Exif\0\0no TIFF header")
    files = [("a.tif", pages.getvalue()), ("b.png", turned.getvalue()), ("c.png", encode(normal_image(3)))]
    pack("memory://data/noted", ".tar", files, 1)
    plan, manifest = run(
        "source.uri=memory://data/noted",
        "source.pattern=null",
        "source.mask_pattern=null",
        "sink.uri=memory://data/noted-results",
    )
    assert [row["note"] for row in rows(plan)] == ["pages_not_read: 1", "exif_ignored", ""]
    assert manifest["notes"] == {"exif_ignored": 1, "pages_not_read": 1} and manifest["bad_rows"] == 0


@pytest.mark.usefixtures("data")
def test_a_shard_that_changed_while_a_run_was_stopped_leaves_no_row_of_before() -> None:
    """What was listed is what is scored, and of an interrupted start over other content nothing stays."""
    files = [(f"{i}.png", encode(normal_image(i))) for i in range(9)]
    Storage().write("memory://data/grown/a.tar", tar_bytes(files[:1]))
    Storage().write("memory://data/grown/b.tar", tar_bytes(files))
    overrides = ("source={uri: memory://data/grown}", "chunk_images=2", "sink.uri=memory://data/grown-results")
    plan = plan_score(spec_of(SCORE, *overrides))

    def stop(done: ScoredChunk | Receipt) -> None:
        if isinstance(done, ScoredChunk) and done.facts.shard == 1 and done.facts.number == 3:
            raise InterruptedError

    plan.begin()
    with pytest.raises(InterruptedError):
        jobs.score(plan, stop)
    Storage().write("memory://data/grown/b.tar", tar_bytes(files[5:8]))
    with pytest.raises(ChangedError, match=r"b\.tar: has changed since it was listed"):
        jobs.score(plan, lambda *_: None)
    again, manifest = run(*overrides)
    assert manifest["rows"] == 4 and manifest["shards"] == 2
    written = [file.uri for file in Storage().list("memory://data/grown-results/scores")]
    assert len(written) == sum(len(receipt.parts) for receipt in again.ledger.receipts()) == 2
