"""The geometry of views against slow, obvious code."""

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

from raydetect.config import TileSpec, ViewSpec
from raydetect.config.validation import validate
from raydetect.errors import SpecError
from raydetect.images.decode import decode_member
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.images.view_files import region_of_mask
from raydetect.records import Member
from raydetect.scoring.stitching import Stitched
from raydetect.views import view as views
from raydetect.views.placement import placed, resized, whole_size
from raydetect.views.region import Region
from raydetect.views.view import FILL, Layout, View, Window
from tests.builders.images import encode

RULES = DecodeRules(10**8, True)
TRIANGLE = ((0.13, 0.21), (0.91, 0.33), (0.4, 0.87))
STAR = ((0.5, 0.02), (0.8, 0.98), (0.03, 0.36), (0.97, 0.41), (0.2, 0.93))


def tiled(tile: tuple[int, int], overlap: int, scale: float | None = None, region: Region | None = None) -> View:
    return View(ViewSpec(tile=TileSpec(size=tile, overlap=overlap), scale=scale), region)


def tiles_of(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, stop) of every tile of a side, as the user's guide says it."""
    if length <= tile:
        return [(0, length)]
    found, start = [], 0
    while start + tile < length:
        found.append((start, start + tile))
        start += tile - overlap
    return [*found, (length - tile, length)]


def depth(px: int, start: int, stop: int, length: int) -> float:
    """Distance of the centre of a px from the edges of a tile; edges of the picture do not count."""
    before = math.inf if start == 0 else px + 0.5 - start
    after = math.inf if stop == length else stop - px - 0.5
    return min(before, after)


SIDES = [
    (64, 64, 16),
    (65, 64, 16),
    (200, 64, 16),
    (161, 64, 32),
    (130, 64, 0),
    (100, 40, 20),
    (30, 64, 8),
    (97, 33, 7),
]


@pytest.mark.parametrize(("length", "tile", "overlap"), SIDES)
def test_each_px_belongs_to_the_tile_in_which_it_lies_deepest(length: int, tile: int, overlap: int) -> None:
    layout = tiled((tile, tile), overlap).layout((length, tile), (tile, tile))
    expected = tiles_of(length, tile, overlap)
    assert [(w.origin[0], w.origin[0] + w.size[0]) for w in layout.windows] == expected
    for px in range(length):
        owners = [w for w in layout.windows if w.cell[0] <= px < w.cell[2]]
        assert len(owners) == 1
        depths = [depth(px, start, stop, length) for start, stop in expected if start <= px < stop]
        start, stop = owners[0].origin[0], owners[0].origin[0] + owners[0].size[0]
        assert start <= px < stop and depth(px, start, stop, length) == max(depths)


@pytest.mark.parametrize("size", [(150, 90), (64, 48), (20, 300), (129, 97)])
def test_each_px_of_a_canvas_is_decided_once(size: tuple[int, int]) -> None:
    layout = tiled((48, 64), 12).layout(size, (48, 64))
    owned_HW = np.zeros(layout.canvas, int)
    for window in layout.windows:
        owned_HW[window.on_canvas(1)] += 1
    assert layout.canvas == size[::-1] and (owned_HW == 1).all()
    assert [(w.row, w.column) for w in layout.windows] == sorted((w.row, w.column) for w in layout.windows)


def stitched(layout: Layout, maps: list[torch.Tensor]) -> np.ndarray:
    work = Stitched(layout)
    for window, map_HW in zip(layout.windows, maps, strict=True):
        work.waiting += 1
        work.add(window, 0.0, True, map_HW)
    return work.anomaly_map().numpy()


def slow_map(layout: Layout, maps: list[torch.Tensor], size: tuple[int, int], step: int) -> np.ndarray:
    """Px by px: the map of the deepest tile, the later one of two; then the highest of every block of px."""
    by_origin = {window.origin: map_HW for window, map_HW in zip(layout.windows, maps, strict=True)}
    sides = [sorted({(w.origin[i], w.origin[i] + w.size[i]) for w in layout.windows}) for i in (0, 1)]

    def owner(px: int, axis: int) -> int:
        tiles = [tile for tile in sides[axis] if tile[0] <= px < tile[1]]
        return max(tiles, key=lambda tile: (depth(px, *tile, size[axis]), tile[0]))[0]

    whole_HW = np.full(size[::-1], np.nan, np.float32)
    for y in range(size[1]):
        for x in range(size[0]):
            left, upper = owner(x, 0), owner(y, 1)
            whole_HW[y, x] = by_origin[left, upper][y - upper, x - left]
    blocks = [[whole_HW[y : y + step, x : x + step].max() for x in range(0, size[0], step)]
              for y in range(0, size[1], step)]  # fmt: skip
    return np.array(blocks, np.float32)


@pytest.mark.parametrize("overlap", [0, 6, 10])
@pytest.mark.parametrize("most_px", [4096, 60, 35, 23])
def test_a_map_is_put_together_px_by_px(overlap: int, most_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "MAX_CANVAS_PX", most_px)
    size = (101, 67)
    layout = tiled((32, 32), overlap).layout(size, (32, 32))
    step = math.ceil(101 / most_px)
    assert layout.reduction == step
    random = torch.Generator().manual_seed(overlap)
    maps = [torch.rand(32, 32, generator=random) for _ in layout.windows]
    np.testing.assert_array_equal(stitched(layout, maps), slow_map(layout, maps, size, step))


def test_maps_of_other_sizes_than_the_tile_are_resized_first() -> None:
    layout = tiled((40, 40), 8).layout((72, 40), (20, 20))
    maps = [torch.rand(20, 20) for _ in layout.windows]
    found = stitched(layout, maps)
    whole = [F.interpolate(m[None, None], (40, 40), mode="bilinear")[0, 0].numpy() for m in maps]
    np.testing.assert_array_equal(found, np.concatenate([whole[0][:, :36], whole[1][:, 4:]], axis=1))


@pytest.mark.parametrize("resize", ["stretch", "short_side"])
@pytest.mark.parametrize("size", [(300, 300), (411, 300), (290, 517), (90, 64)])
def test_a_crop_is_the_centre_of_the_resized_picture(resize: str, size: tuple[int, int]) -> None:
    random = np.random.default_rng(3)
    small = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    view = validate(ViewSpec, {"resize": resize, "size": [64, 64], "crop": [56, 56]}, "view")
    found = decode_member(
        Member("k", "", data=encode(np.asarray(picture))), RULES, Preprocess((56, 56), "full", View(view))
    )
    if resize == "stretch":
        target = (64, 64)
    else:
        short = min(size)
        target = (round(size[0] * 64 / short), round(size[1] * 64 / short))
    whole = picture.resize(target, Image.Resampling.BILINEAR)
    left, upper = (target[0] - 56) / 2, (target[1] - 56) / 2
    expected = whole.crop((round(left), round(upper), round(left) + 56, round(upper) + 56))
    assert found.only_input is not None
    apart = np.abs(found.only_input.astype(int) - np.asarray(expected, dtype=int))
    if size[0] == size[1] or resize == "stretch":
        assert apart.max() <= 1
    else:  # half a px aside and rounded sides
        assert apart.mean() <= 3


def test_torchvision_crops_the_same() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    expected = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(picture)
    view = View(ViewSpec(resize="short_side", size=(64, 64), crop=(56, 56)))
    found = decode_member(Member("k", "", data=encode(np.asarray(picture))), RULES, Preprocess((56, 56), "full", view))
    assert found.only_input is not None
    assert np.abs(found.only_input.astype(int) - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize("size", [(200, 100), (64, 64), (30, 170), (1000, 3)])
def test_pad_keeps_the_ratio_and_fills_the_rest(size: tuple[int, int]) -> None:
    view = View(ViewSpec(resize="pad"))
    (window,) = view.layout(size, (64, 96)).windows
    left, upper, right, lower = window.place
    shown = right - left, lower - upper
    assert window.box == (0, 0, *size) and (shown[0] == 96 or shown[1] == 64)
    scale = min(96 / size[0], 64 / size[1])
    assert abs(shown[0] - size[0] * scale) <= 0.5 and abs(shown[1] - max(1, size[1] * scale)) <= 0.5
    assert abs(left - (96 - right)) <= 1 and abs(upper - (64 - lower)) <= 1
    picture = np.full((size[1], size[0], 3), 200, np.uint8)
    found = decode_member(Member("k", "", data=encode(picture)), RULES, Preprocess((64, 96), "full", view)).only_input
    assert found is not None
    inside_HW = np.zeros((64, 96), bool)
    inside_HW[upper:lower, left:right] = True
    assert (found[inside_HW] == 200).all() and (found[~inside_HW] == FILL).all()


def inside(x: float, y: float, corners: tuple[tuple[float, float], ...]) -> bool:
    """Casts a ray to the right and counts the edges that it crosses."""
    count = 0
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        if (y0 <= y) != (y1 <= y):
            count += x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x
    return count % 2 == 1


@pytest.mark.parametrize("polygons", [(TRIANGLE,), (STAR,), (TRIANGLE, STAR), (((0, 0), (1, 0), (1, 1), (0, 1)),)])
@pytest.mark.parametrize("box", [(0.0, 0.0, 640.0, 480.0), (100.0, 50.0, 333.5, 401.25)])
def test_a_polygon_holds_the_px_whose_centre_lies_in_it(polygons: Any, box: Any) -> None:
    size = (37, 53)
    found = Region(polygons=polygons).looked(box, size, (640, 480))
    for row in range(size[0]):
        for column in range(size[1]):
            x = (box[0] + (column + 0.5) / size[1] * (box[2] - box[0])) / 640
            y = (box[1] + (row + 0.5) / size[0] * (box[3] - box[1])) / 480
            assert found[row, column] == any(inside(x, y, corners) for corners in polygons), (row, column)


def mask(seed: int = 0, size: tuple[int, int] = (40, 56)) -> tuple[np.ndarray, Region]:
    mask_HW = np.kron(np.random.default_rng(seed).random((size[0] // 8, size[1] // 8)) < 0.4, np.ones((8, 8))) > 0
    return mask_HW, region_of_mask(encode(np.where(mask_HW, 255, 0).astype(np.uint8)), "mask.png")


@pytest.mark.parametrize("box", [(0.0, 0.0, 560.0, 400.0), (33.0, 21.0, 501.0, 333.0)])
def test_a_mask_is_sampled_at_the_centres_of_px(box: Any) -> None:
    mask_HW, region = mask()
    found = region.looked(box, (31, 47), (560, 400))
    for row in range(31):
        for column in range(47):
            x = (box[0] + (column + 0.5) / 47 * (box[2] - box[0])) / 560 * 56
            y = (box[1] + (row + 0.5) / 31 * (box[3] - box[1])) / 400 * 40
            assert found[row, column] == mask_HW[int(y), int(x)]


def test_windows_wholly_outside_of_the_region_are_left_out() -> None:
    region = Region(polygons=(((0.0, 0.0), (0.3, 0.0), (0.3, 0.3), (0.0, 0.3)),))
    layout = tiled((50, 50), 10, region=region).layout((200, 200), (50, 50))
    assert [(w.row, w.column) for w in layout.windows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert layout.looked is not None and layout.looked.sum() == 60 * 60
    assert not layout.is_empty
    aside = tiled((50, 50), 10, region=Region(polygons=(((0.001, 0.5), (0.002, 0.5), (0.002, 0.501)),)))
    assert aside.layout((200, 200), (50, 50)).is_empty


def test_what_is_looked_at_always_lies_in_a_window() -> None:
    for seed in range(20):
        _, region = mask(seed)
        for size in ((333, 201), (90, 400)):
            layout = tiled((64, 64), 9, region=region).layout(size, (32, 32))
            assert layout.looked is not None
            known_HW = np.zeros(layout.canvas, bool)
            for window in layout.windows:
                known_HW[window.on_canvas(1)] = True
            assert (known_HW | ~layout.looked).all()


VIEWS = [
    View(ViewSpec()),
    View(ViewSpec(resize="pad")),
    View(ViewSpec(resize="short_side", size=(64, 64), crop=(56, 56))),
    tiled((100, 50), 20, scale=0.5, region=Region(polygons=(TRIANGLE, STAR))),
    View(ViewSpec(), mask()[1]),
]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: str(view.recorded())[:40])
def test_a_recorded_view_is_restored(view: View) -> None:
    again = View.of_record(json.loads(json.dumps(view.recorded())))
    assert again == view
    for size in ((301, 177), (64, 64)):
        assert again.layout(size, (56, 56)).windows == view.layout(size, (56, 56)).windows


def bilevel(size: tuple[int, int], kind: str = "PNG") -> str:
    import base64

    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"resize": "shrink"}, "resize"),
    ({"tile": {"size": [64, 64], "overlap": 60}}, "more than half"),
    ({"tiles": {}}, "tiles"),
    ({"crop": [56, 56]}, "belong together"),
    ({"region": {"png": "AAAA"}}, "mask is damaged"),
    ({"region": {"png": "no base64!"}}, "mask is damaged"),
    ({"region": {"png": bilevel((8193, 1))}}, "mask is damaged"),
    ({"region": {"png": bilevel((8, 8), "BMP")}}, "mask is damaged"),
    ({"region": {}}, "region"),
    ({"region": {"polygons": [[[0, 0], [1, 1]]]}}, "region"),
    ({"region": {"polygons": [[[0, 0], [1, "x"], [1, 1]]]}}, "region"),
    ({"region": {"polygons": [[[0, 0], [1, 2], [1, 1]]]}}, "region"),
    ({"region": {"polygons": 3}}, "region"),
    ({"region": {"polygons": []}}, "region"),
    ({"region": "mask.png"}, "region"),
]


@pytest.mark.parametrize(("entry", "word"), DAMAGED)
def test_a_damaged_record_is_refused(entry: dict[str, Any], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        View.of_record(entry)


def test_a_map_is_put_at_its_place_in_the_picture() -> None:
    view = View(ViewSpec(resize="short_side"))
    layout = view.layout((128, 64), (32, 32))
    map_HW = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    whole_HW = placed(map_HW, layout, whole_size(layout))
    assert whole_HW.shape == (32, 64) and (whole_HW[:, 16:48] == map_HW).all()
    assert np.isnan(whole_HW[:, :16]).all() and np.isnan(whole_HW[:, 48:]).all()
    large_HW = placed(map_HW, layout, (64, 128))
    assert (np.isfinite(large_HW) == (np.abs(np.arange(128) - 63.5) < 32)).all()
    (window,) = layout.windows
    assert isinstance(window, Window) and window.box == (32, 0, 96, 64)


def test_nan_does_not_spread_when_a_map_is_resized() -> None:
    map_HW = np.full((16, 16), 3.0, np.float32)
    map_HW[:, 8:] = np.nan
    large_HW = resized(map_HW, (48, 48))
    np.testing.assert_allclose(large_HW[:, :24], 3.0, rtol=1e-6)
    assert np.isnan(large_HW[:, 24:]).all()


@pytest.mark.parametrize(("scale", "orientation", "expected"), [(None, 1, 1), (0.25, 1, 2), (0.25, 6, 2), (0.1, 8, 4)])
def test_jpegs_are_reduced_as_far_as_the_scale_of_the_tiles_allows(
    scale: float | None, orientation: int, expected: int
) -> None:
    rules = Preprocess((256, 256), "at_least_2x", tiled((256, 256), 32, scale))
    assert rules.reduction((4000, 3000), orientation) == expected


@pytest.mark.parametrize(("view", "expected"), [({"resize": "pad"}, 4), ({"resize": "short_side"}, 4), ({}, 4)])
def test_jpegs_keep_twice_the_px_that_are_shown(view: dict[str, Any], expected: int) -> None:
    rules = Preprocess((256, 256), "at_least_2x", View(validate(ViewSpec, view, "view")))
    reduction = rules.reduction((4000, 3000), 1)
    across, down = rules.view.needed((4000, 3000), (256, 256))
    assert reduction == expected
    assert (
        min(4000 / reduction / across, 3000 / reduction / down)
        >= 2
        > min(2000 / reduction / across, 1500 / reduction / down)
    )
