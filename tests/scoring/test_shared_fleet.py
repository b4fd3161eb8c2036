"""Scoring with one detector that categories share: loaded once, mixed batches, rows as with each category's own."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from sklearn.metrics import roc_auc_score

from raydetect.artifacts.fleet import member_uri, read_index, read_records
from raydetect.artifacts.record import read_record
from raydetect.artifacts.store import Artifact, StoredDetectors
from raydetect.cli.main import main
from raydetect.config import CalibrateSpec, ScoreSpec, parse_job
from raydetect.errors import ArtifactError, SpecError
from raydetect.local import jobs
from raydetect.metrics.conformal import p_values
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.scoring import batches
from raydetect.storage import Storage
from tests.builders.archives import pack
from tests.builders.images import DEFECTS, defect_image, encode, normal_image
from tests.builders.server import client, files, run, serve_spec
from tests.builders.shared_fleet import COUNTS, PARAMS, PATTERN, ROOT, SIZE_PX, fit_spec, make_images, of_category
from tests.whole_jobs.runs import rows_of

NIGHT = {"uri": f"{ROOT}/night", "pattern": "{category}/{defect}/{name}.png"}
HELD = {"cable": 5, "Hex nut": 6, "bolt": 7}
OWN = ("key", "image_uri", "chunk", "artifact", "heatmap_uri", "sha256")


def make_night() -> None:
    """Ten images of each category in turn, every second one with a defect, in two tars."""
    made = []
    for i in range(10):
        for turn, category in enumerate(COUNTS):
            number, defect = 7000 + 10 * i + turn, DEFECTS[i % len(DEFECTS)] if i % 2 else ""
            image = defect_image(number, defect, SIZE_PX)[0] if defect else normal_image(number, SIZE_PX)
            made.append((f"{category}/{defect or 'good'}/{number}.png", encode(image)))
    pack(f"{ROOT}/night", ".tar", made, 2)


@pytest.fixture(scope="module")
def fitted() -> dict[str, bytes]:
    """All files: a fleet `model` that shares a detector, the same detector alone as `plain`, and images."""
    source, held = make_images("fit"), make_images("held", 500, HELD)
    for artifact, word in (("model", "calibration"), ("plain", False)):
        spec = fit_spec(source, artifact, calibration={"source": held}, per_category=word)
        jobs.fit(spec, lambda *_: None)
    make_night()
    return {path: file.getvalue() for path, file in fsspec.filesystem("memory").store.items()}


@pytest.fixture(autouse=True)
def _placed(fitted: dict[str, bytes]) -> None:
    for path, data in fitted.items():
        Storage().write(f"memory://{path}", data)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Artifacts whose detector was loaded, in order."""
    found, plain = list[str](), StoredDetectors.load

    def watched(self: StoredDetectors, ref: Any) -> Artifact:
        found.append(ref.uri)
        return plain(self, ref)

    monkeypatch.setattr(StoredDetectors, "load", watched)
    return found


def plan(results: str, **changes: Any) -> ScorePlan:
    values = {
        "kind": "score",
        "source": NIGHT,
        "artifact": f"{ROOT}/model",
        "sink": {"uri": f"{ROOT}/{results}", "heatmaps": "all", "style": "map"},
        "flag": {"alpha": 0.2},
        "batch_size": 4,
        "resources": {"cpus_per_worker": 1},
        **changes,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, ScoreSpec)
    return plan_score(spec)


def score(results: str, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    planned = plan(results, **changes)
    manifest = jobs.score(planned, lambda *_: None)
    return rows_of(planned.ledger.uri, planned.ledger.storage), manifest


def comparable(rows: list[dict[str, Any]], results: str) -> dict[str, dict[str, Any]]:
    """Rows without what names other files, with the bytes of heatmaps, by image."""
    found = {}
    for row in rows:
        member, _, container = str(row["heatmap_uri"]).partition("::")
        heatmap = b""
        if row["heatmap_uri"]:
            with Storage().open(f"{ROOT}/{results}{container}") as handle:
                heatmap = bytes(fsspec.filesystem("zip", fo=handle).cat_file(member.removeprefix("zip://")))
        own = {name: value for name, value in row.items() if name not in OWN}
        found[row["key"].rpartition("/")[2]] = {**own, "heatmap": heatmap}
    return found


def test_rows_equal_those_of_the_detector_alone_calibrated_by_hand_for_each_category(loads: list[str]) -> None:
    rows, manifest = score("shared")
    whole = comparable(rows, "shared")
    assert manifest["statuses"] == {"ok": 30} and len({row["threshold"] for row in rows}) == 3
    assert len(loads) == 1
    held = {"uri": f"{ROOT}/held", "pattern": PATTERN}
    for number, category in enumerate(COUNTS):
        job = {"kind": "calibrate", "artifact": f"{ROOT}/plain", "output": f"{ROOT}/by-hand-{number}"}
        spec = parse_job({**job, "source": of_category(held, category)}, "job")
        assert isinstance(spec, CalibrateSpec)
        jobs.calibrate(spec, lambda *_: None)
        alone, _ = score(f"alone-{number}", artifact=f"{ROOT}/by-hand-{number}")
        mine = comparable([row for row in alone if row["category"] == category], f"alone-{number}")
        assert len(mine) == 10 and mine == {name: whole[name] for name in mine}
        calibration = read_record(f"{ROOT}/by-hand-{number}", Storage()).calibration.scores
        scored = [row for row in rows if row["category"] == category]
        expected = p_values(calibration, [row["image_score"] for row in scored])  # type: ignore[arg-type]
        assert [row["p_value"] for row in scored] == expected.tolist()
        index = read_index(f"{ROOT}/model", Storage())
        assert {row["artifact"] for row in scored} == {index.categories[category].digest}


def test_categories_share_batches_and_the_detector_is_loaded_once_whatever_the_limit(
    monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    calls, forward = list[int](), batches._forward
    monkeypatch.setattr(batches, "_forward", lambda *given: (calls.append(1), forward(*given))[1])
    mixed, _ = score("mixed", resources={"cpus_per_worker": 1, "detectors_in_memory": 1})
    assert len(loads) == 1 and len(calls) == 8  # two shards of 15 images in batches of 4; by category it would be 12
    single, _ = score("single", batch_size=1)
    left, right = comparable(mixed, "mixed"), comparable(single, "single")
    for name, row in left.items():
        assert row["image_score"] == pytest.approx(right[name]["image_score"], rel=1e-5)
        assert (row["p_value"], row["flagged"]) == (right[name]["p_value"], right[name]["flagged"])


def test_top_k_is_counted_for_each_category() -> None:
    rows, _ = score("top", sink={"uri": f"{ROOT}/top", "heatmaps": "top_k", "top_k": 1})
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["chunk"], row["category"]), []).append(row)
    best = {max(group, key=lambda row: row["image_score"])["key"] for group in groups.values()}
    assert len(best) == 6 and best == {row["key"] for row in rows if row["heatmap_uri"]}


def test_an_image_of_an_unknown_category_is_a_row_with_that_status() -> None:
    image = encode(normal_image(1, SIZE_PX))
    pack(f"{ROOT}/odd", ".tar", [("screw/good/1.png", image), ("bolt/good/2.png", image)], 1)
    rows, manifest = score("odd-results", source={**NIGHT, "uri": f"{ROOT}/odd"}, max_bad_fraction=0.9)
    assert manifest["statuses"] == {"ok": 1, "unknown_category": 1}
    errors = {row["key"].rpartition("#")[2]: row["error"] for row in rows}
    assert "the fleet has no detector for category 'screw'" in errors["screw/good/1.png"]
    rows, _ = score("none", source={"uri": f"{ROOT}/odd"}, max_bad_fraction=1)
    assert all(row["status"] == "unknown_category" and "has no category" in row["error"] for row in rows)


def test_the_smallest_calibration_decides_and_a_member_replaced_meanwhile_stops_the_job() -> None:
    with pytest.raises(SpecError, match=r"category 'cable': flag\.alpha = 0\.15 needs at least 6 .* has 5\."):
        plan("results", flag={"alpha": 0.15})
    planned = plan("results")
    uri = f"{member_uri(f'{ROOT}/model', 'bolt')}/artifact.json"
    Storage().write(uri, json.dumps({**json.loads(Storage().read(uri)), "note": 1}).encode())
    with pytest.raises(ArtifactError, match="was replaced after the job was planned"):
        jobs.score(planned, lambda *_: None)


def test_endpoints_answer_by_category_with_one_detector(tmp_path: Path, loads: list[str]) -> None:
    rows, _ = score("job")
    loads.clear()
    flag = {"alpha": 0.2}
    for open_to in ("open", "models"):
        (tmp_path / open_to).mkdir()
    spec = serve_spec(tmp_path, detectors={"all": {"artifact": f"{ROOT}/model", "flag": flag}})
    image = encode(normal_image(7000, SIZE_PX))
    defect = encode(defect_image(7011, DEFECTS[1], SIZE_PX)[0])

    async def work() -> list[Any]:
        async with client(spec) as http:
            assert len(loads) == 1  # before the first image
            told = (await http.get("/v1/detectors")).json()
            found: list[Any] = [told]
            for category, data in (("cable", image), ("Hex nut", defect), ("screw", image)):
                posted = await http.post(
                    "/v1/detectors/all/score", files=files(data), data={"category": category, "heatmaps": "none"}
                )
                found.append(posted.json())
            return found

    told, cable, nut, screw = run(work())
    assert len(loads) == 1
    described = told["detectors"][0] if isinstance(told, dict) else told[0]
    assert sorted(described["categories"]) == sorted(COUNTS) and described["threshold"] is None
    assert described["held_out"] == 5
    of = {row["key"].rpartition("/")[2]: row for row in rows}
    for answer, name in ((cable, "7000.png"), (nut, "7011.png")):
        result = answer["results"][0]
        assert result["image_score"] == pytest.approx(of[name]["image_score"], rel=1e-5)
        assert (result["p_value"], result["flagged"]) == (of[name]["p_value"], of[name]["flagged"])
        assert result["artifact"] == of[name]["artifact"]
    assert screw["results"][0]["status"] == "unknown_category"


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_commands_say_what_was_fitted_and_figures_are_of_each_category(tmp_path: Path) -> None:
    for name in ("fit", "night"):
        for file in Storage().list(f"{ROOT}/{name}"):
            Storage().write(f"file://{tmp_path}/{name}/{file.uri.rpartition('/')[2]}", bytes(Storage().read(file.uri)))
    fit = {
        "kind": "fit",
        "source": {"uri": f"{tmp_path}/fit", "pattern": PATTERN},
        "detector": {"name": "patchcore", "preset": "smoke", "params": PARAMS["patchcore"]},
        "artifact": f"{tmp_path}/model",
        "per_category": "calibration",
        "calibration": {"holdout_ratio": 0.5},
    }
    flag = {"alpha": 0.2}
    results = {"uri": f"{tmp_path}/results", "heatmaps": "none"}
    night = {"kind": "score", "source": {**NIGHT, "uri": f"{tmp_path}/night"}, "flag": flag}
    judged = {"kind": "evaluate", "results": [f"{tmp_path}/results"], "output": f"{tmp_path}/out", "replicates": 20}
    texts = {"fit": fit, "score": {**night, "artifact": f"{tmp_path}/model", "sink": results}, "evaluate": judged}
    for name, values in texts.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert "ready to fit" in call("check", str(tmp_path / "fit.yaml")).output
    told = call("fit", str(tmp_path / "fit.yaml"), "--local").output
    assert "Fitted patchcore on 18 images of 3 categories in " in told
    assert "Calibrated each category on 18 normal images in all" in told
    refused = call("plan", str(tmp_path / "fit.yaml"), "--set", f"artifact={tmp_path}/x")
    assert refused.exit_code == 2 and "per_category: the time of such a fit is not forecast" in refused.output
    planned = call("plan", str(tmp_path / "score.yaml"), "--workers", "2").output
    assert "Fleet      3 categories: Hex nut, bolt, cable\n" in planned
    ended = call("score", str(tmp_path / "score.yaml"), "--local").output
    assert "over 30 labelled images, mean of the fleet's categories: " in ended
    assert call("verify", f"{tmp_path}/results").exit_code == 0
    reflagged = call("reflag", f"{tmp_path}/results", "--set", "flag.alpha=0.3")
    assert reflagged.exit_code == 0, reflagged.output
    page = call("report", f"{tmp_path}/results", "-o", f"{tmp_path}/page.html")
    assert (
        page.exit_code == 0 and "patchcore calibrated for each of 3 categories" in (tmp_path / "page.html").read_text()
    )
    assert call("evaluate", str(tmp_path / "evaluate.yaml")).exit_code == 0
    board = pq.read_table(tmp_path / "out" / "leaderboard.parquet").to_pylist()
    rows = rows_of(f"file://{tmp_path}/results", Storage())
    found = {row["category"]: row["image_auroc"] for row in board}
    expected = {}
    for category in COUNTS:
        mine = [row for row in rows if row["category"] == category]
        expected[category] = roc_auc_score([r["label"] for r in mine], [r["image_score"] for r in mine])
        assert found[category] == pytest.approx(expected[category], abs=1e-9)
    assert f"{sum(expected.values()) / 3:.4f}" in ended


def test_the_records_of_a_large_fleet_read_the_header_of_the_tensors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, plain = list[str](), Storage.read_range

    def counted(self: Storage, uri: str, *rest: Any) -> Any:
        reads.append(uri)
        return plain(self, uri, *rest)

    monkeypatch.setattr(Storage, "read_range", counted)
    assert len(read_records(read_index(f"{ROOT}/model", Storage()), Storage())) == 3
    assert len(reads) == 2  # its length and the header
