"""Evaluation: layouts, cells that resume, figures against scikit-learn, leaderboards, results of earlier runs."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from sklearn.metrics import roc_auc_score

from raydetect.archives.dataset_layouts import read_layout
from raydetect.artifacts.store import load_artifact
from raydetect.cli.main import main
from raydetect.config import EvaluateSpec, LabelledSpec, parse_job
from raydetect.config.validation import parse_yaml
from raydetect.errors import SpecError, StorageError
from raydetect.evaluation.cells import plan_evaluation
from raydetect.evaluation.leaderboard import ALL, leaderboard
from raydetect.images.decode import decode_windows
from raydetect.images.masks.reading import Masks
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.local import jobs
from raydetect.metrics.pro import aupro
from raydetect.planning.plan import plan_score
from raydetect.records import Member
from raydetect.scoring.batches import score_batches
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.images import DEFECTS, defect_image, encode, normal_image

PARAMS = {"backbone": "resnet18", "weights": "random", "image_size": [64, 64], "smoothing_sigma": 2}
JOB: dict[str, Any] = {
    "kind": "evaluate",
    "detectors": [{"name": "patchcore", "params": PARAMS}],
    "grid": {"coreset_sampling_ratio": [0.02, 0.05]},
    "replicates": 20,
    "holdout_ratio": 0.4,
}


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def image(i: int) -> bytes:
    return encode(normal_image(i, 32))


def layout(root: Path, kind: str, **settings: Any) -> dict[str, tuple[Any, ...]]:
    found = read_layout(LabelledSpec(uri=str(root), layout=kind, **settings), Storage())  # type: ignore[arg-type]
    return {i.path: (i.category, i.split, i.label, i.defect, i.mask) for i in found}


def test_mvtec_ad_and_btad(tmp_path: Path) -> None:
    names = ["cap/train/good/0.png", "cap/test/good/1.png", "cap/test/hole/2.bmp", "cap/ground_truth/hole/2_mask.png"]
    put(tmp_path / "a", {name: b"x" for name in [*names, "cap/readme.txt", "cap/test/hole/deep/5.png"]})
    assert layout(tmp_path / "a", "mvtec_ad") == {
        "cap/train/good/0.png": ("cap", "train", 0, "good", None),
        "cap/test/good/1.png": ("cap", "test", 0, "good", None),
        "cap/test/hole/2.bmp": ("cap", "test", 1, "hole", "cap/ground_truth/hole/2_mask.png"),
    }
    put(tmp_path / "b", {name: b"x" for name in ["01/train/ok/0.bmp", "01/test/ko/3.bmp", "01/ground_truth/ko/3.png"]})
    assert layout(tmp_path / "b", "btad") == {
        "01/train/ok/0.bmp": ("01", "train", 0, "ok", None),
        "01/test/ko/3.bmp": ("01", "test", 1, "ko", "01/ground_truth/ko/3.png"),
    }


def test_mvtec_ad_2_leaves_out_what_has_no_label(tmp_path: Path) -> None:
    names = [
        "can/train/good/0.png", "can/validation/good/1.png", "can/test_public/good/2.png", "can/test_public/bad/3.png",
        "can/test_public/ground_truth/bad/3_mask.png", "can/test_private/4.png", "can/test_private_mixed/5.png",
    ]  # fmt: skip
    put(tmp_path, {name: b"x" for name in names})
    assert layout(tmp_path, "mvtec_ad2") == {
        "can/train/good/0.png": ("can", "train", 0, "good", None),
        "can/test_public/good/2.png": ("can", "test", 0, "good", None),
        "can/test_public/bad/3.png": ("can", "test", 1, "bad", "can/test_public/ground_truth/bad/3_mask.png"),
    }


def test_visa_is_read_from_its_split_csv_and_a_folder_from_its_manifest(tmp_path: Path) -> None:
    visa = "object,split,label,image,mask\npcb,train,normal,pcb/0.JPG,\npcb,test,anomaly,pcb/1.JPG,pcb/1.png\n"
    put(tmp_path / "v", {"split_csv/1cls.csv": visa.encode()})
    assert layout(tmp_path / "v", "visa") == {
        "pcb/0.JPG": ("pcb", "train", 0, "normal", None),
        "pcb/1.JPG": ("pcb", "test", 1, "anomaly", "pcb/1.png"),
    }
    listed = "\ufeffpath,split,label,defect,mask\na/0.png,train,0,good,\na/1.png,test,1,hole,m/1.png\n"
    put(tmp_path / "m", {"manifest.csv": listed.encode()})
    assert layout(tmp_path / "m", "manifest") == {
        "a/0.png": ("", "train", 0, "good", None),
        "a/1.png": ("", "test", 1, "hole", "m/1.png"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,split\na.png,train\n", "no column 'label'"),
        ("path,split,label\na.png,train,good\n", "line 2 has the label 'good'"),
        ("path,split,label\n../a.png,train,0\n", "member name"),
        ("path,split,label\na.png,train,0\n", "contains no test images"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path, {"manifest.csv": text.encode()})
    with pytest.raises(SpecError, match=message):
        layout(tmp_path, "manifest")


def test_a_category_that_is_not_there_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"cap/train/good/0.png": b"x", "cap/test/good/1.png": b"x"})
    with pytest.raises(SpecError, match=r"'cup' is not in .* Available: cap"):
        layout(tmp_path, "mvtec_ad", categories=("cup",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "set exactly one of data, archive and results"),
        ({"data": {"uri": "x", "layout": "btad"}, "detectors": []}, "set detectors with data or archive"),
        ({"results": ["x"], "detectors": [], "seeds": [1]}, "remove them with results"),
        ({"data": {"uri": "x", "layout": "mvtec"}}, "mvtec_ad"),
        (
            {"archive": {"train": {"uri": "x"}, "test": {"uri": "y"}}, "per_category": False},
            "per_category applies to data",
        ),
    ],
)
def test_a_job_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    grid = {} if "results" in changes else JOB["grid"]
    with pytest.raises(SpecError, match=message):
        parse_job({**JOB, "grid": grid, "output": "x", **changes}, "job")


def data_set(root: Path) -> None:
    """Two categories in the layout of MVTec AD."""
    files = {}
    for turn, category in enumerate(("cap", "cup")):
        for i in range(12):
            files[f"{category}/train/good/{i}.png"] = encode(np.roll(normal_image(i), turn, -1))
        for i in range(5):
            files[f"{category}/test/good/{i}.png"] = encode(np.roll(normal_image(900 + i), turn, -1))
        for defect in DEFECTS[:2]:
            for i in range(2):
                picture, mask = defect_image(i, defect)
                files[f"{category}/test/{defect}/{i}.png"] = encode(np.roll(picture, turn, -1))
                files[f"{category}/ground_truth/{defect}/{i}_mask.png"] = encode(mask)
    put(root, files)


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Result]:
    root = tmp_path_factory.mktemp("evaluate")
    data_set(root / "data")
    settings = {"data": {"uri": str(root / "data"), "layout": "mvtec_ad"}, "output": str(root / "out"), "seeds": [0, 1]}
    job = root / "job.yaml"
    job.write_text(yaml.safe_dump({**JOB, **settings}))
    return root, str(job), call("evaluate", str(job), "--local")


def cells_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((root / "out" / "cells").glob("*.json"))]


def test_a_grid_over_two_seeds_and_categories_makes_eight_cells_and_a_leaderboard(
    evaluated: tuple[Path, str, Result],
) -> None:
    root, job, ended = evaluated
    assert ended.exit_code == 0, ended.output
    assert "Judged 72 images in 8 cells." in ended.output and "Leaderboard: file://" in ended.output
    assert len(cells_of(root)) == 8
    table = pq.read_table(root / "out" / "leaderboard.parquet").to_pylist()
    assert [row["category"] for row in table] == [ALL] * 2 + ["cap"] * 2 + ["cup"] * 2
    text = (root / "out" / "leaderboard.csv").read_text()
    assert [row["detector"] for row in csv.DictReader(io.StringIO(text))] == [row["detector"] for row in table]
    assert (root / "out" / "leaderboard.md").read_text().count("\n") == 8
    for row in table:
        assert row["seeds"] == 2 and "coreset_sampling_ratio=0.0" in row["detector"]
        mine = [c for c in cells_of(root) if c["line"] == row["detector"] and c["category"] == row["category"]]
        if mine:
            values = [c["categories"][row["category"]]["figures"]["pixel_auroc"]["value"] for c in mine]
            assert row["pixel_auroc"] == pytest.approx(np.mean(values))
            assert row["pixel_auroc_std"] == pytest.approx(np.std(values, ddof=1))
            assert row["fit_seconds"] > 0 and row["images_per_second"] > 0 and row["peak_memory_bytes"] > 1e7
    assert call("check", job).output.endswith("ready to evaluate.\n")


def test_one_detector_for_all_categories_has_figures_of_each_and_their_mean(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    data = {"uri": str(tmp_path / "data"), "layout": "mvtec_ad"}
    settings = {"data": data, "output": str(tmp_path / "out"), "per_category": False, "grid": {}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**JOB, **settings}))
    ended = call("evaluate", str(tmp_path / "job.yaml"))
    assert ended.exit_code == 0 and "Runs in this process (1 cell)" in ended.output, ended.output
    (cell,) = cells_of(tmp_path)
    assert cell["category"] is None and set(cell["categories"]) == {"cap", "cup"}
    images = list((tmp_path / "data").glob("*/train/good/*.png"))
    assert cell["fitted_images"] > len(images) / 2
    both, *each = pq.read_table(tmp_path / "out" / "leaderboard.parquet").to_pylist()
    assert both["category"] == ALL and both["fit_seconds"] == cell["fit_seconds"]
    assert both["image_auroc"] == pytest.approx(np.mean([row["image_auroc"] for row in each])) and len(each) == 2
    assert call("check", str(tmp_path / "job.yaml")).output.endswith("ready to evaluate.\n")


def test_figures_are_those_of_scikit_learn_and_of_exact_code_on_the_same_maps(
    evaluated: tuple[Path, str, Result],
) -> None:
    root, _, _ = evaluated
    cell = next(c for c in cells_of(root) if c["category"] == "cap")
    detector = load_artifact(cell["artifact"]["uri"], Storage()).detector
    paths = sorted((root / "data" / "cap" / "test").rglob("*.png"))
    rules = DecodeRules(10**6, True)
    members = [Member("k", "u", data=path.read_bytes()) for path in paths]
    decoded = [item for member in members for item in decode_windows(member, rules, Preprocess((64, 64)))]
    scored = list(score_batches(detector, decoded, 16))
    masks = []
    for path in paths:
        truth = root / "data" / "cap" / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        empty = Image.fromarray(np.zeros((64, 64), bool))
        masks.append(np.asarray((Image.open(truth).convert("1") if truth.exists() else empty).resize((64, 64), 0)))
    labels = [int(path.parent.name != "good") for path in paths]
    figures = cell["categories"]["cap"]["figures"]
    expected = roc_auc_score(labels, [item.image_score for item in scored])
    assert figures["image_auroc"]["value"] == pytest.approx(expected, abs=1e-12)
    maps = [item.anomaly_map() for item in scored]
    pixel = roc_auc_score(np.stack(masks).ravel(), np.stack(maps).ravel())
    assert figures["pixel_auroc"]["value"] == pytest.approx(pixel, abs=figures["pixel_auroc"]["error_bound"] + 1e-9)
    for limit in (0.3, 0.05):
        found = figures[f"aupro_{limit}"]
        assert found["value"] == pytest.approx(aupro(maps, masks, limit), abs=found["error_bound"] + 1e-9)
        assert found["ci_low"] <= found["ci_high"] and found["error_bound"] < 0.01
    scratch = cell["categories"]["cap"]["defects"]["scratch"]
    assert scratch["images"] == {"normal": 5, "anomalous": 2, "without_mask": 0}
    assert set(scratch["figures"]) == set(figures) and len(figures) == 10


def test_finished_cells_are_not_evaluated_again(evaluated: tuple[Path, str, Result]) -> None:
    root, job, _ = evaluated
    before = {path.name: path.stat().st_mtime_ns for path in (root / "out" / "cells").iterdir()}
    gone = sorted(before)[0]
    kept = json.loads((root / "out" / "cells" / gone).read_text())
    (root / "out" / "cells" / gone).unlink()
    again = call("evaluate", job, "--local")
    assert again.exit_code == 0 and "7 of 8 cells are finished already" in again.output
    after = {path.name: path.stat().st_mtime_ns for path in (root / "out" / "cells").iterdir()}
    assert {name for name in before if before[name] == after[name]} == set(before) - {gone}
    found = json.loads((root / "out" / "cells" / gone).read_text())
    assert (found["categories"], found["artifact"]["uri"]) == (kept["categories"], kept["artifact"]["uri"])
    (root / "out" / "cells" / gone).write_text("{")
    broken = call("evaluate", job, "--local")
    assert broken.exit_code == 1 and "is damaged. Remove it" in broken.output
    (root / "out" / "cells" / gone).write_text(json.dumps(found))


def test_a_labelled_archive_gives_the_figures_of_its_results(tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/normal", ".tar", normal_files(20), 2)
    pack(f"file://{tmp_path}/mixed", ".tar", mixed_files(6, 2), 2)
    test = {
        "uri": f"{tmp_path}/mixed",
        "pattern": "{category}/test/{defect}/{name}.png",
        "mask_pattern": "{category}/ground_truth/{defect}/{name}_mask.png",
    }
    train = {"uri": f"{tmp_path}/normal", "pattern": "{category}/train/{defect}/{name}.png"}
    job = tmp_path / "archive.yaml"
    settings = {"archive": {"train": train, "test": test}, "output": f"{tmp_path}/out", "grid": {}}
    job.write_text(yaml.safe_dump({**JOB, **settings}))
    ended = call("evaluate", str(job), "--local")
    assert ended.exit_code == 0, ended.output
    cell = cells_of(tmp_path)[0]
    assert cell["categories"]["widget"]["images"] == {"normal": 6, "anomalous": 6, "without_mask": 0}
    score = {
        "kind": "score",
        "source": test,
        "artifact": cell["artifact"]["uri"],
        "sink": {"uri": f"{tmp_path}/results", "heatmaps": "none"},
        "flag": {"alpha": 0.2},
    }
    plan = plan_score(parse_job(score, "score"))  # type: ignore[arg-type]
    jobs.score(plan, lambda *_: None)
    there = {"kind": "evaluate", "results": [f"{tmp_path}/results"], "output": f"{tmp_path}/there", "replicates": 20}
    job.write_text(yaml.safe_dump(there))
    assert call("check", str(job)).exit_code == 0
    told = call("evaluate", str(job))
    assert told.exit_code == 0 and "Judged 12 images in 1 cells." in told.output
    row = pq.read_table(tmp_path / "there" / "leaderboard.parquet").to_pylist()[0]
    assert row["image_auroc"] == cell["categories"]["widget"]["figures"]["image_auroc"]["value"]
    assert "pixel_auroc" not in row and row["category"] == "widget"
    figures = pq.read_table(tmp_path / "there" / "figures.parquet").to_pylist()
    assert {figure["defect"] for figure in figures} == {"", *DEFECTS}


def turned_data_set(root: Path, orientation: int, masks_too: bool) -> None:
    """Wide pictures, stored turned with the orientation that sets them right, or as they are."""
    back = {1: None, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}

    def file(pixels: np.ndarray, turn: bool = True) -> bytes:
        picture, exif, buffer = Image.fromarray(pixels[:64]), Image.Exif(), io.BytesIO()
        if turn and back[orientation] is not None:
            picture = picture.transpose(back[orientation])  # type: ignore[arg-type]
            exif[0x0112] = orientation
        picture.save(buffer, "JPEG", exif=exif, quality=95, subsampling=0)
        return buffer.getvalue()

    files = {f"cap/train/good/{i}.jpg": file(normal_image(i)) for i in range(12)}
    files.update({f"cap/test/good/{i}.jpg": file(normal_image(900 + i)) for i in range(4)})
    for i in range(6):
        picture, mask = defect_image(i, "blob")
        files[f"cap/test/blob/{i}.jpg"] = file(picture)
        files[f"cap/ground_truth/blob/{i}_mask.jpg"] = file(np.where(mask, 255, 0).astype(np.uint8), masks_too)
    put(root, files)


@pytest.mark.parametrize(("orientation", "masks_too"), [(6, True), (8, True), (3, True), (6, False)])
def test_figures_stay_when_images_and_masks_are_turned_jpegs(tmp_path: Path, orientation: int, masks_too: bool) -> None:
    """With the same names in the same folder, so that the same images are held out."""
    found = []
    for name, way in (("upright", 1), ("turned", orientation)):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        turned_data_set(tmp_path / "data", way, masks_too)
        settings = {"data": {"uri": f"{tmp_path}/data", "layout": "mvtec_ad"}, "output": f"{tmp_path}/{name}-out"}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({**JOB, **settings, "grid": {}, "replicates": 5}))
        ended = call("evaluate", str(tmp_path / "job.yaml"), "--local")
        assert ended.exit_code == 0, ended.output
        cell = json.loads(next((tmp_path / f"{name}-out" / "cells").glob("*.json")).read_text())
        found.append(cell["categories"]["cap"]["figures"]["pixel_auroc"]["value"])
    assert found[0] > 0.8 and found[1] == pytest.approx(found[0], abs=0.06)  # noise of JPEG changes the coreset


def test_one_class_alone_ends_with_a_sentence(tmp_path: Path) -> None:
    listed = "path,split,label\n" + "".join(f"{i}.png,{'train' if i < 6 else 'test'},0\n" for i in range(8))
    put(tmp_path / "d", {"manifest.csv": listed.encode(), **{f"{i}.png": image(i) for i in range(8)}})
    settings = {"data": {"uri": f"{tmp_path}/d", "layout": "manifest"}, "output": f"{tmp_path}/out", "grid": {}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**JOB, **settings}))
    ended = call("evaluate", str(tmp_path / "job.yaml"), "--local")
    assert ended.exit_code == 1 and "there is nothing anomalous" in ended.output


def test_a_mask_of_another_image_is_refused(tmp_path: Path) -> None:
    listed = "path,split,label,mask\n" + "".join(f"{i}.png,train,0,\n" for i in range(6)) + "6.png,test,1,m.png\n"
    files = {f"{i}.png": image(i) for i in range(7)}
    put(tmp_path / "d", {"manifest.csv": listed.encode(), "m.png": encode(np.ones((9, 9), bool)), **files})
    settings = {"data": {"uri": f"{tmp_path}/d", "layout": "manifest"}, "output": f"{tmp_path}/out", "grid": {}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**JOB, **settings}))
    ended = call("evaluate", str(tmp_path / "job.yaml"), "--local")
    assert ended.exit_code == 1 and "is 32 x 32 px and its mask 9 x 9" in ended.output


def test_the_same_detector_twice_and_unknown_parameters_are_refused(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    settings = {"data": {"uri": f"{tmp_path}/data", "layout": "mvtec_ad"}, "output": f"{tmp_path}/out"}
    twice = {**JOB, **settings, "grid": {"coreset_sampling_ratio": [0.1, 0.1]}}
    with pytest.raises(SpecError, match="two of them are identical"):
        plan_evaluation(evaluate_spec(twice))
    with pytest.raises(SpecError, match="coreset_sampling"):
        plan_evaluation(evaluate_spec({**JOB, **settings, "grid": {"coreset_sampling": [0.1]}}))


def evaluate_spec(values: dict[str, Any]) -> EvaluateSpec:
    spec = parse_job(parse_yaml(yaml.safe_dump(values), "job"), "job")
    assert isinstance(spec, EvaluateSpec)
    return spec


def test_the_leaderboard_has_the_best_first_and_no_std_of_one_seed() -> None:
    def cell(line: str, seed: int, value: float) -> dict[str, Any]:
        figures = {"image_auroc": {"value": value}}
        costs = {"fit_seconds": 1.0, "images_per_second": 2.0, "peak_memory_bytes": seed + 1}
        return {"line": line, "seed": seed, "categories": {"c": {"figures": figures}}, **costs}

    rows = leaderboard([cell("a", 0, 0.5), cell("b", 0, 0.9), cell("b", 1, 0.7)])
    assert [(row["detector"], row["seeds"]) for row in rows] == [("b", 2), ("a", 1)]
    assert rows[0]["image_auroc"] == pytest.approx(0.8) and rows[0]["image_auroc_std"] == pytest.approx(0.02**0.5)
    assert rows[1]["image_auroc_std"] is None and rows[0]["peak_memory_bytes"] == 2


@pytest.mark.parametrize("suffix", [".tar", ".tar.zst", ".zip", ".parquet", ""])
def test_a_mask_of_more_bytes_than_an_image_may_have_is_not_read(suffix: str, tmp_path: Path) -> None:
    (first, *_) = pack(f"file://{tmp_path}", suffix, [("0.png", bytes(1000)), ("1.png", bytes(1001))], 1)
    path = "image/{}" if suffix == ".parquet" else "{}.png"
    scheme = {".tar": "tar", ".tar.zst": "member", ".zip": "zip", ".parquet": "parquetrow"}.get(suffix)
    uris = [f"{scheme}://{path.format(i)}::{first}" if scheme else f"file://{tmp_path}/{i}.png" for i in (0, 1)]
    masks = Masks(Storage(), DecodeRules(10**6, True), 1000)
    assert masks.read(uris[0]) == bytes(1000)
    with pytest.raises(StorageError, match=r"more than source\.max_image_bytes = 1,000 bytes"):
        masks.read(uris[1])


def test_a_detector_of_other_categories_is_trained_on_all_but_the_evaluated_one(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    params = {"image_size": [32, 32], "k_shot": 2, "epochs": 1}
    values: dict[str, Any] = {
        **JOB,
        "grid": {},
        "detectors": [{"name": "regad", "preset": "smoke", "params": params}],
        "data": {"uri": str(tmp_path / "data"), "layout": "mvtec_ad", "categories": ["cap"]},
        "output": str(tmp_path / "out"),
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(values))
    ended = call("evaluate", str(job), "--local")
    assert ended.exit_code == 0, ended.output
    (cell,) = cells_of(tmp_path)
    assert cell["category"] == "cap" and cell["auxiliary"] == {"images": 12, "categories": ["cup"], "bad": 0}
    named = {"uri": str(tmp_path / "data"), "pattern": "{category}/train/{defect}/{name}"}
    whole = plan_evaluation(parse_job(values, "job"))  # type: ignore[arg-type]
    other = plan_evaluation(parse_job({**values, "auxiliary": named}, "job"))  # type: ignore[arg-type]
    assert len(whole.others) == 24 and not other.others and whole.cells[0].digest != other.cells[0].digest
    plain = {**values, "detectors": JOB["detectors"]}
    with pytest.raises(SpecError, match="auxiliary: no detector of the job learns from auxiliary images"):
        plan_evaluation(parse_job({**plain, "auxiliary": named}, "job"))  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "data" / "cup")
    with pytest.raises(SpecError, match="auxiliary: regad learns from normal images of other categories"):
        plan_evaluation(parse_job(values, "job"))  # type: ignore[arg-type]
