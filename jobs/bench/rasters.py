"""A picture of 20,000 x 20,000 px scored, drawn and evaluated window by window: time, windows and peak memory."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import yaml

from jobs.bench.record import write
from raydetect.artifacts.store import load_artifact
from raydetect.config import SourceSpec
from raydetect.evaluation.labelled_images import evaluate_images, member_chunks
from raydetect.metrics.figures import pixel_figures
from raydetect.records import Member
from raydetect.storage import Storage
from tests.builders.rasters import large_mask, large_raster

SIDE_PX, FIT_PX = 20_000, 2_560
INPUT_PX, SCALE, OVERLAP = 128, 0.1, 32
LIMIT_BYTES = 1 << 30
WINDOW_PIXELS = 1 << 22  # source.max_pixels: no picture here could be decoded as a whole
PEAK = """
status = open("/proc/self/status").read()  # ru_maxrss would count the memory of the parent, too
print(int(status.split("VmHWM:")[1].split()[0]) << 10)
"""
RUN = f"""
import sys
from raydetect.cli.main import main
main([*sys.argv[1:], "--local"], standalone_mode=False)
{PEAK}"""
EVALUATE = f"""
import sys
from jobs.bench.rasters import evaluated
print(evaluated(sys.argv[1]))
{PEAK}"""


def defects_of(side: int) -> tuple[tuple[int, int], ...]:
    """Upper left corners (x, y) of the planted defects."""
    return ((side // 4, side // 2), (side - 700, side - 1500))


def make(folder: Path, side: int) -> None:
    """Writes normal pictures, the large one with its mask, and the job files."""
    for name in ("normal", "test/spot", "mask"):
        (folder / "data" / name).mkdir(parents=True)
    for i in range(4):
        large_raster(str(folder / "data" / "normal" / f"{i}.tif"), FIT_PX, seed=i)
    large_raster(str(folder / "data" / "test" / "spot" / "1.tif"), side, defects_of(side), seed=9)
    large_mask(str(folder / "data" / "mask" / "1.tif"), side, defects_of(side))
    for name, values in jobs(folder).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """The jobs: fit, and score."""
    params = {"backbone": "resnet18", "weights": "random", "image_size": [INPUT_PX, INPUT_PX], "max_bank_vectors": 500}
    return {
        "fit": {
            "kind": "fit",
            "source": {"uri": f"{folder}/data/normal", "max_pixels": WINDOW_PIXELS},
            "detector": {"name": "patchcore", "params": params},
            "view": {"tile": {"overlap": OVERLAP}, "scale": SCALE},
            "artifact": f"{folder}/artifact",
            "calibration": {"holdout_ratio": 0.5},
        },
        "score": {
            "kind": "score",
            "source": {"uri": f"{folder}/data/test/spot", "max_pixels": WINDOW_PIXELS},
            "artifact": f"{folder}/artifact",
            "sink": {"uri": f"{folder}/results", "heatmaps": "all"},
            "flag": {"alpha": 0.5},
        },
    }


def run(code: str, *arguments: str) -> tuple[float, int, list[str]]:
    """Runs code in a process of its own; returns its seconds, its peak bytes in RAM and its other lines."""
    started = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    *lines, peak = done.stdout.splitlines()
    return time.perf_counter() - started, int(peak), lines


def evaluated(folder: str) -> str:
    """Evaluates the artifact on a normal picture and the large one with its mask; returns figures as JSON."""
    artifact = load_artifact(f"{folder}/artifact", Storage())
    normal, large = Path(folder, "data/normal/0.tif"), Path(folder, "data/test/spot/1.tif")
    members = (
        Member(path.name, str(path), path.read_bytes(), label=label, mask_uri=mask)
        for path, label, mask in ((normal, 0, None), (large, 1, f"{folder}/data/mask/1.tif"))
    )
    source = SourceSpec(uri=folder, max_pixels=WINDOW_PIXELS)
    outcome = evaluate_images(artifact, member_chunks(members, 1), source, Storage(), 16, 1)
    figures = pixel_figures(outcome.quality, 0, 10)
    return json.dumps({name: figure.plain()["value"] for name, figure in figures.items()})


def measure(folder: Path, side: int) -> dict[str, Any]:
    """Fits on small pictures, scores the large one in a process of its own, and returns the figures."""
    make(folder, side)
    run(RUN, "fit", str(folder / "fit.yaml"))
    seconds, peak, _ = run(RUN, "score", str(folder / "score.yaml"))
    evaluation_seconds, evaluation_peak, (found,) = run(EVALUATE, str(folder))
    rows = ds.dataset(sorted((folder / "results").glob("scores/**/*.parquet"))).to_table().to_pylist()
    (row,) = rows
    assert row["status"] == "ok" and row["flagged"], row
    artifact = load_artifact(str(folder / "artifact"), Storage())
    (drawn,) = (folder / "results").glob("heatmaps/**/*.zip")
    assert len(row["close_up_uris"]) == len(row["regions"]) >= 1, row
    with zipfile.ZipFile(drawn) as pictures:
        for name, uri in (("overlay", row["heatmap_uri"]), ("close_up", row["close_up_uris"][0])):
            stored = uri.partition("::")[0].removeprefix("zip://")
            (folder / f"{name}.png").write_bytes(pictures.read(stored))
    return {
        "side_px": side,
        "file_mb": round((folder / "data" / "test" / "spot" / "1.tif").stat().st_size / 1e6, 1),
        "close_ups": len(row["close_up_uris"]),
        "windows": len(artifact.record.preprocess.layout((side, side)).windows),
        "seconds": round(seconds, 1),
        "peak_mb": peak >> 20,
        "evaluation_seconds": round(evaluation_seconds, 1),
        "evaluation_peak_mb": evaluation_peak >> 20,
        "evaluation": json.loads(found),
    }


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=SIDE_PX, help="px of the picture")
    parser.add_argument("--keep", help="path for the overlay")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="raydetect-bench-"))
    try:
        figures = measure(folder, arguments.side)
        if arguments.keep:
            shutil.copy(folder / "overlay.png", arguments.keep)
    finally:
        shutil.rmtree(folder)
    if arguments.side != SIDE_PX:
        print(json.dumps(figures))
        return
    assert max(figures["peak_mb"], figures["evaluation_peak_mb"]) << 20 < LIMIT_BYTES, figures
    write("rasters", "python -m jobs.bench.rasters", figures)


if __name__ == "__main__":
    main()
