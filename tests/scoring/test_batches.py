"""What a batch tells of its maps, on a CPU and on a device that must not be waited for."""

import math

import numpy as np
import pytest
import torch

from raydetect.detectors._base import Scores
from raydetect.scoring.batches import _values, _values_on_device

NUMBERS = np.random.default_rng(3)


def scores(batch: int = 4) -> Scores:
    """Random scores with maps of which the second has no number, the third an infinite one."""
    maps_BHW = torch.from_numpy(NUMBERS.normal(size=(batch, 5, 7)).astype(np.float32))
    maps_BHW[1, 2, 3], maps_BHW[2, 0, 0] = math.nan, math.inf
    return Scores(torch.from_numpy(NUMBERS.normal(size=batch).astype(np.float32)), maps_BHW)


@pytest.mark.parametrize("ignores", [False, True])
def test_both_ways_find_the_extremes_of_maps(ignores: bool) -> None:
    found = scores()
    looked_BHW = NUMBERS.random((4, 5, 7)) < 0.5 if ignores else None
    by_numpy = np.array(_values(found, looked_BHW))
    on_device = _values_on_device(found, looked_BHW).numpy().astype(np.float64)
    np.testing.assert_array_equal(by_numpy, on_device)
    maps_BHW = found.anomaly_map_BHW.numpy()
    for i in (0, 3):
        inside = maps_BHW[i] if looked_BHW is None else maps_BHW[i][looked_BHW[i]]
        expected = float(found.image_score_B[i]) if looked_BHW is None else max(inside.ravel().tolist())
        assert by_numpy[i].tolist() == [expected, min(maps_BHW[i].ravel().tolist()), max(maps_BHW[i].ravel().tolist())]
    assert math.isnan(by_numpy[1, 1])
    assert math.isnan(by_numpy[1, 2])
    assert by_numpy[2, 2] == math.inf
