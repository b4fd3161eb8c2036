"""With a region, memory banks have no patch beyond the reach of what is looked at, and scores come from what is."""

from typing import Any

import numpy as np
import pytest
import torch

from raydetect import create_ensemble, create_model
from raydetect.blocks.maps.anomaly_map import smooth_upsampled, smoothing_reach
from raydetect.detectors._base import PatchGrid
from raydetect.fitting.collect import near_patches
from tests.builders.images import normal_image

SIDE = 64
LEFT = {"region": [[[0, 0], [0.25, 0], [0.25, 1], [0, 1]]]}  # 16 of 64 columns


def fitted(view: dict[str, Any] | None, **params: Any) -> Any:
    settings = {"backbone": "resnet18", "weights": "random", "image_size": (SIDE, SIDE), "n_neighbors": 1, **params}
    model = create_model("patchcore", **settings)
    return model.fit([normal_image(i, SIDE) for i in range(12)], holdout_ratio=0.25, view=view or {}, progress=False)


@pytest.mark.parametrize(("grid", "sigma"), [((8, 8), 4.0), ((16, 16), 2.0), ((8, 8), 0.0), ((7, 9), 1.0)])
def test_a_patch_reaches_as_far_as_stated_and_no_further(grid: tuple[int, int], sigma: float) -> None:
    size = (8 * grid[0], 8 * grid[1])
    reach = smoothing_reach(grid, size, sigma)
    row, column = grid[0] // 2, grid[1] // 2
    raised = torch.zeros(1, *grid)
    raised[0, row, column] = 1e6
    map_HW = smooth_upsampled(raised, size, sigma)[0].abs()
    rows, columns = torch.nonzero(map_HW > 0, as_tuple=True)
    for first, last, index in ((rows.min(), rows.max(), row), (columns.min(), columns.max(), column)):
        assert int(first) >= 8 * index - reach and int(last) < 8 * (index + 1) + reach
        assert int(last) - int(first) >= 8 + 2 * (reach - 8)  # not much further than needed


def test_patches_near_what_is_looked_at_are_those_of_slow_code() -> None:
    random = np.random.default_rng(0)
    for height, width, reach in ((4, 4, 3), (5, 8, 0), (8, 3, 20)):
        looked_HW = random.random((40, 48)) > 0.995
        kept = near_patches(torch.from_numpy(looked_HW)[None].float(), PatchGrid(height, width, reach))[0]
        for row in range(height):
            for column in range(width):
                upper, lower = row * 40 // height, -(-(row + 1) * 40 // height)
                left, right = column * 48 // width, -(-(column + 1) * 48 // width)
                around_HW = looked_HW[max(0, upper - reach) : lower + reach, max(0, left - reach) : right + reach]
                assert bool(kept[row * width + column]) == bool(around_HW.any())


def test_a_bank_has_no_patch_beyond_the_reach_of_its_region() -> None:
    whole, part = fitted(None, smoothing_sigma=1.0), fitted(LEFT, smoothing_sigma=1.0)
    of = [model._fitted.facts["coreset"]["of"] for model in (whole, part)]
    grid = SIDE // 8
    columns = sum(8 * column - smoothing_reach((grid, grid), (SIDE, SIDE), 1.0) < SIDE // 4 for column in range(grid))
    assert 2 <= columns < grid
    assert of == [9 * grid * grid, 9 * grid * columns]


def test_the_score_is_the_highest_pixel_that_is_looked_at() -> None:
    model = fitted(LEFT)
    images = [normal_image(100, SIDE), normal_image(101, SIDE)]
    inside, outside = images[0].copy(), images[1].copy()
    inside[20:30, 4:12], outside[20:30, 40:50] = 255, 255
    scores = model.predict_proba([*images, inside, outside])
    maps = model.predict_anomaly_map([*images, inside, outside])
    np.testing.assert_array_equal(scores, [np.nanmax(map_HW) for map_HW in maps])
    assert np.isnan(maps[0][:, SIDE // 4 :]).all() and not np.isnan(maps[0][:, : SIDE // 4]).any()
    assert scores[2] > 2 * scores[0] and scores[3] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize(("other", "by_map"), [("stfpm", True), ("cutpaste", False)])
def test_members_keep_all_patches_unless_the_whole_ensemble_scores_by_map(other: str, by_map: bool) -> None:
    settings = {"image_size": (SIDE, SIDE), "preset": "smoke", "weights": "random"}
    members = [create_model(name, **settings) for name in ("patchcore", other)]
    images = [normal_image(i, SIDE) for i in range(24)]
    model = create_ensemble(members).fit(images, holdout_ratio=0.25, view=LEFT, progress=False)
    (bank, *_) = [member for member in model._fitted.detector.members if hasattr(member, "num_embeddings")]
    patches = bank.num_embeddings / model._fitted.facts["images"]["fitted"]
    grid = bank.patch_grids()["embeddings"]
    assert model._fitted.detector.scores_by_map == by_map
    assert (patches < grid.height * grid.width) == by_map
    outside = normal_image(100, SIDE)
    plain = model.predict_proba([outside])
    outside[20:30, 40:50] = 255
    assert model.predict_proba([outside]) == pytest.approx(plain, rel=1e-5)
