"""Jobs on rasters with bands: fit, score, overlays and the report, in one process."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import yaml

from raydetect.artifacts.record import read_record
from raydetect.cli.main import main
from raydetect.storage import Storage
from tests.builders.images import encode, normal_image
from tests.builders.rasters import raster

SENSOR = {"bands": [4, 3, 2], "range": [0, 10_000]}


def scene(seed: int) -> bytes:
    """Five bands of 16 bits, of which the first and last are noise."""
    noise_HW2 = np.random.default_rng(seed).integers(0, 65_535, (96, 96, 2))
    shown_HWC = normal_image(seed, 96).astype(float)[..., :3] / 255 * 10_000
    return raster(np.dstack([noise_HW2[..., :1], shown_HWC, noise_HW2[..., 1:]]).astype(np.uint16), compress="lzw")


def run(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values))
    main([values["kind"], str(path), "--local"], standalone_mode=False)


@pytest.mark.parametrize("tile", [None, {"overlap": 8}])
def test_bands_are_fitted_scored_drawn_and_reported(tile: Any, tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{i}.tif").write_bytes(scene(i))
    (tmp_path / "data" / "9.png").write_bytes(encode(normal_image(1, 64)))  # three bands
    params = {"backbone": "resnet18", "weights": "random", "image_size": [64, 64]}
    view = {**SENSOR, **({} if tile is None else {"tile": tile})}
    fit = {
        "kind": "fit",
        "source": {"uri": f"{tmp_path}/data/*.tif"},
        "detector": {"name": "patchcore", "params": params},
        "view": view,
        "artifact": f"{tmp_path}/artifact",
        "calibration": {"holdout_ratio": 0.5},
    }
    run(tmp_path / "fit.yaml", fit)
    recorded = read_record(f"file://{tmp_path}/artifact", Storage()).preprocess.view.recorded()
    assert (recorded["bands"], recorded["range"]) == ([4, 3, 2], [0, 10_000])
    score = {
        "kind": "score",
        "source": {"uri": f"{tmp_path}/data"},
        "artifact": f"{tmp_path}/artifact",
        "sink": {"uri": f"{tmp_path}/results", "heatmaps": "all"},
        "flag": {"alpha": 0.5},
        "max_bad_fraction": 0.5,
    }
    run(tmp_path / "score.yaml", score)
    table = ds.dataset(sorted((tmp_path / "results").glob("scores/**/*.parquet"))).to_table()
    rows = {row["key"].rpartition("#")[2]: row for row in table.to_pylist()}
    assert rows["9.png"]["status"] == "unsupported_mode" and "view.bands" in rows["9.png"]["error"]
    assert all(rows[f"{i}.tif"]["status"] == "ok" and rows[f"{i}.tif"]["heatmap_uri"] for i in range(8))
    assert json.loads((tmp_path / "results" / "run.json").read_text())["rasters"] == SENSOR
    main(["report", str(tmp_path / "results"), "--output", str(tmp_path / "page.html")], standalone_mode=False)
    page = (tmp_path / "page.html").read_text()
    assert len(re.findall("<img", page)) >= 8 and "No image" not in page
