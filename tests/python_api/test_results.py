"""One pass over images: its rows are those of the single methods and of a job; tables, figures and conventions."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.ensemble import IsolationForest

from raydetect import Estimator, create_model
from raydetect.config import EvaluateSpec, ScoreSpec, parse_job
from raydetect.detectors.patchcore import PatchCore
from raydetect.errors import SpecError
from raydetect.evaluation.cells import plan_evaluation
from raydetect.evaluation.run import run_cell
from raydetect.images.masks.reading import MaskError
from raydetect.local import jobs
from raydetect.metrics import aupro, auroc, average_precision, best_f1, pixel_auroc, pixel_average_precision
from raydetect.planning.plan import plan_score
from raydetect.python_api.optional_packages import MissingPackageError, optional
from tests.builders.images import DEFECTS, defect_image, encode, normal_image
from tests.whole_jobs.runs import rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(count: int, first: int = 0) -> np.ndarray:
    return np.stack([normal_image(first + i, 64) for i in range(count)])


def planted(count: int) -> np.ndarray:
    return np.stack([defect_image(i, DEFECTS[i % 3], 64)[0] for i in range(count)])


@pytest.fixture(scope="module")
def fitted() -> Estimator:
    params: dict[str, Any] = {"weights": "random", "layers": ("layer1", "layer2"), "smoothing_sigma": 1.0}
    model = create_model("patchcore", preset="smoke", **params).configure(batch_size=8)
    return model.fit(normal(40), holdout_ratio=0.5)


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of images of every forward pass from now on."""
    passes: list[int] = []
    plain = PatchCore.score

    def counted(self: PatchCore, images_BCHW: torch.Tensor) -> Any:
        passes.append(len(images_BCHW))
        return plain(self, images_BCHW)

    monkeypatch.setattr(PatchCore, "score", counted)
    return passes


def test_one_pass_has_what_the_single_methods_return(fitted: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.concatenate([planted(4), normal(4, 500)])
    passes = counted_passes(monkeypatch)
    found = fitted(images, alpha=0.05)
    assert passes == [8]
    assert len(found) == 8 and found.threshold == fitted.threshold(0.05)
    for mine, single in (
        (found.scores, fitted.predict_proba(images)),
        (found.p_values, fitted.p_values(images)),
        (found.labels, fitted.predict(images, alpha=0.05)),
        (found.maps, fitted.predict_anomaly_map(images)),
    ):
        np.testing.assert_array_equal(mine, single)
        assert mine.dtype == single.dtype
    assert 3 <= found.labels.sum() <= 6
    assert [row.image for row in found] == list(range(8)) and {row.height for row in found} == {64}
    assert all(bool(row.regions) <= bool(row.label) for row in found) and any(row.regions for row in found)
    first = next(row for row in found if row.regions)
    region = first.regions[0]
    assert first.map is not None and first.map[region.peak_y, region.peak_x] == np.float32(region.peak_score)
    assert region.peak_score == first.map.max()


def test_it_is_a_sequence(fitted: Estimator) -> None:
    found = fitted(planted(3), alpha=0.05)
    assert found[-1] == found[2] and next(iter(found)) is found[0]
    part = found[1:]
    assert len(part) == 2 and part.threshold == found.threshold and part.scores.tolist() == found.scores.tolist()[1:]
    number = int(found.labels.sum())
    assert repr(found) == f"<3 results, {number} anomalous: score >= {found.threshold:.6g}>"
    with pytest.raises(IndexError):
        found[3]


def test_rows_are_those_of_a_job(fitted: Estimator, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    for i, image in enumerate([*planted(4), *normal(3, 500)]):
        Image.fromarray(image).resize((90, 70)).save(folder / f"{i}.png")
    fitted.save(f"{tmp_path}/artifact")
    values = {
        "kind": "score",
        "source": {"uri": str(folder)},
        "artifact": f"{tmp_path}/artifact",
        "sink": {"uri": f"{tmp_path}/results", "heatmaps": "none"},
        "flag": {"alpha": 0.05},
        "batch_size": 8,
    }
    spec = parse_job(values, "score")
    assert isinstance(spec, ScoreSpec)
    plan = plan_score(spec)
    jobs.score(plan, lambda *_: None)
    rows = sorted(rows_of(plan.ledger.uri, plan.ledger.storage), key=lambda row: row["key"])
    frame = fitted(folder, alpha=0.05).to_frame()
    assert frame["image"].tolist() == [row["image_uri"] for row in rows]
    for mine, column in (("score", "image_score"), ("p_value", "p_value"), ("height", "height"), ("width", "width")):
        assert frame[mine].tolist() == [row[column] for row in rows], mine
    assert frame["label"].tolist() == [int(row["flagged"]) for row in rows]
    assert frame["regions"].tolist() == [row["regions"] or [] for row in rows]
    assert frame["regions_left_out"].tolist() == [row["regions_left_out"] or 0 for row in rows]
    assert any(frame["regions"])


def test_a_table_has_a_row_for_each_image_and_no_maps(fitted: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fitted([planted(1)[0], normal_image(3, 64)[:40]], alpha=0.05, maps=False)
    frame = found.to_frame()
    assert isinstance(frame, pd.DataFrame) and len(frame) == 2
    assert list(frame) == ["image", "score", "p_value", "label", "height", "width", "regions", "regions_left_out"]
    assert frame["score"].dtype == np.float32 and frame["height"].tolist() == [64, 40]
    assert (frame.sort_values("p_value")["image"] == [0, 1]).all()
    with pytest.raises(SpecError, match="maps=False"):
        _ = found.maps
    assert found[0].map is None and found[0].regions == fitted([planted(1)[0]], alpha=0.05)[0].regions
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match=r"^to_frame: pandas cannot .*Run `pip install pandas`\.$"):
        found.to_frame()


def test_signs_are_those_of_scikit_learn(fitted: Estimator) -> None:
    images = np.concatenate([planted(4), normal(4, 500)])
    scores = fitted.predict_proba(images)
    np.testing.assert_array_equal(fitted.score_samples(images), -scores)
    decided = fitted.decision_function(images, alpha=0.05)
    np.testing.assert_array_equal(decided, fitted.threshold(0.05) - scores.astype(np.float64))
    np.testing.assert_array_equal(fitted.predict(images, alpha=0.05) == 1, decided <= 0)
    flat = images.reshape(len(images), -1)
    theirs = IsolationForest(random_state=0).fit(flat[4:])
    outliers = theirs.predict(flat) == -1
    np.testing.assert_array_equal(outliers, theirs.decision_function(flat) < 0)
    assert theirs.score_samples(flat[:4]).mean() < theirs.score_samples(flat[4:]).mean()
    assert fitted.score_samples(images[:4]).mean() < fitted.score_samples(images[4:]).mean()


def test_few_images_are_scored_one_by_one_and_alike(fitted: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = counted_passes(monkeypatch)
    fitted.save("memory://singly")
    usual = create_model.load("memory://singly")
    images = planted(5)
    sizes.clear()  # a loaded detector is tried out
    singly, padded = usual.predict_proba(images[:4]), usual.predict_proba(images)
    assert sizes == [1, 1, 1, 1, 16]
    np.testing.assert_allclose(singly, padded[:4], rtol=1e-5)
    sizes.clear()
    np.testing.assert_array_equal(usual.configure(batch_size=16).predict_proba(images[:1]), padded[:1])
    assert sizes == [16]
    tiled = create_model.load("memory://singly").fit(normal(20), view={"tile": {}}, holdout_ratio=0.5)
    sizes.clear()
    tiled.predict_proba(images[:1])
    assert sizes == [16]


def test_figures_are_those_of_the_definitions(fitted: Estimator, tmp_path: Path) -> None:
    pairs = [defect_image(i, DEFECTS[i % 3], 64) for i in range(5)]
    images = np.concatenate([np.stack([image for image, _ in pairs]), normal(6, 500)])
    y = [1] * 5 + [0] * 6
    scores = fitted.predict_proba(images)
    found = fitted.evaluate(images, y)
    assert set(found) == {"image_auroc", "image_ap", "image_f1_max", "image_fpr_at_95_tpr"}
    assert found["image_auroc"] == pytest.approx(auroc(y, scores), abs=1e-12)
    assert found["image_ap"] == pytest.approx(average_precision(y, scores), abs=1e-12)
    assert found["image_f1_max"] == pytest.approx(best_f1(y, scores)[0], abs=1e-12)

    masks = [mask for _, mask in pairs]
    maps = fitted.predict_anomaly_map(images)
    whole = [*masks, *np.zeros((6, 64, 64))]
    paths = []
    for i, mask in enumerate(masks):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(paths[-1])
    kinds: list[Any] = [np.stack([np.asarray(m, np.uint8) for m in whole]), [*paths, *[None] * 6]]
    kinds.append([Image.open(path) for path in paths] + [None] * 6)
    for given in kinds:
        found = fitted.evaluate(images, y, given)
        assert found["pixel_auroc"] == pytest.approx(pixel_auroc(maps, whole), abs=1e-4)
        assert found["pixel_ap"] == pytest.approx(pixel_average_precision(maps, whole), abs=1e-3)
        assert found["aupro_0.3"] == pytest.approx(aupro(maps, whole, 0.3), abs=1e-3)
        assert found["aupro_0.05"] == pytest.approx(aupro(maps, whole, 0.05), abs=1e-3)
    unknown = fitted.evaluate(images, y, [masks[0], *[None] * 10])
    only = [0, *range(5, 11)]
    assert unknown["pixel_auroc"] == pytest.approx(pixel_auroc(maps[only], [whole[i] for i in only]), abs=1e-4)


def test_figures_are_those_of_an_evaluation_job(fitted: Estimator, tmp_path: Path) -> None:
    for folder in ("train/good", "test/good", "test/blob", "ground_truth/blob"):
        (tmp_path / "data/part" / folder).mkdir(parents=True)
    names, y, masks = list[Path](), list[int](), list[Any]()
    for i in range(20):
        (tmp_path / f"data/part/train/good/{i:03d}.png").write_bytes(encode(normal_image(i, 64)))
    for i in range(6):
        names.append(tmp_path / f"data/part/test/{'blob' if i % 2 else 'good'}/{i:03d}.png")
        image, mask = defect_image(i, "blob", 64) if i % 2 else (normal_image(900 + i, 64), None)
        names[-1].write_bytes(encode(image))
        y.append(i % 2)
        masks.append(None if mask is None else tmp_path / f"data/part/ground_truth/blob/{i:03d}_mask.png")
        if mask is not None:
            Image.fromarray((mask * 255).astype(np.uint8)).save(masks[-1])
    params = {"weights": "random", "layers": ["layer1", "layer2"]}
    values = {
        "kind": "evaluate",
        "data": {"uri": f"{tmp_path}/data", "layout": "mvtec_ad", "categories": ["part"]},
        "detectors": [{"name": "patchcore", "preset": "smoke", "params": params}],
        "output": f"{tmp_path}/leaderboard",
        "seeds": [0],
        "batch_size": 8,
    }
    spec = parse_job(values, "evaluate")
    assert isinstance(spec, EvaluateSpec)
    evaluation = plan_evaluation(spec)
    body = run_cell(evaluation, evaluation.cells[0], lambda *_: None)
    whole = body["categories"]["part"]["figures"]
    model = create_model.load(body["artifact"]["uri"]).configure(batch_size=8)
    found = model.evaluate(names, y, masks)
    assert found == {name: figure["value"] for name, figure in whole.items()}
    assert len(found) == 10


def test_a_warning_points_to_the_line_of_the_caller(fitted: Estimator) -> None:
    for call in (lambda: fitted(normal(1)), lambda: fitted.predict(normal(1)), fitted.threshold):
        with pytest.warns(UserWarning, match="flagged at 4") as caught:
            call()
        assert [Path(one.filename).name for one in caught] == [Path(__file__).name]


def test_wrong_labels_and_masks_are_refused(fitted: Estimator, tmp_path: Path) -> None:
    images = normal(3)
    blank = np.zeros((64, 64), np.uint8)
    calls: list[tuple[Any, Any, str]] = [
        ([0, 0, 0], None, "evaluate: there is nothing anomalous"),
        ([0, 1], None, r"y: has shape \(2,\)"),
        ([0, 1, 2], None, "y: holds 2"),
        ([0, 0, 1], [None], "masks: 1 for 3 images"),
        ([0, 0, 1], "mask.png", "masks: one for 3 images"),
        ([0, 0, 1], 3, "masks: is of type int"),
        ([0, 0, 1], [None, None, np.zeros((64, 64, 3))], r"masks\[2\]: is of type ndarray with shape \(64, 64, 3\)"),
        ([0, 0, 1], [None, None, b"x"], r"masks\[2\]: is of type bytes"),
    ]
    for y, masks, message in calls:
        with pytest.raises(SpecError, match=message):
            fitted.evaluate(images, y, masks)
    with pytest.raises(MaskError, match=r"is 64 x 64 px and its mask 64 x 40"):
        fitted.evaluate(images, [0, 0, 1], [None, None, blank[:40]])
    with pytest.raises(MaskError, match=r"gone\.png"):
        fitted.evaluate(images, [0, 0, 1], [None, None, tmp_path / "gone.png"])


def test_a_figure_shows_picture_regions_and_map(fitted: Estimator, tmp_path: Path) -> None:
    image = planted(1)[0]
    figure = fitted.plot(image, alpha=0.05)
    left, right, _ = figure.axes
    found = fitted([image], alpha=0.05)[0]
    boxes = [(box.get_x() + 0.5, box.get_y() + 0.5, box.get_width(), box.get_height()) for box in left.patches]
    assert boxes == [(r.x, r.y, r.width, r.height) for r in found.regions] and boxes
    np.testing.assert_array_equal(left.images[0].get_array(), image)
    np.testing.assert_array_equal(np.asarray(right.images[0].get_array()), found.map)
    low, high = fitted._require_fitted().calibration.map_scale()
    assert right.images[0].get_clim() == pytest.approx((low, low + 0.3 * (high - low)))
    assert f"score {found.score:.4g}" in figure.get_suptitle() and f"p = {found.p_value:.3g}" in figure.get_suptitle()
    path = tmp_path / "part 7.png"
    path.write_bytes(encode(image[:40]))
    assert fitted.plot(path, alpha=0.05).get_suptitle().startswith("part 7.png\nscore")
    figure.savefig(tmp_path / "figure.png")
    import matplotlib.pyplot

    assert matplotlib.pyplot.get_fignums() == []  # or a notebook would show it a second time


def test_a_figure_without_matplotlib_is_one_sentence(fitted: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingPackageError, match=r"^plot: matplotlib .*Run `pip install 'raydetect\[plot\]'`\.$"):
        fitted.plot(planted(1)[0], alpha=0.05)
    assert optional("json", "x", "y").dumps([]) == "[]"
