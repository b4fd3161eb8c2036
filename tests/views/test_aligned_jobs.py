"""Alignment in whole jobs: fits, scores, evaluations, exports, reports, Python, and any number of workers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from raydetect import create_model
from raydetect.artifacts.record import read_record
from raydetect.check import find_problems
from raydetect.config import FitSpec, parse_job
from raydetect.errors import ArtifactError, SpecError
from raydetect.export.coco import write_coco
from raydetect.fitting.fit_run import FitRun
from raydetect.local import jobs
from raydetect.report.pictures import Pictures
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from raydetect.views.align import shift_in
from raydetect.views.view import View
from tests.builders.archives import pack
from tests.builders.images import encode
from tests.contracts.cases import CASES, Case
from tests.views.test_tiled_fits import _one_thread_at_a_time, fit_over, spec_of
from tests.views.test_view_jobs import FIT, ROOT, SCORE, evaluated, fit, score, write

HEIGHT, WIDTH, MARGIN = 96, 128, 8  # the part moves by up to 5 % of a side
ALIGN = {"align": "phase", "align_to": f"{ROOT}/reference.png"}
SQUARE = [[[0.2, 0.2], [0.8, 0.2], [0.8, 0.8], [0.2, 0.8]]]
KINDS = [case for case in CASES if case.name in ("patchcore", "spade")]
__all__ = ["_one_thread_at_a_time"]


def part(seed: int = 0) -> np.ndarray:
    """A printed board in front of the camera with a margin on all sides: edges and marks, float64 levels."""
    random = np.random.default_rng(40)
    board_HW = np.full((HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN), 70.0)
    for _ in range(60):
        y, x = random.integers(0, board_HW.shape[0] - 8), random.integers(0, board_HW.shape[1] - 8)
        high, wide = random.integers(3, 14, 2)
        board_HW[y : y + high, x : x + wide] = random.uniform(20, 235)
    board_HW = ndimage.gaussian_filter(board_HW, 0.7)
    return board_HW + np.random.default_rng([41, seed]).normal(0, 2, board_HW.shape)


def picture(number: int, moves: bool = True, defect: tuple[int, int] | None = None) -> tuple[np.ndarray, Any]:
    """A picture, uint8 RGB, and (x, y) by which its part is moved; a defect has its place on the part."""
    random = np.random.default_rng([42, number])
    limits = np.array([0.05 * WIDTH, 0.05 * HEIGHT])
    across, down = random.uniform(-limits, limits) if moves else (0.0, 0.0)
    board_HW = part(number)
    if defect is not None:
        x, y = defect[0] + MARGIN, defect[1] + MARGIN
        board_HW[y : y + 12, x : x + 12] = np.indices((12, 12)).sum(axis=0) % 4 // 2 * 255
    moved_HW = ndimage.shift(board_HW, (down, across), order=1, mode="nearest")[MARGIN:-MARGIN, MARGIN:-MARGIN]
    grey_HW = np.clip(np.round(moved_HW), 0, 255).astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, axis=2), (across, down)


@pytest.fixture
def data() -> dict[str, Any]:
    """Normal pictures, new ones of which some have a defect, and the reference; the moves of the new ones by name."""
    Storage().write(f"{ROOT}/reference.png", encode(picture(0, moves=False)[0]))
    pack(f"{ROOT}/normal", "", [(f"{i:03d}.png", encode(picture(i)[0])) for i in range(40)], 1)
    new = {f"good{i}": picture(100 + i) for i in range(12)} | {
        f"odd{i}": picture(200 + i, True, (60, 40)) for i in range(4)
    }
    new["flat"] = (np.full((HEIGHT, WIDTH, 3), 80, np.uint8), None)
    pack(f"{ROOT}/new", "", [(f"{name}.png", encode(image)) for name, (image, _) in new.items()], 1)
    return {name: by for name, (_, by) in new.items()}


def named(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["key"].rpartition("#")[2].removesuffix(".png"): row for row in rows}


def test_normal_pictures_spread_less_and_defects_are_found_where_they_are(data: dict[str, Any]) -> None:
    spreads, gaps = [], []
    for view in ({}, ALIGN):
        fit(view=view)
        rows = named(score(sink={"uri": f"{ROOT}/results-{len(spreads)}"}))
        assert {row["status"] for row in rows.values()} == {"ok"}
        good = np.array([rows[f"good{i}"]["image_score"] for i in range(12)])
        odd = np.array([rows[f"odd{i}"]["image_score"] for i in range(4)])
        spreads.append(float(good.std()))
        gaps.append(float((odd.min() - good.mean()) / good.std()))
    assert spreads[1] < spreads[0] and gaps[1] > gaps[0], (spreads, gaps)
    assert rows["flat"]["note"] == "not_aligned"
    for name, by in data.items():
        if by is not None:
            found = shift_in(rows[name]["note"])
            assert rows[name]["note"].startswith("aligned: ")
            assert max(abs(a - b) for a, b in zip(found, by, strict=True)) <= 0.25, (name, found, by)
        if name.startswith("odd"):
            region = rows[name]["regions"][0]
            x, y = 66 + by[0], 46 + by[1]  # its middle
            assert region["x"] <= x <= region["x"] + region["width"]
            assert region["y"] <= y <= region["y"] + region["height"]
            assert max(abs(region["peak_x"] - x), abs(region["peak_y"] - y)) <= 12


@pytest.mark.parametrize(
    "view",
    [ALIGN, {**ALIGN, "resize": "pad"}, {**ALIGN, "resize": "short_side"}, {**ALIGN, "region": SQUARE}],
    ids=["stretch", "pad", "short_side", "region"],
)
def test_python_reports_and_coco_follow_the_record(data: dict[str, Any], view: dict[str, Any], tmp_path: Path) -> None:
    facts = fit(view=view)
    body = read_record(f"{ROOT}/artifact", Storage()).body
    assert body["preprocess"] == facts["preprocess"] and set(body["preprocess"]["view"]["align"]) == {"max", "png"}
    rows = named(score(flag={"alpha": 0.2}))
    names = ["good0", "odd0", "odd1", "flat"]
    pictures = [picture(100)[0], picture(200, True, (60, 40))[0], picture(201, True, (60, 40))[0]]
    pictures.append(np.full((HEIGHT, WIDTH, 3), 80, np.uint8))
    model = create_model.load(f"{ROOT}/artifact").configure(batch_size=8, threads=1)
    scores = model.predict_proba(pictures)
    np.testing.assert_array_equal(scores, np.array([rows[name]["image_score"] for name in names], np.float32))
    maps = model.predict_anomaly_map(pictures)
    for name, map_HW in zip(names[1:3], maps[1:3], strict=True):
        assert np.isnan(map_HW).any()
        y, x = np.unravel_index(np.nanargmax(map_HW), map_HW.shape)
        peak = rows[name]["regions"][0]
        assert abs(x - peak["peak_x"]) <= 4 and abs(y - peak["peak_y"]) <= 4
    ledger = Ledger(f"{ROOT}/results", Storage())
    run = json.loads(Storage().read(f"{ROOT}/results/run.json"))
    assert "align" not in run["view"]
    reader = Pictures(ledger, run, Storage())
    for name in names:
        whole_HW = reader.anomaly_map(rows[name])
        assert whole_HW is not None
        map_HW, layout = reader.located(rows[name], whole_HW)
        assert layout.shift == shift_in(rows[name]["note"]) and map_HW.shape == layout.canvas
    write_coco(reader, tmp_path / "coco.json", None, False)
    coco = json.loads((tmp_path / "coco.json").read_text())
    keys = {image["id"]: image["key"] for image in coco["images"]}
    for row in rows.values():
        boxes = [[r[n] for n in ("x", "y", "width", "height")] for r in row["regions"] or ()]
        assert [a["bbox"] for a in coco["annotations"] if keys[a["image_id"]] == row["key"]] == boxes


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
@pytest.mark.usefixtures("data")
def test_an_aligned_fit_is_the_same_for_any_number_of_workers(case: Case) -> None:
    bodies = []
    pack("memory://views/normal", ".tar", [(f"{i:03d}.png", encode(picture(i)[0])) for i in range(10)], 3)
    for size in (1, 2, 4):
        fit_over(spec_of(case, f"over-{size}", view={**ALIGN, "region": SQUARE}), size)
        bodies.append(read_record(f"memory://views/over-{size}", Storage()).body)
    for body in bodies[1:]:
        assert [body[name] for name in ("tensors", "calibration", "images", "preprocess")] == [
            bodies[0][name] for name in ("tensors", "calibration", "images", "preprocess")
        ]


@pytest.mark.usefixtures("data")
def test_cached_images_have_the_layout_that_they_were_decoded_with(monkeypatch: pytest.MonkeyPatch) -> None:
    shifts: list[tuple[float, float]] = []
    plain = FitRun._held_out

    def noted(work: FitRun, folds: list[list[str]]) -> list[str]:
        shifts.extend(image.shift for image in work.cache.images.values())
        return plain(work, folds)

    monkeypatch.setattr(FitRun, "_held_out", noted)
    fit(view=ALIGN)
    expected = [picture(i)[1] for i in range(40)]
    assert len(shifts) == 40
    np.testing.assert_allclose(shifts, expected, atol=0.25)


def test_an_evaluation_compares_masks_in_px_of_the_stored_picture(tmp_path: Path) -> None:
    for i in range(16):
        write(tmp_path / "data/board/train/good" / f"{i:03d}.png", picture(i)[0], 1)
    for i in range(4):
        write(tmp_path / "data/board/test/good" / f"{i:03d}.png", picture(300 + i)[0], 1)
        image, (across, down) = picture(400 + i, True, (60, 40))
        x, y = 60 + round(across), 40 + round(down)
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y : y + 12, x : x + 12] = 255
        write(tmp_path / "data/board/test/spot" / f"{i:03d}.png", image, 1)
        write(tmp_path / "data/board/ground_truth/spot" / f"{i:03d}_mask.png", mask, 1)
    write(tmp_path / "references/board.png", picture(0, moves=False)[0], 1)
    aligned = {"align": "phase", "align_to": f"{tmp_path}/references/{{category}}.png"}
    figures = []
    for view in ({}, aligned):
        (cell,) = evaluated(tmp_path / "data", view, f"out-{len(figures)}").values()
        (category,) = cell["categories"].values()
        figures.append(category["figures"]["pixel_auroc"]["value"])
    assert figures[1] > max(0.95, figures[0] - 0.01), figures


@pytest.mark.usefixtures("data")
def test_mistakes_are_told_before_a_job_starts() -> None:
    for view, word in (
        ({"align": "phase"}, "align: phase needs align_to, the URI of a picture"),
        ({"align_to": "a.png"}, "apply to align: phase only"),
        ({"align": "phase", "align_to": "a/{category}.png"}, r"or view.align_to a picture, but the job fits one"),
    ):
        with pytest.raises(SpecError, match=word):
            parse_job({**FIT, "view": view}, "fit")
    for name, data, word in (
        ("none.png", None, "view.align_to: the picture memory:///views/none.png does not exist"),
        ("flat.png", encode(np.full((64, 64), 7, np.uint8)), "shows nothing by which a shift could be told"),
    ):
        if data is not None:
            Storage().write(f"{ROOT}/{name}", data)
        spec = parse_job({**FIT, "view": {**ALIGN, "align_to": f"{ROOT}/{name}"}}, "fit")
        assert isinstance(spec, FitSpec)
        assert any(word in text for text in find_problems(spec)), find_problems(spec)
        with pytest.raises(SpecError, match=word):
            jobs.fit(spec, lambda *_: None)


@pytest.mark.usefixtures("data")
def test_a_damaged_reference_in_an_artifact_is_refused() -> None:
    fit(view=ALIGN)
    path = f"{ROOT}/artifact/artifact.json"
    body = json.loads(Storage().read(path))
    view = View.of_record(body["preprocess"]["view"])
    assert view.alignment is not None and view.alignment.size == (WIDTH, HEIGHT)
    assert replace(view, alignment=None).recorded() == {}
    body["preprocess"]["view"]["align"]["png"] = "AAAA"
    Storage().write(path, json.dumps(body).encode())
    with pytest.raises(ArtifactError, match="damaged"):
        read_record(f"{ROOT}/artifact", Storage())
    assert SCORE["artifact"] == f"{ROOT}/artifact"
