"""Ensembles: the common scale against numpy, laws of the mean, honest thresholds, one artifact like any other."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raydetect import Estimator, create_ensemble, create_model
from raydetect.artifacts.fleet import read_index, read_records
from raydetect.artifacts.record import read_record
from raydetect.artifacts.store import load_artifact
from raydetect.blocks.coresets.group import Group
from raydetect.check import find_problems
from raydetect.cli.main import main
from raydetect.config import FitSpec, MemberSpec, parse_job
from raydetect.detectors._base import Detector, DetectorInfo, NotFittedError, Scores
from raydetect.detectors._ensemble import Ensemble, Scale, common, median
from raydetect.detectors.patchcore import PatchCore
from raydetect.detectors.stfpm import STFPM
from raydetect.errors import ArtifactError, SpecError
from raydetect.fitting.calibrate import CalibrationError, calibrate
from raydetect.fitting.ensemble_scale import MOST_IMAGES, choose_scaling, set_scales
from raydetect.fitting.holdout import choose_holdout
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.images.preprocess import Preprocess
from raydetect.local import jobs
from raydetect.metrics.conformal import p_values
from raydetect.planning.plan import plan_score
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.group import together
from tests.builders.images import DEFECTS, defect_image, normal_image
from tests.fitting.test_fleet_fit import _one_thread_at_a_time, fit_over  # noqa: F401 (a fixture)
from tests.whole_jobs.runs import rows_of

pytestmark = pytest.mark.usefixtures("one_thread")

BANK = {
    "name": "patchcore",
    "preset": "smoke",
    "params": {"weights": "random", "image_size": [48, 48], "layers": ["layer1"]},
}
DEEPER = {**BANK, "params": {**BANK["params"], "layers": ["layer2"]}}  # type: ignore[dict-item]
STUDENT = {
    "name": "stfpm",
    "preset": "smoke",
    "params": {"weights": "random", "image_size": [48, 48], "epochs": 3, "batch_size": 8},
}
QUICK = {**STUDENT, "params": {**STUDENT["params"], "epochs": 1}}  # type: ignore[dict-item]


def model(word: Mapping[str, Any], seed: int = 0) -> Estimator:
    return create_model(word["name"], word["preset"], seed, **word["params"]).configure(batch_size=8)


def ensemble(*words: Mapping[str, Any], weights: Any = None, seed: int = 0) -> Estimator:
    return create_ensemble([model(word) for word in words], weights, seed).configure(batch_size=8)


def images(count: int = 24, start: int = 0) -> np.ndarray:
    return np.stack([normal_image(start + i, 48) for i in range(count)])


def mixed_images() -> np.ndarray:
    return np.stack([*images(6, 700), *(defect_image(i, DEFECTS[i % 3], 48)[0] for i in range(6))])


def job(detector: Any, artifact: str, **changes: Any) -> FitSpec:
    values = {
        "kind": "fit",
        "source": {"uri": "memory://ensemble/normal"},
        "detector": detector,
        "artifact": artifact,
        "batch_size": 8,
        "calibration": {"holdout_ratio": 0.5},
        **changes,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    return spec


def fit(spec: FitSpec) -> dict[str, Any]:
    return dict(jobs.fit(spec, lambda *_: None).facts)


def scores_of(found: Estimator) -> tuple[np.ndarray, np.ndarray]:
    maps = found.predict_anomaly_map(mixed_images())
    assert isinstance(maps, np.ndarray)
    return found.predict_proba(mixed_images()), maps


# -- the common scale ------------------------------------------------------------------------------------------------


def test_scale_and_mean_are_those_of_numpy() -> None:
    """From the members' raw scores, fitted alone on the same images, by the formula."""
    both = ensemble(BANK, STUDENT, weights=[3, 1]).fit(images(), holdout_ratio=0.5)
    keys = [f"array#{i:06d}" for i in range(24)]
    held_out = sorted(choose_holdout(keys, 0.5, 0, Group(), "x"))
    scaling, calibration = choose_scaling(held_out, 0, Group())
    mean, mean_map = np.zeros(12), np.zeros((12, 48, 48))
    for share, word in ((0.75, BANK), (0.25, STUDENT)):
        alone = model(word).fit(images(), holdout_ratio=0.5)
        numbers = [keys.index(key) for key in scaling]
        raw = alone.predict_proba(images()[numbers]).astype(np.float64)
        maps = np.asarray(alone.predict_anomaly_map(images()[numbers])).astype(np.float64)
        spread = 1.4826 * np.median(np.abs(raw - np.median(raw)))
        centre = np.median([np.median(each) for each in maps])
        reach = np.median([each.max() - centre for each in maps])
        mean += share * np.arcsinh((alone.predict_proba(mixed_images()) - np.median(raw)) / spread)
        mean_map += share * np.arcsinh((np.asarray(alone.predict_anomaly_map(mixed_images())) - centre) / reach)
    scores, found_maps = scores_of(both)
    np.testing.assert_allclose(scores, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_maps, mean_map, rtol=1e-4, atol=1e-5)
    own = both.predict_proba(images()[[keys.index(key) for key in calibration]]).astype(np.float64)
    assert sorted(own.tolist()) == list(both._require_fitted().calibration.scores)


def test_a_pixel_of_normal_ground_is_0_and_the_highest_of_a_normal_image_asinh_of_1() -> None:
    found = ensemble(BANK).fit(images(40), holdout_ratio=0.5)
    maps = np.asarray(found.predict_anomaly_map(images(30, 900)))
    assert abs(np.median(maps)) < 0.3 and np.median(maps.max((1, 2))) == pytest.approx(np.arcsinh(1), abs=0.3)


FLOATS = st.floats(-1e6, 1e6, width=32)


@given(st.lists(FLOATS, min_size=2, max_size=30, unique=True), FLOATS, st.floats(1e-6, 1e6))
def test_the_scale_reverses_no_order(values: list[float], centre: float, spread: float) -> None:
    ordered = torch.tensor(sorted(values), dtype=torch.float32)
    found = common(ordered, centre, spread)
    assert found.dtype == torch.float64 and (found.float().diff() >= 0).all()
    clear = ordered.double().diff() > 1e-12 * (ordered[1:].abs() + abs(centre))
    assert (found.diff()[clear] > 0).all()


@settings(max_examples=50)
@given(st.lists(FLOATS, min_size=7, max_size=40), st.integers(0, 1000))
def test_a_few_odd_images_do_not_move_the_scale_out_of_the_range_of_the_others(values: list[float], seed: int) -> None:
    odd = len(values) // 4
    plain = torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, 3).clone()
    spoilt = plain.clone()
    spoilt[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:odd]] = 1e30
    kept = spoilt[spoilt[:, 0] < 1e29]
    scale = Scale.of(spoilt)
    low, high = float(kept.min()), float(kept.max())
    assert low <= scale.centre <= high and low <= scale.map_centre <= high and scale.map_spread <= high - low
    assert scale.spread <= 1.4826 * (high - low) + 1e-9 or median((spoilt[:, 0] - scale.centre).abs()) == 0


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_the_median_is_that_of_numpy(values: list[float]) -> None:
    assert median(torch.tensor(values, dtype=torch.float64)) == pytest.approx(np.median(values), abs=1e-9)


# -- laws of the mean ------------------------------------------------------------------------------------------------


def test_the_order_of_members_does_not_matter() -> None:
    orders = (BANK, DEEPER, QUICK), (QUICK, DEEPER, BANK)
    found = [ensemble(*words).fit(images(), holdout_ratio=0.5) for words in orders]
    for one, other in zip(scores_of(found[0]), scores_of(found[1]), strict=True):
        assert (one == other).all()
    assert found[0]._require_fitted().calibration == found[1]._require_fitted().calibration
    weighted = [
        ensemble(BANK, QUICK, weights=[5, 1]).fit(images(), holdout_ratio=0.5),
        ensemble(QUICK, BANK, weights=[1, 5]).fit(images(), holdout_ratio=0.5),
    ]
    assert (scores_of(weighted[0])[0] == scores_of(weighted[1])[0]).all()
    assert (scores_of(weighted[0])[0] != scores_of(found[0])[0]).any()


def test_only_the_ratios_of_weights_matter_and_a_heavy_one_decides() -> None:
    found = ensemble(BANK, QUICK, weights=[2, 1]).fit(images(), holdout_ratio=0.5)._require_fitted().detector
    assert isinstance(found, Ensemble)
    batch = torch.from_numpy(mixed_images()).permute(0, 3, 1, 2)

    def scored(*weights: float, members: slice = slice(None)) -> Scores:
        """The same fitted members under other weights."""
        specs = found.params.members[members]
        made = Ensemble(replace(found.params, members=specs, weights=weights), found.members[members])
        made.scales = found.scales[members]
        return made.score(batch)

    expected = found.score(batch)
    for weights in ((2, 1), (4, 2), (0.5, 0.25)):
        assert torch.equal(scored(*weights).image_score_B, expected.image_score_B)
        assert torch.equal(scored(*weights).anomaly_map_BHW, expected.anomaly_map_BHW)
    torch.testing.assert_close(scored(0.2, 0.1).image_score_B, expected.image_score_B, rtol=1e-6, atol=1e-7)
    assert not torch.equal(scored(1, 1).image_score_B, expected.image_score_B)
    alone = scored(1, members=slice(1))
    torch.testing.assert_close(scored(1, 1e-9).image_score_B, alone.image_score_B, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(scored(1, 1e-9).anomaly_map_BHW, alone.anomaly_map_BHW, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("word", [BANK, STUDENT], ids=["patchcore", "stfpm"])
def test_an_ensemble_of_one_ranks_images_and_pixels_as_its_member(word: dict[str, Any]) -> None:
    one, alone = (made.fit(images(), holdout_ratio=0.5) for made in (ensemble(word), model(word)))
    for found, expected in zip(scores_of(one), scores_of(alone), strict=True):
        order = np.argsort(expected.ravel(), kind="stable")
        assert (np.diff(found.ravel()[order]) >= 0).all()
        assert len(np.unique(found)) > 0.9 * len(np.unique(expected))  # float32 makes few ties
    tensors = one._require_fitted().detector.tensors()
    for name, value in alone._require_fitted().detector.tensors().items():
        assert torch.equal(tensors[f"0.{name}"], value), name


# -- thresholds are honest -------------------------------------------------------------------------------------------


class Brightness(Detector):
    """Scores the mean of one colour, and has no weights."""

    info = DetectorInfo(title="Brightness", paper="-", venue="-", summary="-")
    phases = ()

    def __init__(self, channel: int, params: Detector.Params, constant: bool = False) -> None:
        super().__init__(params)
        self.channel, self.constant = channel, constant

    def load_weights(self) -> str:
        return "from scratch"

    def score(self, images_BCHW: Tensor) -> Scores:
        map_BHW = images_BCHW[:, self.channel].float() * (not self.constant)
        return Scores(map_BHW.mean((1, 2)), map_BHW)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """None."""

    def to(self, device: torch.device) -> "Brightness":
        return self


class Blind(Brightness):
    """Knows no places."""

    info = replace(Brightness.info, localises=False)


def of(*members: Brightness, weights: tuple[float, ...] | None = None) -> Ensemble:
    specs = tuple(MemberSpec(name=f"colour-{member.channel}") for member in members)
    params = Ensemble.Params(image_size=(4, 4), members=specs, weights=weights or (1.0,) * len(members))
    return Ensemble(params, members)


SMALL = Detector.Params(image_size=(4, 4))


def filled(count: int, seed: int) -> ImageCache:
    """Noise of a brightness that differs from image to image, with heavy tails."""
    random = np.random.default_rng(seed)
    cache = ImageCache(Preprocess((4, 4)))
    for i in range(count):
        level = np.clip(128 + 12 * random.standard_t(2, size=3), 0, 255)
        noise = random.normal(0, 2, (4, 4, 3))
        cache.add(CachedImage(f"{i:04d}", 0, None), np.clip(level + noise, 0, 255).astype(np.uint8))
    return cache


def calibrated(cache: ImageCache, keys: list[str], seed: int = 0, group: Group | None = None) -> tuple[Ensemble, Any]:
    group = group or Group()
    found = of(Brightness(0, SMALL), Brightness(1, SMALL), Brightness(2, SMALL))
    scaling, calibration = choose_scaling(keys, seed, group)
    set_scales(found, cache, scaling, 8, group, lambda _: None)
    return found, calibrate(found, cache, [calibration], 8, group, lambda _: None)


def test_normal_images_are_flagged_as_rarely_as_promised() -> None:
    """Over many fits on 3 + 3 held-out images. A scale by the images of the threshold would flag 27.4 %, not 25 %."""
    trials, fresh, below = 800, 8, 0
    for trial in range(trials):
        cache = filled(6 + fresh, trial)
        keys = sorted(cache.images)
        found, calibration = calibrated(cache, keys[:6])
        assert len(calibration.scores) == 3
        batch = cache.batch(keys[6:], torch.device("cpu")).images_BCHW
        values = p_values(np.array(calibration.scores), found.score(batch).image_score_B.double().numpy())
        below += int((values <= 0.25).sum())
    assert 0.23 < below / (trials * fresh) < 0.26


def test_scale_and_threshold_have_images_of_their_own_chosen_by_key() -> None:
    keys = [f"{i:04d}" for i in range(41)]
    scaling, calibration = choose_scaling(keys, 0, Group())
    assert len(scaling) == 20 and sorted(scaling + calibration) == keys
    assert choose_scaling(keys[::-1], 0, Group())[0] == scaling
    assert choose_scaling(keys, 1, Group())[0] != scaling
    many = [f"{i:04d}" for i in range(500)]
    assert len(choose_scaling(many, 0, Group())[0]) == MOST_IMAGES
    held_out = choose_holdout(many, 0.5, 0, Group(), "x")
    inside = len(set(choose_scaling(sorted(held_out), 0, Group())[0]) & set(choose_scaling(many, 0, Group())[0]))
    assert inside < MOST_IMAGES  # another purpose is another order


@pytest.mark.parametrize("size", [2, 3])
def test_scale_and_threshold_are_the_same_on_any_number_of_workers(size: int) -> None:
    cache = filled(31, 5)
    keys = sorted(cache.images)
    alone, calibration = calibrated(cache, keys)

    def work(group: Group) -> tuple[Any, Any]:
        found, mine = calibrated(cache, keys[group.rank :: group.size], group=group)
        return found.scales, mine

    for scales, mine in together(size, work):
        assert scales == alone.scales and mine == calibration


def test_members_that_do_not_localise_leave_the_map_to_the_others() -> None:
    cache = filled(12, 1)
    keys = sorted(cache.images)
    batch = cache.batch(keys, torch.device("cpu")).images_BCHW
    seeing, blind = Brightness(0, SMALL), Blind(1, SMALL)
    both, one, none = of(seeing, blind, weights=(1, 3)), of(seeing), of(blind)
    for made in (both, one, none):
        set_scales(made, cache, keys, 8, Group(), lambda _: None)
    assert torch.equal(both.score(batch).anomaly_map_BHW, one.score(batch).anomaly_map_BHW)
    assert not torch.equal(both.score(batch).image_score_B, one.score(batch).image_score_B)
    alone = none.score(batch)
    assert torch.equal(alone.anomaly_map_BHW, alone.image_score_B[:, None, None].expand(-1, 4, 4))


def test_a_member_without_a_scale_is_named() -> None:
    cache = filled(8, 2)
    constant = of(Brightness(0, SMALL), Brightness(2, SMALL, constant=True))
    with pytest.raises(CalibrationError, match="colour-2: scores all held-out normal images the same"):
        set_scales(constant, cache, sorted(cache.images), 8, Group(), lambda _: None)
    with pytest.raises(SpecError, match=r"needs at least 4 held-out normal images.*there are 3"):
        choose_scaling(["a", "b", "c"], 0, Group())
    with pytest.raises(NotFittedError, match="ensemble: is not fitted"):
        constant.score(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(NotFittedError):
        constant.tensors()
    with pytest.raises(SpecError, match="needs at least 4 held-out"):
        ensemble(BANK).fit(images(8), holdout_ratio=0.3)


# -- one artifact like any other -------------------------------------------------------------------------------------


def test_job_and_notebook_make_the_same_ensemble_and_the_same_rows(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    pack(f"{root}/normal", "", normal_files(24), 1)
    pack(f"{root}/mixed", "", mixed_files(4, 2, masks=False), 1)
    words = {"ensemble": [BANK, STUDENT], "weights": [2, 1]}
    facts = fit(job(words, f"{root}/job", source={"uri": f"{root}/normal/widget/train/good"}))
    assert facts["images"] == {
        "fitted": 12, "held_out": 6, "scaled": 6, "labelled_anomalous_left_out": 0, "bad": 0,
    }  # fmt: skip
    assert [entry["detector"] for entry in facts["members"]] == ["patchcore", "stfpm"]
    assert facts["members"][0]["coreset"]["rows"] > 0 and len(facts["members"][1]["losses"]) == 3
    paths = sorted(str(path) for path in (tmp_path / "normal").rglob("*.png"))
    mine = ensemble(BANK, STUDENT, weights=[2, 1]).fit(paths, holdout_ratio=0.5)
    mine.save(f"{root}/mine")
    job_record, own = (read_record(f"{root}/{name}", Storage()) for name in ("job", "mine"))
    for word in ("tensors", "calibration", "params", "weights", "images"):
        assert own.body[word] == job_record.body[word], word

    values = {
        "kind": "score",
        "source": {"uri": f"{root}/mixed", "pattern": "{category}/test/{defect}/{name}.png"},
        "artifact": f"{root}/job",
        "sink": {"uri": f"{root}/results", "heatmaps": "all"},
        "flag": {"alpha": 0.2},
        "batch_size": 8,
    }
    (tmp_path / "score.yaml").write_text(yaml.safe_dump(values))
    for command, said in (
        (["check", "score.yaml"], "ready to score"),
        (["plan", "score.yaml"], "measured when the artifact was fitted"),
        (["score", "score.yaml", "--local"], "Scored 10 images"),
        (["status", "results"], "Heatmaps   10"),
    ):
        ended = CliRunner().invoke(main, [command[0], str(tmp_path / command[1]), *command[2:]])
        assert ended.exit_code == 0 and said in ended.output, ended.output
    rows = sorted(rows_of(f"{root}/results", Storage()), key=lambda row: row["key"])
    tests = [row["image_uri"] for row in rows]
    assert mine.predict_proba(tests).tolist() == [row["image_score"] for row in rows]
    assert mine.p_values(tests).tolist() == [row["p_value"] for row in rows]
    assert mine.predict(tests, alpha=0.2).tolist() == [int(row["flagged"]) for row in rows]
    assert {row["artifact"] for row in rows} == {job_record.digest}


def test_a_fit_from_the_command_line_tells_of_every_member(tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/normal", "", normal_files(16), 1)
    spec = {
        "kind": "fit",
        "source": {"uri": f"{tmp_path}/normal"},
        "detector": {"ensemble": [BANK, DEEPER]},
        "artifact": f"{tmp_path}/model",
        "calibration": {"holdout_ratio": 0.5},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(spec))
    ended = CliRunner().invoke(main, ["fit", str(tmp_path / "fit.yaml"), "--local"])
    assert ended.exit_code == 0, ended.output
    assert "Fitted ensemble of patchcore, patchcore on 8 images" in ended.output
    assert ended.output.count("Memory bank: ") == 2 and "Note: random weights" in ended.output
    assert "patchcore 1: collect: 8 of 8 images" in ended.output and "patchcore 2: memory bank" in ended.output
    assert "Calibrated on 4 held-out normal images" in ended.output


def test_saved_and_loaded_it_scores_bit_for_bit_and_its_record_needs_no_torch(tmp_path: Path) -> None:
    found = ensemble(BANK, STUDENT, weights=[2, 1]).fit(images(), holdout_ratio=0.5)
    digest = found.save(str(tmp_path))
    loaded = create_model.load(str(tmp_path), batch_size=8)
    for one, other in zip(scores_of(found), scores_of(loaded), strict=True):
        assert (one == other).all()
    assert loaded.save(f"{tmp_path}/again") == digest and loaded.spec.weights == (2.0, 1.0)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from raydetect.artifacts.record import read_record; from raydetect.storage import Storage\n"
        f"record = read_record('file://{tmp_path}', Storage())\n"
        "print(record.image_size, [m['detector'] for m in record.body['members']], record.body['members'][0]['share'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "(48, 48) ['patchcore', 'stfpm'] 0.666667\n"
    detector = load_artifact(f"file://{tmp_path}", Storage()).detector
    for name, match in (("scales", "'scales'"), ("0.bank", "no tensor 'bank'"), ("1.student.conv1.weight", "conv1")):
        tensors = {key: value for key, value in detector.tensors().items() if key != name}
        with pytest.raises(ArtifactError, match=match):
            load_artifact(f"file://{tmp_path}", Storage()).detector.load_tensors(tensors)


def test_the_artifact_is_the_same_on_any_number_of_workers() -> None:
    pack("memory://ensemble/normal", ".tar", normal_files(24), 2)
    words = {"ensemble": [BANK, DEEPER]}
    fit(job(words, "memory://ensemble/alone"))
    expected = read_record("memory://ensemble/alone", Storage()).body
    for size in (1, 2, 3):
        fit_over(job(words, f"memory://ensemble/{size}"), size)
        found = read_record(f"memory://ensemble/{size}", Storage()).body
        for word in ("tensors", "calibration", "images", "weights"):
            assert found[word] == expected[word], (size, word)
        assert [m["scale"] for m in found["members"]] == [m["scale"] for m in expected["members"]]


def test_a_fleet_of_ensembles_has_an_ensemble_for_each_category() -> None:
    files = [*normal_files(12), *((f"bolt/{name.partition('/')[2]}", data) for name, data in normal_files(14, 50))]
    pack("memory://ensemble/normal", "", files, 1)
    source = {"uri": "memory://ensemble/normal", "pattern": "{category}/train/{defect}/{name}.png"}
    words = {"ensemble": [BANK, DEEPER]}
    fit(job(words, "memory://ensemble/fleet", source=source, per_category=True))
    index = read_index("memory://ensemble/fleet", Storage())
    assert index.body["images"] == {
        "fitted": 13,
        "held_out": 7,
        "scaled": 6,
        "labelled_anomalous_left_out": 0,
        "bad": 0,
    }
    for category, record in read_records(index, Storage()).items():
        alone = {**source, "pattern": f"{category}/train/{{defect}}/{{name}}.png"}
        fit(job(words, f"memory://ensemble/{category}", source=alone))
        other = read_record(f"memory://ensemble/{category}", Storage())
        for word in ("tensors", "calibration"):
            assert record.body[word] == other.body[word]


def test_a_killed_fit_goes_on_from_the_states_of_the_member_it_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    pack("memory://ensemble/normal", "", normal_files(16), 1)
    second = {**STUDENT, "params": {**STUDENT["params"], "learning_rate": 0.1}}
    spec = job({"ensemble": [STUDENT, second]}, "memory://ensemble/m", checkpoint_epochs=1)
    plain = STFPM.training_loss

    def dies(self: STFPM, piece: Any) -> Tensor:
        if self.params.learning_rate == 0.1 and piece.epoch == 2:
            raise KeyboardInterrupt
        return plain(self, piece)

    monkeypatch.setattr(STFPM, "training_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(spec)
    monkeypatch.undo()
    facts = fit(spec)
    assert [member["resumed_epochs"] for member in facts["members"]] == [2, 2]
    states = [file.uri for file in Storage().list("memory://ensemble/m") if "training-" in file.uri]
    assert states == []
    resumed = read_record("memory://ensemble/m", Storage()).body["tensors"]["sha256"]
    fit(replace(spec, artifact="memory://ensemble/whole"))
    assert read_record("memory://ensemble/whole", Storage()).body["tensors"]["sha256"] == resumed


def test_labelled_images_reach_the_members_that_learn_from_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    second = {**STUDENT, "params": {**STUDENT["params"], "learning_rate": 0.1}}
    bad = np.stack([defect_image(i, "blob", 48)[0] for i in range(3)])
    y = [0] * 24 + [1] * 3
    plain, seen = STFPM.training_loss, {0.2: 0, 0.1: 0}

    def watched(self: STFPM, piece: Any) -> Tensor:
        seen[self.params.learning_rate] += sum(piece.labels)
        return plain(self, piece)

    class Info:
        def __get__(self, detector: Any, kind: Any) -> DetectorInfo:
            learns = detector is not None and detector.params.learning_rate == 0.1
            return replace(plain_info, labels="some anomalous") if learns else plain_info

    plain_info = STFPM.info
    monkeypatch.setattr(STFPM, "training_loss", watched)
    monkeypatch.setattr(STFPM, "info", Info())
    with pytest.raises(SpecError, match="ensemble of patchcore, stfpm, stfpm: needs labelled anomalous images"):
        ensemble(BANK, STUDENT, second).fit(images())
    found = ensemble(BANK, STUDENT, second).fit(np.concatenate([images(), bad]), y, holdout_ratio=0.5)
    assert seen == {0.2: 0, 0.1: 3 * 3}
    facts = found._require_fitted().facts
    assert facts["images"]["fitted"] == 12 + 3 and facts["images"]["labelled_anomalous_left_out"] == 0
    alone = model(BANK).fit(images(), holdout_ratio=0.5)._require_fitted().detector
    assert torch.equal(found._require_fitted().detector.tensors()["0.bank"], alone.tensors()["bank"])


# -- words -----------------------------------------------------------------------------------------------------------


def test_its_text_is_the_call_that_makes_it() -> None:
    names = {"create_model": create_model, "create_ensemble": create_ensemble}
    for made in (
        create_ensemble(["patchcore", "stfpm"]),
        ensemble(BANK, STUDENT, weights=[2, 1], seed=4),
        create_ensemble([create_model("stfpm", seed=4)], seed=4),
    ):
        again = eval(repr(made), names)
        assert repr(again) == repr(made) and again.spec == made.spec and again.seed == made.seed
        other = create_ensemble(**made.get_params())
        assert repr(other) == repr(made)
    assert repr(create_ensemble(["patchcore", "stfpm"])) == (
        "create_ensemble([create_model('patchcore'), create_model('stfpm')])"
    )


WRONG: list[tuple[Any, str]] = [
    ({}, "set either name or ensemble"),
    ({"ensemble": []}, "set either name or ensemble"),
    ({"name": "patchcore", "ensemble": [BANK]}, "set either name or ensemble"),
    ({"name": "ensemble"}, "set either name or ensemble"),
    ({"ensemble": [BANK], "params": {"image_size": [32, 32]}}, "params and preset belong to the members"),
    ({"ensemble": [BANK], "preset": "smoke"}, "params and preset belong to the members"),
    ({"ensemble": [BANK, STUDENT], "weights": [1]}, "1 weights for 2 members"),
    ({"name": "patchcore", "weights": [1]}, "1 weights for 0 members"),
    ({"ensemble": [BANK], "weights": [0]}, r"weights.*greater than 0"),
    ({"ensemble": [BANK], "weights": [float("inf")]}, r"weights.*finite"),
    ({"ensemble": [{"nome": "patchcore"}]}, "nome: unknown key"),
    ({"ensemble": [{"ensemble": [BANK]}]}, r"ensemble\.0\.ensemble: unknown key"),
    ({"ensemble": ["patchcore"]}, "ensemble"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_job_files_are_refused(words: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        job(words, "memory://x")


def test_what_an_ensemble_cannot_do_is_said() -> None:
    both = {"ensemble": [BANK, STUDENT]}
    with pytest.raises(SpecError, match="extend adds to one memory bank; refit an ensemble"):
        job(both, "memory://x", extend="memory://y")
    pack("memory://ensemble/normal", "", normal_files(12), 1)
    assert find_problems(job(both, "memory://x", precision="bfloat16")) == []
    large = {**BANK, "params": {**BANK["params"], "image_size": [64, 64]}}  # type: ignore[dict-item]
    sizes = find_problems(job({"ensemble": [STUDENT, large]}, "memory://x"))
    assert sizes == [
        "ensemble: stfpm has image_size (48, 48) and patchcore (64, 64), and all members see the same pixels. Set "
        "image_size alike in their params."
    ]
    unknown = find_problems(job({"ensemble": [BANK, {"name": "stfmp"}]}, "memory://x"))
    assert len(unknown) == 1 and "Did you mean 'stfpm'" in unknown[0]
    fit(job({"ensemble": [BANK]}, "memory://ensemble/m"))
    words = {
        "kind": "score",
        "source": {"uri": "memory://ensemble/normal"},
        "artifact": "memory://ensemble/m",
        "sink": {"uri": "memory://ensemble/results"},
        "resources": {"bank_shards": 2},
    }
    with pytest.raises(SpecError, match=r"the ensemble of memory:.* has no memory bank that can be split"):
        plan_score(parse_job(words, "job"))  # type: ignore[arg-type]


def test_wrong_members_in_python_are_refused() -> None:
    calls: list[tuple[Any, str]] = [
        (lambda: create_ensemble([]), "give a list of models or names"),
        (lambda: create_ensemble("patchcore"), "give a list of models or names"),
        (lambda: create_ensemble(["patchcoer"]), "Did you mean 'patchcore'"),
        (lambda: create_ensemble([3]), "one is of type int"),  # type: ignore[list-item]
        (lambda: create_ensemble([create_ensemble(["stfpm"])]), "is an ensemble itself"),
        (lambda: create_ensemble([create_model("stfpm", seed=2)], seed=1), "has its own seed"),
        (lambda: create_ensemble(["stfpm"], weights=[1, 2]), "2 weights for 1 members"),
        (lambda: create_ensemble(["stfpm"], weights=[-1]), "greater than 0"),
        (lambda: create_ensemble(["stfpm", "patchcore"]).set_class_name("x"), "ensemble of stfpm, patchcore: does"),
    ]
    for call, message in calls:
        with pytest.raises(SpecError, match=message):
            call()
    with pytest.raises(NotFittedError, match="ensemble of stfpm: is not fitted"):
        create_ensemble(["stfpm"]).predict_proba(images(1))


def test_a_class_name_reaches_the_members_that_score_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.python_api.test_estimator import with_text

    monkeypatch.setattr(PatchCore, "Params", with_text(PatchCore.Params))
    found = ensemble(BANK, STUDENT).set_class_name("screw")
    assert [member.params.get("class_name") for member in found.spec.ensemble] == ["screw", None]
