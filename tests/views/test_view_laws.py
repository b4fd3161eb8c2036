"""What holds for every detector that looks at a picture in tiles or in a region."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from raydetect.config import TileSpec, ViewSpec
from raydetect.detectors._base import Detector
from raydetect.images.decode import decode_windows
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.records import Member
from raydetect.scoring.batches import Scored, score_batches
from raydetect.views.region import Region
from raydetect.views.view import View
from tests.builders.images import encode
from tests.contracts import cases
from tests.contracts.cases import CASES, SIZE_PX, Case

pytestmark = [
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.id),
    pytest.mark.usefixtures("one_thread"),
]
BY_ID = {case.id: case for case in CASES}
OVERLAP = 16
STRIDE = SIZE_PX - OVERLAP
TILES = View(ViewSpec(tile=TileSpec(overlap=OVERLAP)))
LEFT = Region(polygons=(((0.05, 0.05), (0.5, 0.05), (0.5, 0.95), (0.05, 0.95)),))


@lru_cache(maxsize=1)
def fitted(name: str) -> Detector:
    """A briefly fitted detector; one is kept, as tests run case by case."""
    return cases.fit_briefly(BY_ID[name], shard_images=100, seed=3)


def scored(case: Case, picture: np.ndarray, view: View) -> Scored:
    """The result for one picture, with one input in a batch, so that every input meets the same kernels."""
    preprocess = Preprocess((SIZE_PX, SIZE_PX), "full", view)
    decoded = decode_windows(Member("k", "", data=encode(picture)), DecodeRules(10**7, True), preprocess)
    (found,) = score_batches(fitted(case.id), decoded, 1)
    return found


def woven(height: int, width: int, period: int = 12) -> np.ndarray:
    """A weave with noise; uint8 RGB."""
    rows, columns = np.mgrid[:height, :width] * (2 * np.pi / period)
    noise = np.random.default_rng(5).normal(0, 3, (height, width))
    grey = 110 + 25 * np.sin(rows) * np.sin(columns) + noise
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def test_a_picture_of_one_tile_is_scored_as_without_tiles(case: Case) -> None:
    picture = woven(SIZE_PX, SIZE_PX)
    plain, tiled = scored(case, picture, View(ViewSpec())), scored(case, picture, TILES)
    assert tiled.image_score == plain.image_score
    np.testing.assert_array_equal(tiled.anomaly_map(), plain.anomaly_map())


def test_rolling_a_picture_by_a_stride_rolls_its_map(case: Case) -> None:
    picture = woven(SIZE_PX, SIZE_PX + 3 * STRIDE)
    plain, rolled = (scored(case, p, TILES).anomaly_map() for p in (picture, np.roll(picture, STRIDE, axis=1)))
    half = OVERLAP // 2
    np.testing.assert_array_equal(plain[:, half : 3 * STRIDE], rolled[:, STRIDE + half : 4 * STRIDE])


@pytest.mark.parametrize("textured", [False, True])
def test_a_seam_raises_no_score(case: Case, textured: bool) -> None:
    """At a seam, where maps of two tiles meet, a map is no higher and steps no wider than within a tile."""
    height, width = SIZE_PX, SIZE_PX + 3 * STRIDE
    picture = woven(height, width) if textured else np.full((height, width, 3), 96, np.uint8)
    found = scored(case, picture, TILES)
    tiles = [picture[:, k * STRIDE : k * STRIDE + SIZE_PX] for k in range(4)]
    assert found.image_score == max(scored(case, tile, TILES).image_score for tile in tiles)
    level_W = found.anomaly_map().mean(axis=0)
    before = np.array([STRIDE * k + OVERLAP // 2 - 1 for k in (1, 2, 3)])
    near = (before[:, None] + np.arange(-1, 3)).ravel()
    elsewhere = np.delete(level_W, near)
    width_of_levels = elsewhere.max() - elsewhere.min()
    assert level_W[near].max() <= elsewhere.max() + 0.25 * width_of_levels + 1e-6
    assert np.abs(level_W[before + 1] - level_W[before]).max() <= width_of_levels + 1e-6


def with_defect(picture: np.ndarray, left: int) -> np.ndarray:
    changed = picture.copy()
    changed[40:56, left : left + 16] = (250, 20, 20)
    return changed


@pytest.mark.parametrize("tiled", [False, True])
def test_only_a_defect_in_the_region_changes_anything(case: Case, tiled: bool) -> None:
    picture = woven(112, 160)
    view = replace(TILES if tiled else View(ViewSpec()), region=LEFT)
    plain, outside, inside = (
        scored(case, p, view) for p in (picture, with_defect(picture, 110), with_defect(picture, 30))
    )
    assert outside.image_score == plain.image_score
    np.testing.assert_array_equal(outside.anomaly_map(), plain.anomaly_map())
    assert inside.image_score != plain.image_score or (inside.anomaly_map() != plain.anomaly_map()).any()
    looked = plain.layout.looked
    assert looked is not None
    np.testing.assert_array_equal(np.isnan(plain.anomaly_map()), ~looked)
    assert np.nanmax(np.abs(inside.anomaly_map() - plain.anomaly_map())) > 0
