"""Views in whole jobs: fits, evaluations, fleets with a mask for each category, Python, hints and forecasts."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from raydetect import create_model
from raydetect.artifacts.fleet import member_uri, read_index, read_records
from raydetect.artifacts.record import read_record
from raydetect.check import find_problems
from raydetect.cli.main import main
from raydetect.config import CalibrateSpec, EvaluateSpec, FitSpec, ScoreSpec, parse_job
from raydetect.config.validation import apply_overrides
from raydetect.detectors.patchcore import PatchCore
from raydetect.errors import SpecError
from raydetect.evaluation.cells import plan_evaluation
from raydetect.evaluation.run import run_cell
from raydetect.images.masks.reading import MaskError
from raydetect.local import jobs
from raydetect.planning.forecast import forecast
from raydetect.planning.plan import plan_score
from raydetect.storage import Storage
from raydetect.views.view import View
from tests.builders.archives import pack
from tests.builders.images import encode, normal_image
from tests.local.test_local import rows

ROOT = "memory://views"
PARAMS = {"weights": "random", "image_size": [48, 48], "layers": ["layer1"], "coreset_sampling_ratio": 0.2}
DETECTOR = {"name": "patchcore", "preset": "smoke", "params": {**PARAMS, "smoothing_sigma": 1}}
LEFT = [[[0, 0], [0.5, 0], [0.5, 1], [0, 1]]]
FIT: dict[str, Any] = {
    "kind": "fit",
    "source": {"uri": f"{ROOT}/normal"},
    "detector": DETECTOR,
    "artifact": f"{ROOT}/artifact",
    "calibration": {"holdout_ratio": 0.25},
    "batch_size": 8,
    "resources": {"cpus_per_worker": 1},
}
SCORE: dict[str, Any] = {
    "kind": "score",
    "source": {"uri": f"{ROOT}/new"},
    "artifact": f"{ROOT}/artifact",
    "sink": {"uri": f"{ROOT}/results", "heatmaps": "all", "style": "map"},
    "flag": {"threshold": 0.0},
    "batch_size": 8,
    "resources": {"cpus_per_worker": 1},
}


def picture(number: int, size: tuple[int, int] = (128, 80)) -> np.ndarray:
    """A picture of (width, height) px."""
    whole = Image.fromarray(normal_image(number, 96)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(whole)


def spotted(number: int, left: int, size: tuple[int, int] = (128, 80)) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a bright spot, and its mask."""
    image, mask = picture(number, size).copy(), np.zeros(size[::-1], np.uint8)
    image[24:44, left : left + 16], mask[24:44, left : left + 16] = (250, 20, 20), 255
    return image, mask


def fit(**changes: Any) -> dict[str, Any]:
    spec = parse_job({**FIT, "replace": True, **changes}, "fit")
    assert isinstance(spec, FitSpec)
    assert find_problems(spec) == []
    return dict(jobs.fit(spec, lambda *_: None).facts)


def score(**changes: Any) -> list[dict[str, Any]]:
    spec = parse_job({**SCORE, **changes}, "score")
    assert isinstance(spec, ScoreSpec)
    plan = plan_score(spec)
    jobs.score(plan, lambda *_: None)
    return rows(plan)


@pytest.fixture
def data() -> None:
    pack(f"{ROOT}/normal", "", [(f"{i:03d}.png", encode(picture(i))) for i in range(12)], 1)
    new = [
        ("a.png", encode(picture(900))),
        ("b.png", encode(spotted(901, 20)[0])),
        ("c.png", encode(spotted(901, 96)[0])),
    ]
    pack(f"{ROOT}/new", "", new, 1)


VIEWS: dict[str, dict[str, Any]] = {
    "pad": {"resize": "pad"},
    "short_side": {"resize": "short_side"},
    "crop": {"size": [54, 54], "crop": [48, 48]},
    "tiles": {"tile": {"overlap": 16}},
    "scaled": {"tile": {"size": [40, 40], "overlap": 8}, "scale": 1.5},
    "region": {"region": LEFT},
    "all": {"tile": {"overlap": 16}, "region": LEFT},
}


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_fit_records_its_view_and_scoring_and_python_follow(view: dict[str, Any], tmp_path: Path) -> None:
    facts = fit(view=view)
    record = read_record(f"{ROOT}/artifact", Storage())
    assert record.body["format_version"] == 3 and facts["preprocess"] == record.body["preprocess"]
    rows = score()
    assert [row["status"] for row in rows] == ["ok"] * 3
    files = []
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(Storage().read(f"{ROOT}/new/{name}.png"))
        files.append(str(tmp_path / f"{name}.png"))
    model = create_model.load(f"{ROOT}/artifact").configure(batch_size=8, threads=1)
    scores = model.predict_proba(files)
    np.testing.assert_array_equal(scores, np.array([row["image_score"] for row in rows], np.float32))
    maps = model.predict_anomaly_map(files)
    assert isinstance(maps, np.ndarray) and maps.shape == (3, 80, 128)
    if "region" in view:
        assert np.isnan(maps[..., 64:]).all() and np.isfinite(maps[..., :60]).all()
        assert scores[1] > scores[0] and scores[2] == model.predict_proba([picture(901)])[0]
    elif view.get("resize") == "short_side":
        assert (
            np.isnan(maps[..., :24]).all() and np.isnan(maps[..., 104:]).all() and np.isfinite(maps[..., 24:104]).all()
        )
    elif "crop" in view:
        assert np.isnan(maps[:, :4]).all() and np.isfinite(maps[:, 5:75, 8:120]).all()
    else:
        assert np.isfinite(maps).all()
    same = create_model("patchcore", preset="smoke", **{**PARAMS, "smoothing_sigma": 1}).configure(
        batch_size=8, threads=1
    )
    normal = [picture(i) for i in range(12)]
    same.fit(normal, holdout_ratio=0.25, view=view, progress=False)
    assert same._fitted is not None and same._fitted.facts["preprocess"] == record.body["preprocess"]
    again = create_model.load(same.save(f"{ROOT}/saved") and f"{ROOT}/saved").configure(batch_size=8, threads=1)
    np.testing.assert_array_equal(again.predict_proba(files), same.predict_proba(files))


@pytest.mark.usefixtures("data")
def test_a_stored_map_covers_the_whole_picture() -> None:
    fit(view={"resize": "short_side"})
    rows = score()
    data = Storage().read(f"{ROOT}/new/a.png")
    assert data
    from fsspec import open as fsspec_open

    with fsspec_open(rows[0]["heatmap_uri"]) as handle:
        stored = Image.open(io.BytesIO(handle.read()))
    assert stored.size == (77, 48) and (np.asarray(stored)[:, :14] == 0).all()


@pytest.mark.usefixtures("data")
def test_a_recalibration_keeps_the_view() -> None:
    fit(view=VIEWS["all"])
    pack(f"{ROOT}/more", "", [(f"{i:03d}.png", encode(picture(500 + i))) for i in range(5)], 1)
    values = {
        "kind": "calibrate",
        "source": {"uri": f"{ROOT}/more"},
        "artifact": f"{ROOT}/artifact",
        "output": f"{ROOT}/re",
    }
    spec = parse_job(values, "calibrate")
    assert isinstance(spec, CalibrateSpec)
    jobs.calibrate(spec, lambda *_: None)
    old, new = (read_record(f"{ROOT}/{name}", Storage()) for name in ("artifact", "re"))
    assert new.body["preprocess"] == old.body["preprocess"] and len(new.calibration.scores) == 5


def data_set(root: Path, mask_size: tuple[int, int] = (128, 80), orientation: int = 1) -> None:
    """A data set in the layout of MVTec AD of two categories; spots lie left in one and right in the other."""
    for category, left in (("bolt", 20), ("nut", 96)):
        for i in range(10):
            write(root / category / "train" / "good" / f"{i:03d}.png", picture(i), orientation)
        for i in range(3):
            image, mask = spotted(700 + i, left)
            write(root / category / "test" / "good" / f"{i:03d}.png", picture(800 + i), orientation)
            write(root / category / "test" / "spot" / f"{i:03d}.png", image, orientation)
            shown = np.asarray(Image.fromarray(mask).resize(mask_size, Image.Resampling.NEAREST))
            write(root / category / "ground_truth" / "spot" / f"{i:03d}_mask.png", shown, orientation)


def write(path: Path, upright: np.ndarray, orientation: int) -> None:
    """Writes a picture as a camera that is held sideways does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown, exif = Image.fromarray(upright), Image.Exif()
    if orientation == 6:
        shown = shown.transpose(Image.Transpose.ROTATE_90)
    exif[0x0112] = orientation
    shown.save(path, exif=exif)


def evaluated(root: Path, view: dict[str, Any], output: str = "out", **changes: Any) -> dict[str, Any]:
    values = {
        "kind": "evaluate",
        "data": {"uri": str(root), "layout": "mvtec_ad"},
        "output": f"{root}/../{output}",
        "detectors": [DETECTOR],
        "replicates": 0,
        "holdout_ratio": 0.25,
        "view": view,
        "resources": {"cpus_per_worker": 1},
        **changes,
    }
    spec = parse_job(values, "evaluate")
    assert isinstance(spec, EvaluateSpec)
    evaluation = plan_evaluation(spec)
    return {str(cell.category): run_cell(evaluation, cell, lambda *_: None) for cell in evaluation.cells}


def auroc(cell: dict[str, Any], name: str = "pixel_auroc") -> float:
    (figures,) = (category["figures"] for category in cell["categories"].values())
    return float(figures[name]["value"])


@pytest.mark.parametrize(
    "view", [VIEWS["pad"], VIEWS["tiles"], VIEWS["scaled"], {"region": [[[0, 0], [1, 0], [1, 0.8], [0, 0.8]]]}]
)
def test_an_evaluation_looks_as_it_is_told_also_at_turned_images(view: dict[str, Any], tmp_path: Path) -> None:
    figures = []
    for orientation in (1, 6):
        data_set(tmp_path / "data", orientation=orientation)
        cells = evaluated(tmp_path / "data", view, f"out-{orientation}")
        assert set(cells) == {"bolt", "nut"}
        figures.append([auroc(cells[name]) for name in ("bolt", "nut")])
        artifact = read_record(cells["bolt"]["artifact"]["uri"], Storage())
        assert artifact.preprocess.view.recorded()
    assert figures[0] == figures[1] and min(figures[0]) > 0.9


def test_a_mask_of_another_size_is_refused_with_any_view(tmp_path: Path) -> None:
    data_set(tmp_path / "data", mask_size=(64, 40))
    for view in ({}, VIEWS["tiles"], VIEWS["crop"]):
        with pytest.raises(MaskError, match="is 128 x 80 px and its mask 64 x 40"):
            evaluated(tmp_path / "data", view, f"out-{len(str(view))}")


def halves(folder: Path) -> str:
    """Masks of two categories: left for bolts, right for nuts."""
    folder.mkdir(parents=True, exist_ok=True)
    for category, columns in (("bolt", slice(0, 16)), ("nut", slice(16, 32))):
        mask = np.zeros((20, 32), np.uint8)
        mask[:, columns] = 255
        (folder / f"{category}.png").write_bytes(encode(mask))
    return f"{folder}/{{category}}.png"


def test_each_category_of_an_evaluation_has_its_region_and_a_new_mask_is_a_new_cell(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    region = halves(tmp_path / "masks")
    cells = evaluated(tmp_path / "data", {"region": region})
    assert min(auroc(cells[name], "image_auroc") for name in cells) == 1.0
    wrong = evaluated(tmp_path / "data", {"region": region.replace("{category}", "nut")}, "wrong")
    assert auroc(wrong["bolt"], "image_auroc") < 1.0  # its spots lie left and are not looked at
    values = {
        "kind": "evaluate",
        "data": {"uri": str(tmp_path / "data"), "layout": "mvtec_ad"},
        "output": str(tmp_path),
    }
    spec = parse_job({**values, "detectors": [DETECTOR], "view": {"region": region}}, "job")
    assert isinstance(spec, EvaluateSpec)
    before = {cell.category: cell.digest for cell in plan_evaluation(spec).cells}
    (tmp_path / "masks" / "nut.png").write_bytes(encode(np.full((9, 9), 255, np.uint8)))
    after = {cell.category: cell.digest for cell in plan_evaluation(spec).cells}
    assert after["bolt"] == before["bolt"] and after["nut"] != before["nut"]
    (tmp_path / "masks" / "nut.png").unlink()
    assert any("nut.png of category 'nut' does not exist" in text for text in find_problems(spec))


def test_each_category_of_a_fleet_has_its_region(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    region = halves(tmp_path / "masks")
    source = {"uri": str(tmp_path / "data"), "pattern": "{category}/train/{defect}/{name}.png"}
    settings = {"source": source, "artifact": f"{tmp_path}/fleet", "view": {"region": region}}
    fit(**settings, per_category=True)
    records = read_records(read_index(f"file://{tmp_path}/fleet", Storage()), Storage())
    for category, columns in (("bolt", slice(0, 32)), ("nut", slice(32, 64))):
        looked = records[category].preprocess.layout((64, 40)).looked
        assert looked is not None and looked[:, (columns.start * 48) // 64 : (columns.stop * 48) // 64].all()
        assert looked.mean() == 0.5
        alone = {**source, "pattern": f"{category}/train/{{defect}}/{{name}}.png"}
        fit(source=alone, artifact=f"{tmp_path}/alone", view={"region": f"{tmp_path}/masks/{category}.png"})
        other = read_record(f"file://{tmp_path}/alone", Storage()).body
        assert other["tensors"]["sha256"] == records[category].body["tensors"]["sha256"]
        assert other["calibration"] == records[category].body["calibration"]
    with pytest.raises(SpecError, match=r"mask for each \{category\}"):
        parse_job({**FIT, **settings}, "fit")
    (tmp_path / "masks" / "nut.png").unlink()
    spec = parse_job({**FIT, **settings, "per_category": True, "replace": True}, "fit")
    assert isinstance(spec, FitSpec)
    (problem,) = find_problems(spec)
    assert "masks/nut.png of category 'nut' does not exist. Add it or correct the URI." in problem
    with pytest.raises(SpecError, match="'nut' does not exist"):
        jobs.fit(spec, lambda *_: None)


@pytest.mark.usefixtures("data")
def test_overrides_and_mistakes_of_views() -> None:
    values = apply_overrides(FIT, ("view.tile.overlap=32", "view.scale=0.5"))
    spec = parse_job(values, "fit")
    assert isinstance(spec, FitSpec) and spec.view.tile is not None
    assert (spec.view.tile.overlap, spec.view.scale) == (32, 0.5)
    for view, word in (
        ({"resize": "pads"}, "resize"),
        ({"tile": {"overlaps": 3}}, "overlap"),
        ({"tile": {}, "resize": "pad"}, "remove resize"),
        ({"scale": 2}, "add tile"),
        ({"region": [[[0, 0], [1, 1]]]}, "region"),
    ):
        with pytest.raises(SpecError, match=word):
            parse_job({**FIT, "view": view}, "fit")
    spec = parse_job({**FIT, "view": {"size": [64, 64], "crop": [56, 56]}}, "fit")
    assert isinstance(spec, FitSpec)
    assert any("image_size to the crop" in text for text in find_problems(spec))
    spec = parse_job({**FIT, "view": {"region": f"{ROOT}/none.png"}}, "fit")
    assert isinstance(spec, FitSpec)
    assert any("none.png does not exist" in text for text in find_problems(spec))


def test_the_commands_take_views_and_give_hints(tmp_path: Path) -> None:
    for i in range(10):
        write(tmp_path / "normal" / f"{i:03d}.png", picture(i, (300, 150)), 1)
        write(tmp_path / "new" / f"{i:03d}.png", picture(50 + i, (150, 96)), 1)
    job = tmp_path / "fit.yaml"
    values = {**FIT, "source": {"uri": f"{tmp_path}/normal"}, "artifact": f"{tmp_path}/artifact"}
    job.write_text(yaml.safe_dump(values))

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, result.output
        return str(result.output)

    checked, fitted = call("check", str(job)), call("fit", str(job), "--local")
    for text in (checked, fitted):
        assert text.count("Hint: most images are oblong (2 times as wide as high)") == 1
        assert "image_size: [48, 96] uses the whole input" in text
        assert "Hint: most images (300 x 150 px) are more than 4 times as large as the input (48 x 48 px)" in text
        assert "view: {tile: {overlap: 12}} looks at them in 32 tiles, and with scale: 0.5 in 8." in text
    assert len(read_record(f"file://{tmp_path}/artifact", Storage()).body["hints"]) == 2
    tiled = call("fit", str(job), "--local", "--replace", "--set", "view.tile.overlap=16")
    assert "Hint" not in tiled
    record = read_record(f"file://{tmp_path}/artifact", Storage()).body
    assert record["preprocess"]["view"] == {"tile": {"size": None, "overlap": 16}} and "hints" not in record
    score_job = tmp_path / "score.yaml"
    changed = {"source": {"uri": f"{tmp_path}/new"}, "artifact": f"{tmp_path}/artifact"}
    score_job.write_text(yaml.safe_dump({**SCORE, **changed, "sink": {"uri": f"{tmp_path}/results"}}))
    planned = call("plan", str(score_job))
    assert "Images     10 (counted in the listing)" in planned
    assert "Tiles      150 (15.0 for each image, from 10 sampled images)" in planned
    result = forecast(plan_score(_score_spec(score_job)), [1], None)
    rate = record["tiles_per_second"] / 15
    assert result.images_per_second == pytest.approx(rate) and result.estimates[0].hours == pytest.approx(
        10 / rate / 3600
    )


def _score_spec(path: Path) -> ScoreSpec:
    spec = parse_job(yaml.safe_load(path.read_text()), "score")
    assert isinstance(spec, ScoreSpec)
    return spec


@pytest.mark.usefixtures("data")
def test_tiles_outside_of_the_region_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    plain = PatchCore.score

    def noted(detector: PatchCore, images_BCHW: Any) -> Any:
        counted.append(len(images_BCHW))
        return plain(detector, images_BCHW)

    monkeypatch.setattr(PatchCore, "score", noted)
    totals = []
    for view in (VIEWS["tiles"], VIEWS["all"]):
        fit(view=view)
        counted.clear()
        score(batch_size=1, sink={"uri": f"{ROOT}/results-{len(totals)}", "heatmaps": "none"})
        totals.append(sum(counted))
    # 4 x 2 tiles of 48 px, of which the right half is left out; and one input when the artifact is loaded
    assert totals == [3 * 8 + 1, 3 * 4 + 1]


def test_a_record_with_a_damaged_view_is_refused() -> None:
    assert View.of_record({}) == View(replace(View.of_record({}).spec))
    pack(f"{ROOT}/normal", "", [(f"{i:03d}.png", encode(picture(i))) for i in range(8)], 1)
    fit(view=VIEWS["all"])
    path = f"{ROOT}/artifact/artifact.json"
    body = json.loads(Storage().read(path))
    body["preprocess"]["view"]["region"]["polygons"] = [[[0, 0], [5, 5]]]
    Storage().write(path, json.dumps(body).encode())
    with pytest.raises(Exception, match=r"is damaged or foreign \(preprocess"):
        read_record(f"{ROOT}/artifact", Storage())
    assert member_uri("a", "b")
