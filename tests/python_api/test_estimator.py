"""The notebook face: the fit and the scores of jobs to the bit, every kind of input, every refusal."""

import doctest
import io
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from sklearn.exceptions import NotFittedError as SklearnNotFittedError

import raydetect
from raydetect import Estimator, create_model, list_models
from raydetect.artifacts.record import read_record
from raydetect.config import FitSpec, ScoreSpec, ViewSpec, parse_job
from raydetect.detectors import _registry, patchcore
from raydetect.detectors._base import NotFittedError, Scores
from raydetect.detectors.stfpm import STFPM
from raydetect.errors import ArtifactError, RaydetectError, SpecError
from raydetect.images.preprocess import Preprocess
from raydetect.local import jobs
from raydetect.planning.plan import plan_score
from raydetect.progress.displays import FitDisplay
from raydetect.python_api import estimator as estimator_module
from raydetect.python_api import in_process
from raydetect.python_api import models as models_module
from raydetect.python_api.inputs import BadImagesError, as_input_images, decode_inputs
from raydetect.storage import Storage
from raydetect.views.placement import resized
from raydetect.views.view import View
from raydetect.views.windows import Input
from tests.builders.archives import pack
from tests.builders.images import DEFECTS, defect_image, encode, normal_image
from tests.whole_jobs.runs import rows_of

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT: dict[str, dict[str, Any]] = {
    "patchcore": {"weights": "random", "layers": ("layer1", "layer2"), "smoothing_sigma": 1.0},
    "stfpm": {"weights": "random", "epochs": 2, "batch_size": 8},
}


def write_normal(folder: Path, count: int = 20) -> list[str]:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(encode(normal_image(i)))
    return sorted(str(path) for path in folder.iterdir())


def write_kinds(folder: Path) -> list[str]:
    """One picture in every pixel format that differs in how it is decoded, of several sizes."""
    folder.mkdir()
    colour = Image.fromarray(defect_image(1, "blob")[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = np.asarray(colour.convert("L")).astype(np.uint16) * 257
    colour.save(folder / "colour.png")
    colour.resize((70, 50)).save(folder / "turned.jpg", exif=turned)
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("P").save(folder / "palette.png")
    colour.convert("LA").save(folder / "alpha.png")
    colour.convert("RGBA").resize((64, 64)).save(folder / "small.png")
    Image.fromarray(pixels).save(folder / "sixteen.png")
    return sorted(str(path) for path in folder.iterdir())


def model(name: str = "patchcore", **params: Any) -> Estimator:
    return create_model(name, preset="smoke", **{**SHORT[name], **params}).configure(batch_size=8)


def images(count: int = 20) -> np.ndarray:
    return np.stack([normal_image(i, 64) for i in range(count)])


@pytest.fixture(scope="module")
def fitted() -> Estimator:
    return model().fit(images(), holdout_ratio=0.5)


def fit_job(name: str, source: Any, artifact: str) -> FitSpec:
    values = {
        "kind": "fit",
        "source": {"uri": source},
        "detector": {"name": name, "preset": "smoke", "params": SHORT[name]},
        "artifact": artifact,
        "batch_size": 8,
        "calibration": {"holdout_ratio": 0.5},
    }
    spec = parse_job(values, "fit")
    assert isinstance(spec, FitSpec)
    return spec


def score_job(folder: Path, source: str, artifact: str) -> list[dict[str, Any]]:
    """The rows of a job, by key; heatmaps as maps."""
    values = {
        "kind": "score",
        "source": {"uri": source},
        "artifact": artifact,
        "sink": {"uri": f"{folder}/results", "heatmaps": "all", "style": "map"},
        "flag": {"alpha": 0.2},
        "batch_size": 8,
    }
    spec = parse_job(values, "score")
    assert isinstance(spec, ScoreSpec)
    plan = plan_score(spec)
    jobs.score(plan, lambda *_: None)
    return sorted(rows_of(plan.ledger.uri, plan.ledger.storage), key=lambda row: row["key"])


@pytest.mark.parametrize("name", sorted(SHORT))
def test_fit_artifact_and_scores_are_those_of_jobs_to_the_bit(name: str, tmp_path: Path) -> None:
    paths, kinds = write_normal(tmp_path / "normal"), write_kinds(tmp_path / "kinds")
    jobs.fit(fit_job(name, str(tmp_path / "normal"), f"{tmp_path}/job"), lambda *_: None)
    mine = model(name).fit(paths, holdout_ratio=0.5)
    digest = mine.save(f"{tmp_path}/mine")
    job, own = (read_record(f"file://{tmp_path}/{place}", Storage()) for place in ("job", "mine"))
    assert own.digest == digest
    for word in ("tensors", "calibration", "params", "seed", "images", "weights", "detector"):
        assert own.body[word] == job.body[word], word
    assert own.body["spec"]["artifact"] == f"file://{tmp_path}/mine"

    rows = score_job(tmp_path, str(tmp_path / "kinds"), f"{tmp_path}/mine")
    assert [row["status"] for row in rows] == ["ok"] * len(kinds)
    scores = [row["image_score"] for row in rows]
    for asked in (mine, create_model.load(f"{tmp_path}/mine").configure(batch_size=8)):
        assert asked.predict_proba(kinds).tolist() == scores
        assert asked.p_values(kinds).tolist() == [row["p_value"] for row in rows]
        assert asked.predict(kinds, alpha=0.2).tolist() == [int(row["flagged"]) for row in rows]
        assert asked.threshold(0.2) == rows[0]["threshold"]
    for opened in ([Image.open(path) for path in kinds], [f"file://{path}" for path in kinds]):
        assert mine.predict_proba(opened).tolist() == scores
    sizes = [(row["height"], row["width"]) for row in rows]
    assert [found.shape for found in mine.predict_anomaly_map(kinds)] == sizes and (70, 50) in sizes


def test_arrays_are_scored_as_the_files_that_hold_them(fitted: Estimator, tmp_path: Path) -> None:
    shapes = [(64, 64), (96, 80), (50, 120)]
    colour = [np.asarray(Image.fromarray(defect_image(1, "spot")[0]).resize(shape)) for shape in shapes]
    grey = [picture[..., 1] for picture in colour]
    for number, arrays in enumerate((colour, grey)):
        paths = [tmp_path / f"{number}-{i}.png" for i in range(len(arrays))]
        for path, array in zip(paths, arrays, strict=True):
            path.write_bytes(encode(array))
        assert fitted.predict_proba(arrays).tolist() == fitted.predict_proba(paths).tolist()
        mixed = [arrays[0], paths[1], Image.fromarray(arrays[2])]
        assert fitted.predict_proba(mixed).tolist() == fitted.predict_proba(paths).tolist()
    backwards = colour[0][::-1, ::-1]  # a view that is not contiguous
    assert fitted.predict_proba([backwards]) == fitted.predict_proba([backwards.copy()])
    assert fitted.predict_proba(np.stack([grey[0]] * 2)).tolist() == fitted.predict_proba([grey[0]] * 2).tolist()


def test_a_fit_on_arrays_is_repeatable_and_replaces_the_earlier_one() -> None:
    once = model().fit(images(), holdout_ratio=0.5)
    twice = model().fit(images()[:10], holdout_ratio=0.5).fit(list(images()), holdout_ratio=0.5)
    for name, kept in (("a", once), ("b", twice)):
        kept.save(f"memory://m/{name}")
    first, second = (read_record(f"memory://m/{name}", Storage()).body["tensors"]["sha256"] for name in "ab")
    assert first == second
    other = create_model("patchcore", preset="smoke", seed=1, **SHORT["patchcore"]).fit(images(), holdout_ratio=0.5)
    assert (other.predict_proba(images(4)) != once.predict_proba(images(4))).any()


def test_it_tells_defects_from_normal_images_and_says_where() -> None:
    found = model().fit(images(40), holdout_ratio=0.5)
    planted = [defect_image(i, DEFECTS[i % 3], 64) for i in range(6)]
    fresh = np.stack([normal_image(500 + i, 64) for i in range(6)])
    bad = np.stack([image for image, _ in planted])
    assert found.predict(bad, alpha=0.05).sum() >= 5 and found.predict(fresh, alpha=0.05).sum() <= 2
    maps = found.predict_anomaly_map(bad)
    assert isinstance(maps, np.ndarray) and maps.dtype == np.float32 and maps.shape == (6, 64, 64)
    inside = [scores[mask].mean() > scores[~mask].mean() for scores, (_, mask) in zip(maps, planted, strict=True)]
    assert all(inside)
    assert found.predict_proba(bad).dtype == np.float32


def test_maps_are_resized_as_torch_resizes() -> None:
    given = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32)
    assert resized(given, (24, 32)) is given
    expected = F.interpolate(torch.from_numpy(given)[None, None], (60, 90), mode="bilinear", antialias=True)[0, 0]
    np.testing.assert_allclose(resized(given, (60, 90)), expected.numpy(), atol=1e-5)
    smaller = F.interpolate(torch.from_numpy(given)[None, None], (9, 7), mode="bilinear", antialias=True)[0, 0]
    np.testing.assert_allclose(resized(given, (9, 7)), smaller.numpy(), atol=1e-5)


WRONG: list[tuple[Any, str]] = [
    (Image.new("RGB", (4, 4)), r"Give a list: \[image\]"),
    (3, "is of type int"),
    (None, "is of type NoneType"),
    ([], "is empty"),
    (np.zeros((0, 8, 8, 3), np.uint8), "is empty"),
    (np.zeros((8, 8, 3), np.uint8), r"shape of one image|Give images\[None\]"),
    (np.zeros((8, 8), np.uint8), r"Give images\[None\]"),
    (np.zeros((2, 3, 8, 8), np.uint8), r"channels first\. Give images\.transpose"),
    (np.zeros((2, 8, 8, 4), np.uint8), r"has shape \(2, 8, 8, 4\)"),
    (np.zeros((2, 8, 8, 3), np.float32), r"holds float32\. Give uint8: \(255"),
    (np.zeros((2, 8, 8), np.uint16), "holds uint16.*by their paths"),
    (np.zeros((2, 8, 8), bool), "holds bool"),
    ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 3), np.int64)], r"images\[1\]: holds int64"),
    ([np.zeros((2, 8, 8, 3), np.uint8)], r"images\[0\]: has shape \(2, 8, 8, 3\)"),
    ([np.zeros((0, 8), np.uint8)], r"at least 1 x 1"),
    ([torch.zeros(8, 8, 3, dtype=torch.uint8)], r"images\[0\]: is of type Tensor"),
    ([b"bytes"], "is of type bytes"),
    (b"bytes", "images: is of type bytes"),
    (["s3://bucket/../x.png"], r"`\.\.` is not allowed"),
    (["ftp://x/y.png"], "the scheme 'ftp' is not supported"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=range(len(WRONG)))
def test_anything_else_is_refused_with_one_sentence(fitted: Estimator, wrong: Any, message: str) -> None:
    for call in (fitted.predict_proba, fitted.predict_anomaly_map, model().fit):
        with pytest.raises(SpecError, match=message) as error:
            call(wrong)
        assert "\n" not in str(error.value)


def test_a_folder_or_glob_is_the_list_of_its_images(tmp_path: Path) -> None:
    (tmp_path / "line" / "deep").mkdir(parents=True)
    for i, image in enumerate(images(6)):
        (tmp_path / "line" / ("deep" if i % 2 else "") / f"{i}.png").write_bytes(encode(image))
    (tmp_path / "line" / "notes.txt").write_text("no image")
    paths = sorted(str(path) for path in (tmp_path / "line").rglob("*.png"))
    by_list = model().fit(paths)
    with pytest.warns(UserWarning, match=r"left out 1 other_suffix \(notes\.txt\)"):
        by_folder = model().fit(tmp_path / "line")
    np.testing.assert_array_equal(by_folder.predict_proba(paths), by_list.predict_proba(paths))
    in_glob = sorted(path for path in paths if "deep" in path)
    glob = f"{tmp_path}/line/deep/*.png"
    np.testing.assert_array_equal(by_list.predict_proba(glob), by_list.predict_proba(in_glob))
    np.testing.assert_array_equal(by_list.predict_proba(paths[0]), by_list.predict_proba(paths[:1]))


def test_archives_and_missing_folders_are_refused(fitted: Estimator, tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/packed", ".tar", [("a.png", encode(normal_image(1)))], 1)
    with pytest.raises(SpecError, match=r"packed holds archives, such as .*\.tar, which only jobs read"):
        fitted.predict_proba(f"{tmp_path}/packed")
    with pytest.raises(RaydetectError, match="nowhere"):
        fitted.predict_proba(tmp_path / "nowhere")


def test_errors_are_of_the_kinds_that_python_and_scikit_learn_use() -> None:
    assert raydetect.SpecError is SpecError
    assert issubclass(SpecError, ValueError)
    assert all(issubclass(NotFittedError, kind) for kind in SklearnNotFittedError.__bases__)
    with pytest.raises(ValueError, match="Did you mean"):
        create_model("patchcoer")


def test_bad_images_are_all_named_for_fit_and_predict(fitted: Estimator, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes(encode(normal_image(1))[:2000])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    names = ["text.png", "cut.png", "float.tif", "gone.png"]
    given: list[Any] = [*images(3), *(tmp_path / name for name in names), Image.open(tmp_path / "cut.png")]
    for call in (fitted.predict_proba, fitted.predict_anomaly_map, model().fit):
        with pytest.raises(BadImagesError, match=r"^5 of 8 images cannot be used: \[3\] file") as error:
            call(given)
        assert [position for position, _, _ in error.value.bad] == [3, 4, 5, 6, 7]
        for name, (_, key, sentence) in zip([*names, "array#000007"], error.value.bad, strict=True):
            assert key.endswith(name) and name in sentence and name in str(error.value)
    with pytest.raises(BadImagesError, match=r"\[9\] .* And 5 more: see `bad`") as error:
        fitted.predict_proba([tmp_path / f"gone-{i}.png" for i in range(15)])
    assert len(error.value.bad) == 15


def test_a_score_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = model().fit(images(6))
    plain = patchcore.PatchCore.score

    def broken(self: patchcore.PatchCore, images_BCHW: torch.Tensor) -> Scores:
        scores = plain(self, images_BCHW)
        scores.anomaly_map_BHW[1, 3, 3] = torch.nan
        return scores

    monkeypatch.setattr(patchcore.PatchCore, "score", broken)
    with pytest.raises(BadImagesError, match=r"^1 of 3 .*\[1\] array#000001: .* not finite"):
        found.predict_proba(images(3))


def test_the_default_level_is_the_smallest_that_the_calibration_allows(fitted: Estimator) -> None:
    said = r"images are flagged at 9\.1 % by default, not at 1 %, .* 99 normal images .* there are 10"
    with pytest.warns(UserWarning, match=said):
        assert fitted.threshold() == fitted.threshold(1 / 11)
    with pytest.warns(UserWarning, match=said):
        labels = fitted.predict(images(6))
    np.testing.assert_array_equal(labels, fitted.p_values(images(6)) <= 1 / 11 + 1e-12)


def test_wrong_words_are_refused(fitted: Estimator) -> None:
    calls: list[tuple[Any, str]] = [
        (lambda: create_model("patchcoer"), "Did you mean 'patchcore'"),
        (lambda: create_model("patchcore", backbne="resnet18"), "Did you mean 'backbone'"),
        (lambda: create_model("patchcore", coreset_sampling_ratio=2), "coreset_sampling_ratio"),
        (lambda: create_model("patchcore", preset="papre"), "preset.*'papre'"),
        (lambda: create_model("patchcore", seed=-1), "seed: is -1"),
        (lambda: fitted.fit(images(4), [0, 1]), r"y: has shape \(2,\)"),
        (lambda: fitted.fit(images(4), [0, 1, 2, 0]), "y: holds 2"),
        (lambda: fitted.fit(images(4), ["good"] * 4), "y: holds 'good'"),
        (lambda: fitted.fit(images(4), holdout_ratio=1.0), "holdout_ratio"),
        (lambda: fitted.fit(images(1)), "1 usable normal image"),
        (lambda: fitted.fit(["a.png", "./a.png"]), "is given twice"),
        (
            lambda: fitted.predict(images(2), alpha=0.01),
            r"alpha = 0\.01 needs at least 99 .* has 10\. .*Raise alpha to 0\.091",
        ),
        (lambda: fitted.predict(images(2), alpha=0), "alpha"),
        (lambda: fitted.configure(devise="cpu"), "Did you mean 'device'"),
        (lambda: fitted.configure(device="tpu"), "device"),
        (lambda: fitted.configure(storage={"endpoint": "x"}), "endpoint_url"),
        (lambda: fitted.set_class_name("screw"), "patchcore: does not use text prompts"),
    ]
    for call, message in calls:
        with pytest.raises(SpecError, match=message):
            call()
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="sees no GPU"):
            fitted.configure(device="cuda")
    with pytest.raises(ArtifactError, match="no artifact"):
        create_model.load("memory://nowhere")
    fresh = create_model("stfpm")
    for ask in (fresh.predict_proba, fresh.predict, fresh.p_values, fresh.predict_anomaly_map, fresh.save):
        with pytest.raises(NotFittedError, match=r"stfpm: is not fitted\. Call fit"):
            ask("memory://x" if ask == fresh.save else images(1))


def test_a_failed_fit_keeps_the_earlier_one() -> None:
    found = model().fit(images(8))
    before = found.predict_proba(images(2))
    with pytest.raises(SpecError):
        found.fit(images(1))
    assert (found.predict_proba(images(2)) == before).all()


@pytest.mark.parametrize("name", sorted(SHORT))
def test_its_text_is_the_call_that_makes_it(name: str) -> None:
    assert repr(create_model(name)) == f"create_model('{name}')"
    assert repr(create_model(name, image_size=[256, 256])) == f"create_model('{name}')"  # the default, spelt out
    made = create_model(name, preset="smoke", seed=3, image_size=(48, 64))
    text = repr(made)
    assert text == f"create_model('{name}', preset='smoke', seed=3, image_size=(48, 64))"
    again = eval(text, {"create_model": create_model})
    assert again.get_params() == made.get_params() == create_model(**made.get_params()).get_params()
    assert made.get_params()["image_size"] == (48, 64) and made.get_params()["preset"] == "smoke"


def test_names_are_those_of_the_registry() -> None:
    assert list_models() == _registry.list_models() and {"patchcore", "stfpm"} <= set(list_models())


def test_saved_and_loaded_it_is_the_same(fitted: Estimator) -> None:
    digest = fitted.save("memory://kept/a")
    loaded = create_model.load("memory://kept/a", batch_size=8)
    again = Estimator.load("memory://kept/a")
    assert loaded.settings.batch_size == 8 and again.settings.batch_size is None and again.settings.fit_batch_size == 16
    for name in ("backbone", "layers", "image_size", "weights", "seed"):
        assert loaded.get_params()[name] == fitted.get_params()[name]
    assert (loaded.predict_proba(images(5)) == fitted.predict_proba(images(5))).all()
    assert (loaded.predict_anomaly_map(images(5)) == fitted.predict_anomaly_map(images(5))).all()
    assert loaded.save("memory://kept/b") == digest


def test_labelled_anomalies_are_left_out_unless_the_detector_learns_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    normal, bad = images(12), np.stack([defect_image(i, "blob", 64)[0] for i in range(3)])
    y = [0] * 12 + [1] * 3
    mixed = model("stfpm").fit(np.concatenate([normal, bad]), y, holdout_ratio=0.5)
    alone = model("stfpm").fit(normal, holdout_ratio=0.5)
    assert (mixed.predict_proba(bad) == alone.predict_proba(bad)).all()
    assert mixed._require_fitted().facts["images"] == {
        "fitted": 6, "held_out": 6, "labelled_anomalous_left_out": 3, "bad": 0,
    }  # fmt: skip

    seen: list[int] = []
    plain = STFPM.training_loss

    def watched(self: STFPM, piece: Any) -> torch.Tensor:
        seen.extend(piece.labels)
        return plain(self, piece)

    monkeypatch.setattr(STFPM, "training_loss", watched)
    monkeypatch.setattr(STFPM, "info", replace(STFPM.info, labels="some anomalous"))
    for given in (None, [0] * 15):
        with pytest.raises(SpecError, match=r"stfpm: needs labelled anomalous images\. Call fit\(images, y=labels\)"):
            model("stfpm").fit(np.concatenate([normal, bad]), given)
    model("stfpm").fit(np.concatenate([normal, bad]), np.array(y, bool), holdout_ratio=0.5)
    assert sum(seen) == 2 * 3 and len(seen) == 2 * (6 + 3)  # two epochs


def with_text(plain: type) -> type:
    """Parameters of a detector that scores by text."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(plain):  # type: ignore[misc]
        """With a class name."""

        class_name: Annotated[str, Field(description="what the images show")] = "object"

    return Params


def test_a_class_name_goes_to_detectors_that_score_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(patchcore.PatchCore, "Params", with_text(patchcore.PatchCore.Params))
    found = model()
    assert found.set_class_name("screw") is found
    assert found.get_params()["class_name"] == "screw" and "class_name='screw'" in repr(found)
    found.fit(images(6), holdout_ratio=0.5).save("memory://text")
    assert create_model.load("memory://text").get_params()["class_name"] == "screw"
    with pytest.raises(SpecError, match="class_name"):
        found.set_class_name(3)  # type: ignore[arg-type]
    assert found.get_params()["class_name"] == "screw"

    monkeypatch.setattr(patchcore.PatchCore, "set_class_name", lambda self, name: told.append(name), raising=False)
    found.set_class_name("nut")
    assert told == ["nut"] and len(found.predict_proba(images(2))) == 2
    for ask in (lambda: found.predict(images(1)), lambda: found.p_values(images(1)), lambda: found.save("memory://x")):
        with pytest.raises(SpecError, match=r"patchcore: has a new class name since its fit.*Fit again"):
            ask()
    found.fit(images(6), holdout_ratio=0.5)
    assert found.predict(images(1), alpha=0.5).tolist() == [0] and found.get_params()["class_name"] == "nut"

    monkeypatch.delattr(patchcore.PatchCore, "set_class_name")
    with pytest.raises(NotFittedError):
        found.set_class_name("bolt").predict_proba(images(1))


def test_threads_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[int] = []
    plain = patchcore.PatchCore._embed

    def watched(self: patchcore.PatchCore, images_BCHW: torch.Tensor) -> torch.Tensor:
        during.append(torch.get_num_threads())
        return plain(self, images_BCHW)

    monkeypatch.setattr(patchcore.PatchCore, "_embed", watched)
    found = model().configure(threads=2).fit(images(6))
    found.predict_proba(images(1))
    assert set(during) == {2} and torch.get_num_threads() == 1


def test_a_long_fit_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(in_process, "SHOW_AFTER_SECONDS", 600.0)
    model("stfpm").fit(images(6))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(in_process, "SHOW_AFTER_SECONDS", 0.0)
    found = model("stfpm").fit(images(6))
    shown = capsys.readouterr().err
    assert "read: 6 of 6 images" in shown and re.search(r"train: (\d+) of \1 batches", shown)
    model("stfpm").fit(images(6), progress=False)
    found.predict_proba(images(2), progress=False)
    assert capsys.readouterr().err == ""
    found.predict(images(2), alpha=0.5)
    assert "score: 2 of 2 images" in capsys.readouterr().err


def test_a_bar_begins_when_a_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with FitDisplay(2.0) as display:
        display.on_progress("collect images", 3, 10)
        assert terminal.getvalue() == ""
        now[0] = 2.5
        display.on_progress("collect images", 3, 10)
    assert "collect images" in terminal.getvalue() and "6/10" in terminal.getvalue()


@pytest.mark.parametrize("module", [estimator_module, models_module], ids=lambda module: module.__name__)
def test_the_examples_of_the_docstrings_run(module: Any) -> None:
    ended = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    assert ended.failed == 0 and ended.attempted >= 2


def test_the_example_of_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, but for random weights at a small size."""
    text = (Path(__file__).parents[2] / "docs/how-to/python.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    small = 'weights="random", image_size=(64, 64)'
    code = code.replace('backbone="resnet18"', f'backbone="resnet18", {small}')
    code = code.replace("epochs=30", f"epochs=1, {small}")
    assert code.count(small) == 2
    for folder, start in (("normal", 0), ("new", 500)):
        (tmp_path / folder).mkdir()
        for i in range(100 if folder == "normal" else 5):
            (tmp_path / folder / f"{i:03d}.png").write_bytes(encode(normal_image(start + i, 64)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "python.md", "exec"), names)
    assert names["maps"].shape == (5, 64, 64) and set(names["labels"]) <= {0, 1}
    assert (names["again"].predict_proba(names["new"]) == names["scores"]).all()
    assert names["both"].predict(names["new"], alpha=0.1).shape == (5,)


def test_import_is_instant_and_knows_its_names() -> None:
    code = "import raydetect, sys; print(sorted(sys.modules)); print(dir(raydetect)); raydetect.create_modell"
    command = [sys.executable, "-X", "importtime", "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert "has no attribute 'create_modell'" in ended.stderr
    assert "create_model" in ended.stdout and "list_models" in ended.stdout
    loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "raydetect" in loaded and not loaded & {
        "torch",
        "ray",
        "numpy",
        "pydantic",
        "raydetect.python_api.estimator",
    }
    code = "import sys; sys.modules['ray'] = None; from raydetect import create_model; create_model('patchcore')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_range_counts_the_values_of_files_and_of_arrays(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65_536, (8, 8)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    rules = Preprocess((8, 8), "full", View(ViewSpec(range=(50, 200))))

    def shown(image: Any) -> np.ndarray:
        first, _ = decode_inputs(as_input_images([image], Storage()), rules, Storage(), 1)
        assert isinstance(first, Input)
        return first.image_HWC[..., 0]

    for image, values in ((str(tmp_path / "deep.png"), deep), ((deep >> 8).astype(np.uint8), deep >> 8)):
        expected = np.floor(np.clip((values.astype(float) - 50) / 150 * 255, 0, 255) + 0.5)
        assert (shown(image) == expected).all()
    with pytest.raises(BadImagesError, match=r"a PIL image of mode I;16 is made 8-bit before .* Give its path"):
        shown(Image.fromarray(deep))
