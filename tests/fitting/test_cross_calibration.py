"""Calibration by folds: every normal image is scored by a fit that has not seen it, and the last fit sees all."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raydetect.archives.base import chunk_members
from raydetect.archives.open import open_archive
from raydetect.artifacts.record import ArtifactRecord, read_record
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.seeding import keyed_seed
from raydetect.check import find_problems
from raydetect.config import FEW_IMAGES, CalibrationSpec, FitSpec, parse_job
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.fitting.fit_run import FitRun
from raydetect.fitting.holdout import choose_folds, crosses
from raydetect.local import jobs
from raydetect.storage import Storage
from tests.builders.archives import pack
from tests.builders.group import together
from tests.builders.images import encode, normal_image
from tests.contracts.cases import CASES, Case
from tests.views.test_tiled_fits import COLLECTED, _one_thread_at_a_time, fit_over

__all__ = ["_one_thread_at_a_time"]
FITTED = "memory://cross/normal"
TRAINED = next(case for case in CASES if case.name == "stfpm")
PATCHCORE = next(case for case in CASES if case.name == "patchcore")
IMAGES = 11


def spec_of(case: Case = PATCHCORE, artifact: str = "one", **changes: Any) -> FitSpec:
    values = {
        "kind": "fit",
        "source": {"uri": FITTED},
        "detector": {"name": case.name, "preset": "smoke", "params": case.brief()},
        "artifact": f"memory://cross/{artifact}",
        "calibration": {"method": "cross", "folds": 3},
        "batch_size": 4,
        **changes,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    return spec


def fitted(spec: FitSpec) -> ArtifactRecord:
    jobs.fit(spec, lambda *_: None)
    return read_record(spec.artifact, Storage())


@pytest.fixture(autouse=True)
def _normal() -> None:
    files = [(f"{i:03d}.png", encode(normal_image(i, 64))) for i in range(IMAGES)]
    pack(FITTED, ".tar", files, 3)


@pytest.mark.parametrize("case", COLLECTED, ids=lambda case: case.id)
def test_the_scores_are_those_of_fits_without_the_image(case: Case) -> None:
    """Each fold by hand: rows of all other images, a new detector, the scores of the fold."""
    record = fitted(spec_of(case))
    images = {f"{i:03d}.png": torch.from_numpy(normal_image(i, 64)).permute(2, 0, 1) for i in range(IMAGES)}
    shard_of = {name: key for key in _keys() for name in [key.partition("#")[2]]}
    by_hash = sorted(images, key=lambda name: _signed(keyed_seed(0, "holdout", shard_of[name])))
    scores, peaks = [], []
    for fold in range(3):
        left_out = by_hash[fold::3]
        detector = build_from(spec_of(case).detector, 0)
        detector.load_weights()
        state = FitState()
        wanted = detector.num_collected()
        others = [name for name in images if name not in left_out]
        if wanted is not None:
            others = sorted(others, key=lambda name: _signed(keyed_seed(0, "collected", shard_of[name])))[:wanted]
        with torch.inference_mode():
            for name in others:
                batch = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
                batch[0] = images[name]
                rows = detector.collect(Batch(batch, [shard_of[name], "", "", ""]))
                state.add([shard_of[name]], {kind: rows_BRD[:1] for kind, rows_BRD in rows.items()})
            detector.finish(state, lambda *_: None)
            for name in left_out:
                batch = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
                batch[0] = images[name]
                found = detector.score(batch)
                scores.append(float(found.image_score_B[0]))
                peaks.append(float(found.anomaly_map_BHW[0].max()))
    np.testing.assert_array_equal(record.calibration.scores, sorted(scores))
    assert record.calibration.map_peaks is not None
    np.testing.assert_array_equal(record.calibration.map_peaks, sorted(peaks))
    assert record.body["images"]["fitted"] == record.body["images"]["held_out"] == IMAGES
    assert record.body["folds"] == 3


def _keys() -> list[str]:
    spec = spec_of()
    archive = open_archive(spec.source, Storage())
    return [m.key for s in archive.shards() for c in chunk_members(s, archive.read(s), 99, 1 << 30) for m in c.members]


def _signed(seed: int) -> int:
    return int(torch.tensor([seed], dtype=torch.int64)[0])


@pytest.mark.parametrize("case", COLLECTED, ids=lambda case: case.id)
def test_the_last_fit_is_that_on_all_images(case: Case) -> None:
    crossed = fitted(spec_of(case, "crossed"))
    plain = fitted(spec_of(case, "plain", calibration={"source": {"uri": FITTED}}))
    assert crossed.body["tensors"]["sha256"] == plain.body["tensors"]["sha256"]
    assert "folds" not in plain.body
    assert crossed.calibration.scores != plain.calibration.scores or case.name == "winclip"


@pytest.mark.parametrize("case", COLLECTED, ids=lambda case: case.id)
def test_the_artifact_is_the_same_for_any_number_of_workers(case: Case) -> None:
    bodies = []
    for size in (1, 2, 4):
        fit_over(spec_of(case, f"over-{size}"), size)
        bodies.append(read_record(f"memory://cross/over-{size}", Storage()).body)
    for body in bodies[1:]:
        assert (body["tensors"], body["calibration"]) == (bodies[0]["tensors"], bodies[0]["calibration"])
        assert (body["images"], body["folds"]) == (bodies[0]["images"], 3)


@pytest.mark.parametrize(("images", "folds"), [(2, 5), (3, 3), (10, 4), (101, 5)])
def test_folds_are_even_and_leave_every_image_out_once(images: int, folds: int) -> None:
    keys = [f"k{i}" for i in range(images)]
    alone = choose_folds(keys, folds, 7, Group(), "here")
    assert sorted(itertools.chain(*alone)) == sorted(keys)
    assert len(alone) == min(images, folds)
    assert max(map(len, alone)) - min(map(len, alone)) <= 1
    shares = together(3, lambda group: choose_folds(keys[group.rank :: 3], folds, 7, group, "here"))
    assert [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == [sorted(fold) for fold in alone]
    assert images < 10 or choose_folds(keys, folds, 8, Group(), "here") != alone


def test_one_image_is_too_few() -> None:
    with pytest.raises(SpecError, match=r"here: has 1 usable normal image"):
        choose_folds(["k"], 5, 0, Group(), "here")


def test_all_tiles_of_an_image_are_left_out_together() -> None:
    files = [(f"{i:03d}.png", encode(normal_image(i, 96)[:64])) for i in range(6)]
    pack("memory://cross/wide", ".tar", files, 2)
    spec = spec_of(source={"uri": "memory://cross/wide"}, view={"tile": {"overlap": 16}}, artifact="tiles")
    seen: list[tuple[set[str], set[str]]] = []
    rounds = FitRun._rounds

    def noted(work: FitRun, detector: Any, state: FitState, folds: Any, by_fold: Any) -> Any:
        for fold, inputs in zip(folds, by_fold, strict=True):
            seen.append((set(fold), {work.cache.images[key].image_key for key in inputs}))
        return rounds(work, detector, state, folds, by_fold)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitRun, "_rounds", noted)
        record = fitted(spec)
    assert [len(left_out) for left_out, _ in seen] == [2, 2, 2]
    assert all(not left_out & kept and len(left_out | kept) == 6 for left_out, kept in seen)
    assert record.body["images"]["fitted"] == record.body["images"]["held_out"] == 6
    assert record.body["images"]["fitted_tiles"] == record.body["images"]["held_out_tiles"] == 12


@pytest.mark.parametrize(
    ("case", "calibration", "images", "expected"),
    [
        (PATCHCORE, {}, FEW_IMAGES - 1, True),
        (PATCHCORE, {}, FEW_IMAGES, False),
        (PATCHCORE, {"holdout_ratio": 0.1}, 20, False),
        (PATCHCORE, {"method": "holdout"}, 20, False),
        (PATCHCORE, {"source": {"uri": FITTED}}, 20, False),
        (PATCHCORE, {"method": "cross"}, 10 * FEW_IMAGES, True),
        (TRAINED, {}, 20, False),
    ],
)
def test_the_default_depends_on_the_detector_and_the_number_of_images(
    case: Case, calibration: dict[str, Any], images: int, expected: bool
) -> None:
    spec = spec_of(case, calibration=calibration)
    assert crosses(spec, build_from(spec.detector, 0), images) is expected


def test_an_extended_bank_and_an_ensemble_hold_images_out() -> None:
    extended = spec_of(extend="memory://cross/one", calibration={})
    assert not crosses(extended, build_from(extended.detector, 0), 20)
    member = {"name": "patchcore", "preset": "smoke"}
    both = spec_of(detector={"ensemble": [member, {**member, "params": {"n_neighbors": 1}}]}, calibration={})
    assert not crosses(both, build_from(both.detector, 0), 20)
    for spec, reason in ((extended, "a bank that is extended"), (both, "an ensemble sets the scale")):
        asked = replace(spec, calibration=CalibrationSpec(method="cross"))
        with pytest.raises(SpecError, match=reason):
            crosses(asked, build_from(asked.detector, 0), 20)


def test_a_detector_that_trains_refuses_folds_before_the_fit() -> None:
    problems = "\n".join(str(problem) for problem in find_problems(spec_of(TRAINED)))
    assert "calibration.method: cross: stfpm trains, and would be trained 4 times. Set method: holdout." in problems


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"method": "cross", "holdout_ratio": 0.2}, "remove holdout_ratio"),
        ({"method": "cross", "source": {"uri": FITTED}}, "remove method"),
        ({"method": "holdout", "folds": 4}, "folds applies to method: cross"),
        ({"method": "leave-one-out"}, "cross"),
        ({"folds": 1}, "folds"),
    ],
)
def test_contradicting_settings_are_refused(calibration: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(calibration=calibration)


def test_it_calibrates_as_many_p_values_as_there_are_images() -> None:
    spec = spec_of(calibration={})
    record = fitted(spec)
    assert record.body["folds"] == 5
    assert len(record.calibration.scores) == IMAGES
