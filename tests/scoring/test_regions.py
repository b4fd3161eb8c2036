"""Regions against a flood fill in fractions, the promise of their threshold by simulation, and rows of whole jobs."""

import json
import math
import tracemalloc
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetect.artifacts.record import Calibration, read_record
from raydetect.artifacts.region_threshold import RegionThreshold
from raydetect.artifacts.store import load_artifact
from raydetect.blocks.coresets.group import Group
from raydetect.config import FlagSpec, TileSpec, ViewSpec, public_spec, result_digest, result_settings
from raydetect.errors import ArtifactError
from raydetect.fitting.calibrate import calibrate
from raydetect.fitting.image_cache import ImageCache
from raydetect.images.decode import decode_windows
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.records import Member
from raydetect.scoring import regions
from raydetect.scoring.batches import score_batches
from raydetect.scoring.regions import find_regions
from raydetect.sinks.rows import read_rows
from raydetect.sinks.run_progress import regions_text
from raydetect.sinks.scored_chunk import SCHEMA
from raydetect.sinks.verify import verify
from raydetect.storage import Storage
from raydetect.views import view as views
from raydetect.views.view import Layout, View
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.group import together
from tests.local.test_local import SCORE, data, fit, rows, run, spec_of  # noqa: F401 (a fixture)
from tests.reference.regions import stated

VIEWS = (
    ViewSpec(),
    ViewSpec(resize="pad"),
    ViewSpec(resize="short_side"),
    ViewSpec(size=(12, 12), crop=(8, 8)),
    ViewSpec(tile=TileSpec(size=(8, 8), overlap=3)),
    ViewSpec(tile=TileSpec(size=(8, 8), overlap=3), scale=0.7),
    ViewSpec(tile=TileSpec(size=(8, 8), overlap=3), scale=1.6),
)
INPUT = (8, 8)


def geometry(layout: Layout, spec: ViewSpec) -> tuple[tuple[Fraction, Fraction], tuple[Fraction, Fraction]]:
    """(x, y) of the canvas in px of the picture, and the size of its pixels, as fractions."""
    corner = tuple(Fraction(side).limit_denominator(10**6) for side in layout.box[:2])
    if spec.tile is None:
        stop = tuple(Fraction(side).limit_denominator(10**6) for side in layout.box[2:])
        pitch = ((stop[0] - corner[0]) / layout.canvas[1], (stop[1] - corner[1]) / layout.canvas[0])
    else:
        scaled = [max(1, round(side * (spec.scale or 1.0))) for side in layout.picture]
        pitch = tuple(Fraction(side * layout.reduction, s) for side, s in zip(layout.picture, scaled, strict=True))
    return (corner[0], corner[1]), (pitch[0], pitch[1])


@pytest.mark.parametrize("most_px", [4096, 9])  # of a canvas: as it is, and reduced
@pytest.mark.parametrize("spec", VIEWS, ids=lambda spec: str(spec.recorded()))
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=25, deadline=None)
def test_regions_are_those_of_a_flood_fill(
    spec: ViewSpec, most_px: int, width: int, height: int, seed: int, share: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "MAX_CANVAS_PX", most_px)

        layout = View(spec).layout((width, height), INPUT)

    random = np.random.default_rng(seed)
    map_HW = random.integers(0, 6, layout.canvas).astype(np.float32)  # with many equal peaks
    map_HW[random.random(layout.canvas) > share] = -1
    map_HW[random.random(layout.canvas) > 0.9] = np.nan
    expected = stated(map_HW, 2.0, (width, height), *geometry(layout, spec))
    for limit, block_px in ((1000, 1 << 18), (3, 12)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(regions, "BLOCK_PX", block_px)
            found, left_out = find_regions(map_HW, layout, 2.0, limit)
        assert [asdict(region) for region in found] == expected[:limit]
        assert left_out == len(expected) - len(found)
    for region in found:
        assert 0 <= region.x <= region.peak_x < region.x + region.width <= width
        assert 0 <= region.y <= region.peak_y < region.y + region.height <= height
        assert 1 <= region.area_px <= region.width * region.height


def test_regions_of_a_map_that_is_high_everywhere_need_little_more_than_their_labels() -> None:
    layout = View(ViewSpec(tile=TileSpec(size=(512, 512)))).layout((2048, 2048), (64, 64))
    map_HW = np.random.default_rng(0).random(layout.canvas, np.float32)
    tracemalloc.start()
    (found,), left_out = find_regions(map_HW, layout, 0.0, 20)
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.width, found.height, found.area_px, left_out) == (2048, 2048, 2048 * 2048, 0)
    assert (found.peak_y, found.peak_x) == np.unravel_index(map_HW.argmax(), map_HW.shape)
    assert most_bytes < 12 * map_HW.size  # labels take 4 for each px


def calibration_of(peaks: list[float] | None) -> Calibration:
    count = 9 if not peaks else len(peaks)
    return Calibration(scores=(0.0,) * count, map_low=0.0, map_high=1.0, map_peaks=None if peaks is None else (*peaks,))


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "tied"])
def test_of_normal_images_no_more_than_the_level_have_a_region(alpha: float, rounded: bool) -> None:
    """Over many draws of held-out and new normal images, of maps with a few correlated pixels."""
    random, held_out, new, draws = np.random.default_rng(5), 110, 20, 1500
    layout = View(ViewSpec()).layout((6, 6), (6, 6))
    alarms = []
    for _ in range(draws):
        light_N = random.gamma(2.0, size=(held_out + new, 1, 1))
        maps_NHW = (light_N * random.gamma(1.5, size=(held_out + new, 6, 6))).astype(np.float32)
        if rounded:
            maps_NHW = np.floor(maps_NHW / 2)
        peaks = sorted(maps_NHW[:held_out].max((1, 2)).tolist())
        rule = RegionThreshold.of(calibration_of(peaks), FlagSpec(alpha=alpha), 20)
        assert rule.value is not None and rule.level == alpha and not rule.note
        alarms.append(np.mean([bool(find_regions(m, layout, rule.value, 20)[0]) for m in maps_NHW[held_out:]]))
    error = np.std(alarms) / math.sqrt(draws)
    assert np.mean(alarms) <= alpha + 3 * error
    if not rounded:  # the rule wastes nothing but the fraction of an image
        assert np.mean(alarms) >= math.floor(alpha * (held_out + 1)) / (held_out + 1) - 3 * error


def test_the_threshold_is_the_next_float32_above_a_held_out_peak() -> None:
    peaks = [float(np.float32(0.1 * i)) for i in range(1, 10)]
    value = RegionThreshold.of(calibration_of(peaks), FlagSpec(alpha=0.2), 20).value
    assert value == float(np.nextafter(np.float32(peaks[-2]), np.float32(9)))  # 1 of 9 may lie above
    layout = View(ViewSpec()).layout((2, 1), (1, 2))
    assert not find_regions(np.array([[peaks[-2], np.nan]], np.float32), layout, value, 20)[0]
    (region,), left_out = find_regions(np.array([[peaks[-2], value]], np.float32), layout, value, 20)
    assert (region.x, region.width, region.peak_score, left_out) == (1, 1, value, 0)


@pytest.mark.parametrize(
    ("peaks", "flag", "limit", "level", "said"),
    [
        ([1.0] * 99, FlagSpec(alpha=0.02), 20, 0.02, ""),
        ([1.0] * 99, FlagSpec(fdr=0.3), 20, 0.01, ""),
        ([1.0] * 99, FlagSpec(threshold=4.0), 20, 0.01, ""),
        ([1.0] * 19, FlagSpec(threshold=4.0), 20, 0.05, "level 0.05 instead of 0.01, the smallest with 19 held-out"),
        ([1.0] * 3, FlagSpec(alpha=1 - 1e-12), 20, 1 - 1e-12, ""),
        ([], FlagSpec(alpha=0.1), 20, None, "does not localise"),
        (None, FlagSpec(alpha=0.1), 20, None, "`raydetect calibrate` adds them"),
        ([1.0] * 99, FlagSpec(alpha=0.1), 0, None, "sink.max_regions is 0"),
    ],
)
def test_the_level_is_that_of_the_flags_or_says_why_not(
    peaks: list[float] | None, flag: FlagSpec, limit: int, level: float | None, said: str
) -> None:
    rule = RegionThreshold.of(calibration_of(peaks), flag, limit)
    assert rule.level == level and (rule.value is None) == (level is None)
    assert said in rule.note and bool(rule.note) == bool(said)
    assert json.loads(json.dumps(rule.plain(), allow_nan=False)) == rule.plain()


def fit_small() -> str:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    return fit().uri


def maps_of(plan: Any, keys: list[str]) -> dict[str, np.ndarray]:
    """The maps of some images by the key of their rows, scored one by one in batches of the job's size."""
    artifact = load_artifact(plan.spec.artifact, Storage())
    files = dict(mixed_files(8, 3))
    found = {}
    for key in keys:
        member = Member(key, key, data=files[key.partition("#")[2]])
        decoded = decode_windows(member, DecodeRules(10**6, True), artifact.record.preprocess)
        (scored,) = score_batches(artifact.detector, decoded, plan.spec.batch_size)
        found[key] = scored.anomaly_map()
    return found


@pytest.mark.usefixtures("data")
def test_rows_of_flagged_images_say_where_and_duckdb_reads_it(tmp_path: Path) -> None:
    record = read_record("memory://data/artifact", Storage())
    peaks = record.calibration.map_peaks
    assert peaks is not None and len(peaks) == 12 and list(peaks) == sorted(peaks)
    assert peaks[-1] == record.calibration.map_high
    plan, manifest = run(f"sink.uri=file://{tmp_path}/results")
    entry = manifest["region_threshold"]
    assert entry == {"value": entry["value"], "level": 0.1, "note": ""} == plan.run["region_threshold"]
    assert peaks[-1] < entry["value"] < peaks[-1] + 1e-5  # one of thirteen may not be above
    found = rows(plan)
    flagged = [row for row in found if row["flagged"]]
    assert len(flagged) >= 5 and all(row["regions"] is None for row in found if not row["flagged"])
    assert all(row["regions_left_out"] is None for row in found if not row["flagged"])
    maps = maps_of(plan, [row["key"] for row in flagged])
    for row in flagged:
        size = (row["width"], row["height"])
        pitch = (Fraction(row["width"], 64), Fraction(row["height"], 64))
        expected = stated(maps[row["key"]], entry["value"], size, (Fraction(0), Fraction(0)), pitch)
        scores = [region.pop("peak_score") for region in expected]
        assert [{k: v for k, v in region.items() if k != "peak_score"} for region in row["regions"]] == expected
        assert [region["peak_score"] for region in row["regions"]] == pytest.approx(scores, rel=1e-6)
    count = sum(len(row["regions"]) for row in flagged)
    assert count == manifest["regions"] > 0 == manifest["regions_left_out"] and regions_text(manifest) == f"{count}"
    pattern = f"read_parquet('{tmp_path}/results/scores/**/*.parquet')"
    query = f"select key, r.x, r.peak_score from (select key, unnest(regions) as r from {pattern}) order by all"
    told = [(row["key"], region["x"], region["peak_score"]) for row in flagged for region in row["regions"]]
    assert duckdb.sql(query).fetchall() == sorted(told)


@pytest.mark.usefixtures("data")
def test_at_most_as_many_regions_as_asked_for_and_the_rest_is_counted() -> None:
    whole = rows(run("sink.uri=memory://data/whole", "flag.alpha=0.9")[0])
    plan, manifest = run("sink.uri=memory://data/cut", "flag.alpha=0.9", "sink.max_regions=1")
    cut = rows(plan)
    assert any(len(row["regions"] or ()) > 1 for row in whole)
    for row, other in zip(whole, cut, strict=True):
        expected = row["regions"] if row["regions"] is None else row["regions"][:1]
        assert other["regions"] == expected
        left_out = None if row["regions"] is None else max(0, len(row["regions"]) - 1)
        assert other["regions_left_out"] == left_out and row["regions_left_out"] in (None, 0)
    left_out = sum(row["regions_left_out"] or 0 for row in cut)
    assert manifest["regions_left_out"] == left_out > 0
    assert regions_text(manifest) == f"{manifest['regions']}; {left_out} left out by sink.max_regions"
    none, manifest = run("sink.uri=memory://data/none", "flag.alpha=0.9", "sink.max_regions=0")
    assert all(row["regions"] is row["regions_left_out"] is None for row in rows(none))
    assert regions_text(manifest) == "none, since sink.max_regions is 0"


@pytest.mark.usefixtures("data")
def test_with_a_false_discovery_rate_only_images_that_are_flagged_in_the_end_keep_theirs() -> None:
    plan, manifest = run("flag={fdr: 0.25}", "sink.uri=memory://data/fdr")
    assert manifest["region_threshold"]["note"].startswith("level 0.07692 instead of 0.01, the smallest with 12")
    written, read = rows(plan), [row for _, _, table in read_rows(plan.ledger) for row in table.to_pylist()]
    read.sort(key=lambda row: row["key"])
    assert sum(row["flagged"] for row in read) == manifest["flagged"] > 0
    for row, final in zip(written, read, strict=True):
        assert (row["regions"] is not None) == (row["p_value"] <= 0.25)
        assert final["regions"] == (row["regions"] if final["flagged"] else None)
    assert 0 < manifest["flagged"] < sum(row["regions"] is not None for row in written)


def without_peaks(uri: str) -> None:
    """Makes an artifact one of an older version."""
    body = json.loads(Storage().read(f"{uri}/artifact.json"))
    del body["calibration"]["map_peaks"]
    Storage().write(f"{uri}/artifact.json", json.dumps(body).encode())


@pytest.mark.usefixtures("data")
def test_older_artifacts_give_rows_without_regions_and_say_so_until_they_are_calibrated() -> None:
    without_peaks("memory://data/artifact")
    plan, manifest = run()
    assert any(row["flagged"] for row in rows(plan))
    assert all(row["regions"] is row["regions_left_out"] is None for row in rows(plan))
    assert manifest["region_threshold"]["value"] is None and "of an older version" in regions_text(manifest)
    pack("memory://data/more", ".tar", normal_files(12, start=400), 1)
    from tests.fitting.test_recalibrate import calibrated

    calibrated()
    plan, manifest = run("artifact=memory://data/calibrated", "sink.uri=memory://data/again")
    assert manifest["regions"] > 0 and not manifest["region_threshold"]["note"]


def test_results_of_an_older_version_are_resumed_and_read(tmp_path: Path) -> None:
    """Its artifact, records and parts know no regions."""
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()
    without_peaks("memory://data/artifact")
    sink = f"sink.uri=file://{tmp_path}"
    plan, _ = run(sink)
    new = ("regions", "regions_left_out")
    for path in (tmp_path / "scores").rglob("*.parquet"):
        pq.write_table(pq.ParquetFile(path).read().drop_columns(list(new)), path)
    for path in [*(tmp_path / "ledger").glob("*.json"), tmp_path / "run.json", tmp_path / "manifest.json"]:
        body = json.loads(path.read_text())
        for part in body.get("parts", []) if isinstance(body.get("parts"), list) else []:
            data_file = tmp_path / part["path"]
            part["bytes"], part["sha256"] = data_file.stat().st_size, ""
            for name in new:
                del part[name]
        for name in (*new, "region_threshold", "view"):
            body.pop(name, None)
        body.get("spec", {}).get("sink", {}).pop("max_regions", None)
        path.write_text(json.dumps(body))
    assert verify(plan.ledger, lambda *_: None).whole
    (tmp_path / "ledger" / "00001.json").unlink()
    (tmp_path / "manifest.json").unlink()
    again, manifest = run(sink)
    assert len(again.todo) == 1 and manifest["rows"] == 17 and verify(again.ledger, lambda *_: None).whole
    tables = [table for _, _, table in read_rows(again.ledger)]
    assert all(table.schema.equals(SCHEMA) for table in tables)
    assert all(row["regions"] is None for table in tables for row in table.to_pylist())
    pattern = f"read_parquet('{tmp_path}/scores/**/*.parquet', union_by_name=true)"
    assert duckdb.sql(f"select count(*), count(regions) from {pattern}").fetchall() == [(17, 0)]


def test_another_limit_is_another_job_and_the_usual_one_is_not_written_down() -> None:
    usual, other = spec_of(SCORE), spec_of(SCORE, "sink.max_regions=5")
    assert "max_regions" not in result_settings(public_spec(usual))["sink"]
    assert result_settings(public_spec(other))["sink"]["max_regions"] == 5
    assert result_digest(usual) != result_digest(other)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_peaks_of_all_workers_are_gathered(workers: int) -> None:
    files = normal_files(11)
    detector = load_artifact(fit_small(), Storage()).detector

    def work(group: Group) -> Calibration:
        cache = ImageCache(Preprocess((64, 64)))
        mine = [Member(name, name, data=content) for name, content in files[group.rank :: group.size]]
        for member in mine:
            cache.add_decoded(member, decode_windows(member, DecodeRules(10**6, True), cache.preprocess))
        return calibrate(detector, cache, [sorted(member.key for member in mine)], 4, group, lambda _: None)

    alone, together_ = work(Group()), together(workers, work)
    assert together_ == [together_[0]] * workers
    assert together_[0].map_peaks == pytest.approx(alone.map_peaks, rel=1e-6) and len(alone.map_peaks or ()) == 11


@pytest.mark.parametrize("peaks", [[2.0, 1.0], [1.0], ["a"], 5])
@pytest.mark.usefixtures("data")
def test_peaks_that_cannot_be_are_refused(peaks: Any) -> None:
    body = json.loads(Storage().read("memory://data/artifact/artifact.json"))
    body["calibration"]["map_peaks"] = peaks
    Storage().write("memory://data/artifact/artifact.json", json.dumps(body).encode())
    with pytest.raises(ArtifactError, match="map_peaks"):
        read_record("memory://data/artifact", Storage())
