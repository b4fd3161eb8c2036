"""A large picture with defects, scored, drawn and evaluated window by window in processes of their own."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.bench import rasters
from tests.builders.rasters import DEFECT_PX

SIDE = 4000  # python -m jobs.bench.rasters has 20,000


def test_a_picture_larger_than_the_limit_is_scored_drawn_and_evaluated(tmp_path: Path) -> None:
    figures = rasters.measure(tmp_path, SIDE)
    assert SIDE**2 > rasters.WINDOW_PIXELS and figures["windows"] == 16
    assert max(figures["peak_mb"], figures["evaluation_peak_mb"]) << 20 < rasters.LIMIT_BYTES
    assert figures["evaluation"]["pixel_auroc"] > 0.8
    overlay = np.asarray(Image.open(io.BytesIO((tmp_path / "overlay.png").read_bytes())).convert("RGB")).astype(int)
    assert overlay.shape == (1024, 1024, 3)
    scale = 1024 / SIDE
    for x, y in rasters.defects_of(SIDE):
        middle = overlay[int((y + DEFECT_PX / 2) * scale), int((x + DEFECT_PX / 2) * scale)]
        assert middle.min() > 150  # bright in the picture and hot in the map
    assert overlay[20, 20].max() < 180
