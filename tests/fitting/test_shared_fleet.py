"""One detector fitted on all categories and calibrated for each: the artifact, its numbers, workers, refusals."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from raydetect.artifacts.fleet import category_folder, member_uri, read_index, read_records
from raydetect.artifacts.record import ArtifactRecord, read_record
from raydetect.artifacts.store import StoredDetectors, load_artifact
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.seeding import keyed_seed
from raydetect.check import find_problems
from raydetect.config import CalibrateSpec, parse_job
from raydetect.detectors._base import Batch, Detector
from raydetect.detectors._registry import build_from
from raydetect.errors import ArtifactError, SpecError
from raydetect.fitting.recalibrate import Recalibrated
from raydetect.local import jobs
from raydetect.storage import Storage
from tests.builders.archives import pack
from tests.builders.images import encode
from tests.builders.shared_fleet import (
    COUNTS,
    HELD_OUT,
    PATTERN,
    ROOT,
    fit_spec,
    make_images,
    of_category,
    picture,
    stored,
)
from tests.fitting.test_fleet_fit import _one_thread_at_a_time, fit, fit_over

__all__ = ["_one_thread_at_a_time"]
DETECTORS = ("patchcore", "stfpm")
ENSEMBLE = {"ensemble": [{"name": "patchcore"}, {"name": "stfpm"}]}


def members(artifact: str) -> dict[str, ArtifactRecord]:
    records = read_records(read_index(f"{ROOT}/{artifact}", Storage()), Storage())
    return {str(name): record for name, record in records.items()}


def scored(detector: Detector, category: str, number: int) -> tuple[float, float, float]:
    """Image score, lowest and highest pixel of one image, alone in its batch."""
    batch = torch.zeros(8, 3, 48, 48, dtype=torch.uint8)
    batch[0] = torch.from_numpy(picture(category, number).copy()).permute(2, 0, 1)
    with torch.inference_mode():
        found = detector.score(batch)
    map_HW = found.anomaly_map_BHW[0]
    return float(found.image_score_B[0]), float(map_HW.min()), float(map_HW.max())


def assert_calibrated_on(record: ArtifactRecord, values: list[tuple[float, float, float]]) -> None:
    """Compares a calibration with the values of its images, one by one."""
    scores, lows, highs = zip(*values, strict=True)
    calibration = record.calibration
    np.testing.assert_array_equal(calibration.scores, sorted(scores))
    np.testing.assert_array_equal(calibration.map_peaks, sorted(highs))  # type: ignore[arg-type]
    assert (calibration.map_low, calibration.map_high) == (min(lows), max(highs))


def keys_of(category: str, name: str = "fit") -> dict[int, str]:
    """The key of every image of a category, by its number."""
    from raydetect.archives.base import chunk_members
    from raydetect.archives.open import open_archive

    archive = open_archive(fit_spec({"uri": f"{ROOT}/{name}", "pattern": PATTERN}, "x").source, Storage())
    chunks = [chunk for s in archive.shards() for chunk in chunk_members(s, archive.read(s), 99, 1 << 30)]
    mine = [m.key for chunk in chunks for m in chunk.members if m.category == category]
    return {int(re.findall(r"(\d+)\.png", key)[0]): key for key in mine}


def by_hash(category: str) -> list[int]:
    """Numbers of a category's images in the order in which they are held out."""
    keys = keys_of(category)
    return sorted(keys, key=lambda number: keyed_seed(0, "holdout", keys[number]))


@pytest.mark.parametrize("detector", DETECTORS)
def test_tensors_are_stored_once_and_each_category_has_its_record(detector: str) -> None:
    facts = fit(fit_spec(make_images("fit"), "model", detector))
    assert facts["categories"] == 3 and facts["images"]["fitted"] == 27 and facts["images"]["held_out"] == 9
    index = read_index(f"{ROOT}/model", Storage())
    entry = index.body["tensors"]
    files = stored("model")
    folders = {f"{category_folder(name)}/artifact.json" for name in COUNTS}
    assert set(files) == {"artifact.json", entry["file"], *folders} and index.is_shared
    assert files[entry["file"]] == entry["bytes"]
    assert index.body["format_version"] == 2 and index.body["detector"] == detector
    for name, record in members("model").items():
        assert record.body["tensors"] == {**entry, "shared": True} and record.body["format_version"] == 4
        images = {"fitted": COUNTS[name] - HELD_OUT[name], "held_out": HELD_OUT[name]}
        assert record.body["images"] == {**images, "labelled_anomalous_left_out": 0, "bad": 0}


@pytest.mark.parametrize("detector", DETECTORS)
def test_each_calibration_is_that_of_a_job_calibrated_on_the_category_alone(detector: str) -> None:
    source, held = make_images("fit"), make_images("held", 500, {"cable": 4, "Hex nut": 6, "bolt": 5})
    pack(f"{ROOT}/stray", ".tar", [("screw/train/good/0.png", encode(picture("bolt", 900)))], 1)
    both = {**held, "uri": [held["uri"], f"{ROOT}/stray"]}
    fit(fit_spec(source, "model", detector, calibration={"source": both}))
    found = members("model")
    assert set(found) == set(COUNTS)  # a category that is only calibrated on is not one of the detector's
    for category, record in found.items():
        alone = {"source": of_category(held, category)}
        fit(fit_spec(source, f"alone-{category}", detector, per_category=False, calibration=alone))
        plain = read_record(f"{ROOT}/alone-{category}", Storage())
        assert plain.body["tensors"]["sha256"] == record.body["tensors"]["sha256"]
        assert plain.body["calibration"] == record.body["calibration"]
        assert record.body["images"]["fitted"] == COUNTS[category]


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_are_held_out_within_each_category_and_scored_by_the_detector_of_all(detector: str) -> None:
    fit(fit_spec(make_images("fit"), "model", detector))
    for category, record in members("model").items():
        loaded = load_artifact(member_uri(f"{ROOT}/model", category), Storage()).detector
        held_out = by_hash(category)[: HELD_OUT[category]]
        assert_calibrated_on(record, [scored(loaded, category, number) for number in held_out])


def test_folds_are_dealt_within_each_category() -> None:
    spec = fit_spec(make_images("fit"), "model", calibration={"method": "cross", "folds": 3})
    assert fit(spec)["folds"] == 3
    orders = {category: by_hash(category) for category in COUNTS}
    values: dict[str, list[tuple[float, float, float]]] = {category: [] for category in COUNTS}
    for fold in range(3):
        detector = build_from(spec.detector, 0)
        detector.load_weights()
        state = FitState()
        for category, order in orders.items():
            keys = keys_of(category)
            for number in set(order) - set(order[fold::3]):
                batch = torch.zeros(8, 3, 48, 48, dtype=torch.uint8)
                batch[0] = torch.from_numpy(picture(category, number).copy()).permute(2, 0, 1)
                with torch.inference_mode():
                    rows = detector.collect(Batch(batch, [keys[number], *[""] * 7]))
                state.add([keys[number]], {kind: rows_BRD[:1] for kind, rows_BRD in rows.items()})
        detector.finish(state, lambda *_: None)
        for category, order in orders.items():
            values[category] += [scored(detector, category, number) for number in order[fold::3]]
    for category, record in members("model").items():
        assert_calibrated_on(record, values[category])
        assert record.body["images"]["fitted"] == record.body["images"]["held_out"] == COUNTS[category]


def test_the_category_with_the_fewest_images_decides_between_folds_and_held_out_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raydetect.fitting.holdout.FEW_IMAGES", 10)
    source = make_images("fit", 0, {"cable": 9, "bolt": 16})
    assert fit(fit_spec(source, "model", calibration={"folds": 5}))["folds"] == 5  # cable: 9 < 10
    source = make_images("more", 0, {"cable": 10, "bolt": 16})
    assert "folds" not in fit(fit_spec(source, "model", calibration={}))


@pytest.mark.parametrize(
    "calibration", [{"holdout_ratio": 0.25}, {"method": "cross", "folds": 3}], ids=["holdout", "cross"]
)
def test_any_number_of_workers_gives_the_same_artifact(calibration: dict[str, Any]) -> None:
    source, found = make_images("fit"), []
    for size in (1, 2, 3):
        fit_over(fit_spec(source, f"over-{size}", calibration=calibration), size)
        records = members(f"over-{size}")
        entries = ("tensors", "calibration", "images")
        found.append({name: [record.body[entry] for entry in entries] for name, record in records.items()})
    assert list(found[0]) == sorted(COUNTS) and found[0] == found[1] == found[2]


def test_tiles_of_a_picture_are_held_out_together_and_counted_for_its_category() -> None:
    view = {"tile": {"size": [32, 32], "overlap": 8}}
    found = []
    for size in (1, 2):
        fit_over(fit_spec(make_images("fit"), f"tiled-{size}", view=view), size)
        found.append({name: record.body for name, record in members(f"tiled-{size}").items()})
    for name, body in found[0].items():
        fitted = COUNTS[name] - HELD_OUT[name]
        assert (body["images"]["fitted"], body["images"]["fitted_tiles"]) == (fitted, 4 * fitted)
        assert body["calibration"] == found[1][name]["calibration"] and body["images"] == found[1][name]["images"]


def test_a_training_that_was_killed_goes_on_from_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fit_spec(make_images("fit"), "whole", "stfpm", checkpoint_epochs=1)
    whole = fit(spec)
    again = fit_spec(make_images("fit"), "killed", "stfpm", checkpoint_epochs=1)
    with monkeypatch.context() as broken:
        broken.setattr("raydetect.fitting.fit_run.calibrate_each", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(again)
    assert not Storage().exists(f"{ROOT}/killed/artifact.json")
    facts = fit(again)
    assert facts["resumed_epochs"] > 0 and facts["losses"] == whole["losses"]
    one, two = (
        {name: (r.body["tensors"], r.body["calibration"]) for name, r in members(n).items()}
        for n in ("whole", "killed")
    )
    assert one == two and len(stored("killed")) == 5  # the checkpoints are deleted


def calibrated(**changes: Any) -> Recalibrated:
    values = {"kind": "calibrate", "artifact": f"{ROOT}/model", "output": f"{ROOT}/new", **changes}
    spec = parse_job(values, "job")
    assert isinstance(spec, CalibrateSpec)
    return jobs.calibrate(spec, lambda *_: None)


def test_a_new_calibration_is_of_each_category_and_copies_the_tensors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fit(fit_spec(make_images("fit"), "model"))
    counts, loads = {"cable": 4, "Hex nut": 6, "bolt": 5}, list[str]()
    more = make_images("more", 500, counts)

    def counted(uri: str, *rest: Any) -> Any:
        loads.append(uri)
        return load_artifact(uri, *rest)

    monkeypatch.setattr("raydetect.fitting.recalibrate.load_artifact", counted)
    made = calibrated(source=more)
    assert made.held_out == counts and len(loads) == 1
    tensors = {name for name in stored("new") if name.endswith(".safetensors")}
    assert tensors == {members("model")["bolt"].body["tensors"]["file"]}
    detector = load_artifact(member_uri(f"{ROOT}/new", "bolt"), Storage()).detector
    for category, record in members("new").items():
        values = [scored(detector, category, 500 + i) for i in range(counts[category])]
        assert_calibrated_on(record, values)
        assert record.body["lineage"][0]["digest"] == members("model")[category].digest
    calibrated(source=more, output=f"{ROOT}/model")
    assert {name: r.calibration for name, r in members("model").items()} == {
        name: r.calibration for name, r in members("new").items()
    }
    assert len(stored("model")) == len(stored("new")) == 5


def test_one_category_can_become_an_artifact_of_its_own() -> None:
    fit(fit_spec(make_images("fit"), "model"))
    uri = member_uri(f"{ROOT}/model", "bolt")
    more = of_category(make_images("more", 500), "bolt")
    calibrated(artifact=uri, source=more)
    record = read_record(f"{ROOT}/new", Storage())
    assert "shared" not in record.body["tensors"] and record.body["format_version"] == 2
    assert len(stored("new")) == 2 and load_artifact(f"{ROOT}/new", Storage()).record.digest == record.digest
    from raydetect import create_model

    model = create_model.load(uri)
    model.save(f"{ROOT}/saved")
    saved = read_record(f"{ROOT}/saved", Storage())
    assert saved.calibration == members("model")["bolt"].calibration and saved.body["format_version"] == 2
    again = create_model.load(f"{ROOT}/saved")
    assert model.p_values([picture("bolt", 3)]) == again.p_values([picture("bolt", 3)])
    fit(fit_spec(more, "longer", per_category=False, extend=uri))
    assert len(stored("longer")) == 2 and read_record(f"{ROOT}/longer", Storage()).body["lineage"]


def rewrite(uri: str, **changes: Any) -> None:
    body = json.loads(Storage().read(f"{uri}/artifact.json"))
    Storage().write(f"{uri}/artifact.json", json.dumps({**body, **changes}).encode())


def consistent(category: str) -> None:
    """Gives the index the digest of a member that was changed, as somebody who forges both would."""
    index = json.loads(Storage().read(f"{ROOT}/model/artifact.json"))
    index["categories"][category]["digest"] = read_record(member_uri(f"{ROOT}/model", category), Storage()).digest
    rewrite(f"{ROOT}/model", **index)


def test_members_that_are_missing_or_do_not_share_the_detector_are_refused() -> None:
    fit(fit_spec(make_images("fit"), "model"))
    kept = {name: bytes(Storage().read(f"{ROOT}/model/{name}")) for name in stored("model")}
    bolt, tensors = member_uri(f"{ROOT}/model", "bolt"), members("model")["bolt"].body["tensors"]

    def refused(message: str) -> None:
        with pytest.raises(ArtifactError, match=message):
            members("model")
        for name, data in kept.items():
            Storage().write(f"{ROOT}/model/{name}", data)

    Storage().delete(f"{bolt}/artifact.json")
    refused("category 'bolt': no artifact")
    rewrite(bolt, seed=5)
    refused("category 'bolt': .* has the digest")
    rewrite(bolt, seed=5)
    consistent("bolt")
    refused("category 'bolt': its record has other seed than the detector that all categories share")
    rewrite(bolt, tensors={**tensors, "sha256": "0" * 64})
    consistent("bolt")
    refused("category 'bolt': its record has other tensors")
    rewrite(bolt, preprocess={"jpeg_scale": "full"})
    consistent("bolt")
    refused("other preprocess")
    rewrite(f"{ROOT}/model", tensors={**tensors, "sha256": "0" * 64})
    refused("other tensors than the detector")
    rewrite(f"{ROOT}/model", tensors=[1])
    refused("tensors: ")
    Storage().delete(f"{ROOT}/model/{tensors['file']}")
    refused("is missing. Fit again or copy the file again")
    Storage().write(f"{ROOT}/apart/artifact.json", kept[f"{category_folder('bolt')}/artifact.json"])
    with pytest.raises(ArtifactError, match=r"the folder is not in one\. Copy the whole fleet"):
        load_artifact(f"{ROOT}/apart", Storage())
    Storage().write(f"{ROOT}/model/{tensors['file']}", b"x" * tensors["bytes"])
    index = read_index(f"{ROOT}/model", Storage())
    with pytest.raises(ArtifactError):
        StoredDetectors(index, Storage()).load(index.categories["bolt"])


def test_too_few_images_of_a_category_are_one_sentence_that_names_it() -> None:
    source = make_images("fit")
    lone = encode(picture("bolt", 40))
    pack(f"{ROOT}/lone", ".tar", [("lone/train/good/0.png", lone)], 1)
    pack(f"{ROOT}/broken", ".tar", [("worn/train/scratch/0.png", lone)], 1)
    for calibration in ({}, {"holdout_ratio": 0.25}, {"method": "cross"}):
        with pytest.raises(SpecError, match=r"category 'lone': has 1 usable normal image\(s\)"):
            fit(fit_spec({**source, "uri": [source["uri"], f"{ROOT}/lone"]}, "model", calibration=calibration))
    with pytest.raises(SpecError, match="category 'worn' has no usable normal image to fit on"):
        fit(fit_spec({**source, "uri": [source["uri"], f"{ROOT}/broken"]}, "model"))
    with pytest.raises(SpecError, match=r"36 image\(s\) have no category"):
        fit(fit_spec({"uri": source["uri"]}, "model"))
    held = make_images("held", 500, {"cable": 4, "bolt": 5})
    with pytest.raises(SpecError, match="no usable normal image of category 'Hex nut'"):
        fit(fit_spec(source, "model", calibration={"source": held}))
    assert not Storage().exists(f"{ROOT}/model/artifact.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extend": f"{ROOT}/other"}, "fit again on all images for per_category: calibration"),
        ({"view": {"region": "memory://a/{category}.png"}}, "has one view; set per_category: true, or name one file"),
        ({"view": {"align_to": "memory://a/{category}.png", "align": "phase"}}, "has one view; set per_category: true"),
        ({"detector": ENSEMBLE}, "takes one detector"),
        ({"per_category": "calibrate"}, "should be true or false or 'calibration'"),
        ({"calibration": {"method": "cross"}, "detector": {"name": "stfpm"}}, "stfpm trains"),
    ],
)
def test_what_one_detector_for_all_cannot_do_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        problems = find_problems(fit_spec(make_images("fit"), "model", **changes))
        raise SpecError(" ".join(problems))
