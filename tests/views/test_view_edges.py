"""Views at their edges: overlaps of whole tiles, boxes of less than one px, and stored maps of parts of pictures."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from raydetect.artifacts.fit_preprocess import view_of
from raydetect.cli.main import main
from raydetect.config import TileSpec, ViewSpec
from raydetect.errors import SpecError
from raydetect.export.coco import write_coco
from raydetect.report.pictures import Pictures
from raydetect.sinks import heatmaps
from raydetect.sinks.heatmaps import map_png, overlay_png, read_png
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from raydetect.views.placement import bounded, in_whole, of_whole, placed, whole_size
from raydetect.views.view import MAX_CANVAS_PX, View, whole_box
from tests.builders.archives import pack
from tests.builders.images import encode
from tests.views.test_view_jobs import ROOT, SCORE, fit, picture, score


@pytest.mark.parametrize("overlap", [33, 64, 100])
def test_tiles_of_the_image_size_overlap_by_at_most_half(overlap: int) -> None:
    with pytest.raises(SpecError, match=rf"overlap = {overlap}: is more than half .* Set it to 32 or less"):
        view_of(ViewSpec(tile=TileSpec(overlap=overlap)), (64, 80), Storage())
    assert view_of(ViewSpec(tile=TileSpec(overlap=32)), (64, 80), Storage()).has_tiles
    assert view_of(ViewSpec(tile=TileSpec(size=(200, 200), overlap=overlap)), (64, 80), Storage()).has_tiles


@pytest.mark.parametrize("spec", [ViewSpec(resize="short_side"), ViewSpec(size=(80, 80), crop=(64, 64)), ViewSpec()])
def test_a_map_returns_unchanged_from_its_place_in_the_whole_picture(spec: ViewSpec) -> None:
    for size in ((224, 160), (160, 224), (97, 31), (31, 97), (500, 90), (1, 60), (60, 1), (1, 1)):
        layout = View(spec).layout(size, (64, 64))
        map_HW = np.random.default_rng(0).random(layout.canvas).astype(np.float32)
        whole_HW = in_whole(map_HW, layout)
        assert whole_HW.shape == whole_size(layout) and np.isfinite(whole_HW).sum() == map_HW.size, size
        found_HW, where = of_whole(whole_HW, layout)
        np.testing.assert_array_equal(found_HW, map_HW)
        assert where is layout


@pytest.mark.parametrize(
    ("image_size", "overlap"), [((64, 64), 16), ((96, 48), 12), ((256, 256), 64), ((256, 320), 64), ((512, 512), 64)]
)
def test_tiles_overlap_by_a_quarter_and_at_most_64_px(image_size: tuple[int, int], overlap: int) -> None:
    view, size = ViewSpec(tile=TileSpec()), (2000, 1500)
    of_job = view_of(view, image_size, Storage())
    assert of_job.recorded() == {"tile": {"size": None, "overlap": overlap}}  # whatever the default is some day
    assert View.of_record(of_job.recorded()) == of_job
    stated = View(ViewSpec(tile=TileSpec(overlap=overlap))).layout(size, image_size)
    assert of_job.layout(size, image_size).windows == stated.windows
    assert View(view).layout(size, image_size).windows == stated.windows
    sized = view_of(ViewSpec(tile=TileSpec(size=(100, 80))), image_size, Storage())
    assert sized.recorded() == {"tile": {"size": [100, 80], "overlap": 20}}


@pytest.mark.parametrize("size", [(20, 20_000), (20_000, 20), (1, 160), (700, 20_000), (1, 9000)])
@pytest.mark.parametrize(
    "spec", [ViewSpec(resize="short_side"), ViewSpec(resize="short_side", size=(80, 80), crop=(64, 64))]
)
def test_a_stored_map_has_a_bounded_size(spec: ViewSpec, size: tuple[int, int]) -> None:
    layout = View(spec).layout(size, (64, 64))
    scale = 64 / min(size) if spec.size is None else 80 / min(size)
    by = -(-max(map(round, (size[0] * scale, size[1] * scale))) // MAX_CANVAS_PX)
    side = max(1, 64 // by)
    map_HW = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    map_HW[:40, :40] = np.nan
    whole_HW = in_whole(map_HW, layout)
    assert whole_HW.shape == whole_size(layout) and max(whole_HW.shape) <= MAX_CANVAS_PX
    found_HW, where = of_whole(whole_HW, layout)
    assert where == bounded(layout) and where.box == layout.box and found_HW.shape == where.canvas == (side, side)
    edges = [i * 64 // side for i in range(side)] + [64]
    for row in range(side):
        for column in range(side):
            block = map_HW[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
            highest = np.nan if np.isnan(block).all() else np.nanmax(block)
            np.testing.assert_equal(found_HW[row, column], highest)
    assert placed(found_HW, where, (size[1], size[0])).shape == size[::-1]


def test_reports_and_exports_read_a_reduced_map(tmp_path: Path) -> None:
    pack(f"{ROOT}/normal", "", [(f"{i:03d}.png", encode(picture(i))) for i in range(12)], 1)
    long = np.tile(picture(900), (50, 1, 1))  # 4,000 px high, of which the middle 128 are looked at
    long[1990:2010, 50:70] = (250, 20, 20)
    pack(f"{ROOT}/new", "", [("a.png", encode(long[:, :16])), ("b.png", encode(long))], 1)
    fit(view={"resize": "short_side"})
    narrow, row = score(sink={**SCORE["sink"], "max_regions": 3})
    assert narrow["status"] == row["status"] == "ok"
    run = json.loads(Storage().read(f"{ROOT}/results/run.json"))
    pictures = Pictures(Ledger(f"{ROOT}/results", Storage()), run, Storage())
    for found, shape, canvas in ((narrow, (4000, 16), (16, 16)), (row, (1500, 48), (48, 48))):
        whole_HW = pictures.anomaly_map(found)
        assert whole_HW is not None and whole_HW.shape == shape
        map_HW, layout = pictures.located(found, whole_HW)
        assert map_HW.shape == layout.canvas == canvas and np.isfinite(map_HW).all()
    write_coco(pictures, tmp_path / "coco.json", None, False)
    written = json.loads((tmp_path / "coco.json").read_text())["annotations"]
    regions = [region for found in (narrow, row) for region in found["regions"]]
    assert [each["bbox"] for each in written] == [[r[n] for n in ("x", "y", "width", "height")] for r in regions] != []


def test_a_folder_is_no_mask(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    values = {"kind": "fit", "source": {"uri": f"{tmp_path}"}, "artifact": f"{tmp_path}/artifact"}
    detector = {"name": "patchcore", "preset": "smoke", "params": {"weights": "random", "image_size": [48, 48]}}
    for view, name in (
        ({"region": f"{tmp_path}"}, "view.region: the mask"),
        ({"align": "phase", "align_to": f"{tmp_path}"}, "view.align_to: the picture"),
    ):
        with pytest.raises(SpecError, match=f"{name} file://{tmp_path} is not a file. Name one."):
            view_of(ViewSpec(**view), (48, 48), Storage())
        (tmp_path / "a.png").write_bytes(b"x")
        job.write_text(yaml.safe_dump({**values, "detector": detector, "view": view}))
        for command in (["check", str(job)], ["fit", "--local", str(job)]):
            ended = CliRunner().invoke(main, command)
            assert ended.exit_code == 2 and "is not a file. Name one." in ended.output, ended.output


def test_a_box_of_less_than_one_px_is_drawn_as_one_px() -> None:
    assert whole_box((0.0, 2.6, 3.4, 2.9), (3, 9)) == (0, 3, 3, 4)
    assert whole_box((0.0, 8.8, 0.2, 9.0), (1, 9)) == (0, 8, 1, 9)
    layout = View(ViewSpec(resize="short_side")).layout((3, 90), (64, 64))
    box = layout.box_on((1, 20))
    assert box == (0, 10, 1, 11)
    drawn = read_png(overlay_png(np.zeros((20, 1, 3), np.uint8), np.full((64, 64), 5.0, np.float32), 0.0, 1.0, box))
    changed_HW = np.asarray(drawn).any(axis=2)
    assert changed_HW[10].all() and changed_HW.sum() == 1


def test_a_large_map_is_encoded_in_little_more_memory_than_its_png(monkeypatch: pytest.MonkeyPatch) -> None:
    map_HW = np.random.default_rng(0).normal(size=(2048, 1024)).astype(np.float32)
    map_HW[5, :7], map_HW[9, 0], map_HW[9, 1] = np.nan, np.inf, -np.inf
    tracemalloc.start()
    data, clipped = map_png(map_HW, -1.0, 2.0)
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most_bytes < 12 * map_HW.size  # 2 for each px of the picture and of the PNG, twice
    monkeypatch.setattr(heatmaps, "BAND_PIXELS", map_HW.size)
    assert (data, clipped) == map_png(map_HW, -1.0, 2.0)
    level_HW = (map_HW.astype(np.float64) + 1.0) / 3.0
    assert clipped == int((level_HW < 0).sum() + (level_HW > 1).sum())
    expected_HW = np.rint(np.clip(np.where(np.isnan(level_HW), 0.0, level_HW), 0.0, 1.0) * 65535)
    np.testing.assert_array_equal(np.asarray(read_png(data)), expected_HW)
