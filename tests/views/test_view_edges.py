"""Views at their edges: overlaps of whole tiles, boxes of less than one px, and stored maps of parts of pictures."""

import tracemalloc

import numpy as np
import pytest

from raydetect.artifacts.fit_preprocess import view_of
from raydetect.config import TileSpec, ViewSpec
from raydetect.errors import SpecError
from raydetect.sinks import heatmaps
from raydetect.sinks.heatmaps import map_png, overlay_png, read_png
from raydetect.storage import Storage
from raydetect.views.placement import in_whole, of_whole, whole_size
from raydetect.views.view import View, whole_box


@pytest.mark.parametrize("overlap", [33, 64, 100])
def test_tiles_of_the_image_size_overlap_by_at_most_half(overlap: int) -> None:
    with pytest.raises(SpecError, match=rf"overlap = {overlap}: is more than half .* Set it to 32 or less"):
        view_of(ViewSpec(tile=TileSpec(overlap=overlap)), (64, 80), Storage())
    assert view_of(ViewSpec(tile=TileSpec(overlap=32)), (64, 80), Storage()).has_tiles
    assert view_of(ViewSpec(tile=TileSpec(size=(200, 200), overlap=overlap)), (64, 80), Storage()).has_tiles


@pytest.mark.parametrize("spec", [ViewSpec(resize="short_side"), ViewSpec(size=(80, 80), crop=(64, 64)), ViewSpec()])
def test_a_map_returns_unchanged_from_its_place_in_the_whole_picture(spec: ViewSpec) -> None:
    for size in ((224, 160), (160, 224), (97, 31), (31, 97), (500, 90), (1, 160), (160, 1), (1, 1)):
        layout = View(spec).layout(size, (64, 64))
        map_HW = np.random.default_rng(0).random(layout.canvas).astype(np.float32)
        whole_HW = in_whole(map_HW, layout)
        assert whole_HW.shape == whole_size(layout) and np.isfinite(whole_HW).sum() == map_HW.size, size
        np.testing.assert_array_equal(of_whole(whole_HW, layout), map_HW)


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
