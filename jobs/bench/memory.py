"""Peak memory of Ray jobs on an archive and on one ten times larger: scoring, and fitting with a fixed bank budget.

Samples the proportional set size (shared memory counted once) of the command and all its descendants.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jobs.bench.record import write
from raydetect.storage import normalise_uri
from tests.builders.archives import normal_files, pack
from tests.builders.images import encode, normal_image
from tests.whole_jobs.runs import descendants

PART_IMAGES = 400
SIZE_PX = 400  # noise does not compress: about 480 kB each
INPUT_PX = 64
FIT_PX = 128
FIT_IMAGES = [250, 2500]
PYTHON = sys.executable


def make_archive(folder: Path) -> None:
    """Writes `one/` with PART_IMAGES images and `ten/` with ten times as many."""
    random = np.random.default_rng(0)
    pool = [encode(random.integers(0, 256, (SIZE_PX, SIZE_PX, 3)).astype(np.uint8)) for _ in range(50)]
    for name, count in (("one", 1), ("ten", 10)):
        for shard in range(4 * count):
            files = [(f"{shard:03d}-{i:03d}.png", pool[i % len(pool)]) for i in range(PART_IMAGES // 4)]
            pack(normalise_uri(str(folder / name / f"{shard:03d}")), ".tar", files, 1)
    pack(normalise_uri(str(folder / "normal")), ".tar", normal_files(40), 1)


def fit(folder: Path) -> None:
    """Fits a small artifact."""
    params = {"backbone": "resnet18", "weights": "random", "image_size": [INPUT_PX, INPUT_PX]}
    values = {
        "kind": "fit",
        "source": {"uri": f"{folder}/normal"},
        "detector": {"name": "patchcore", "params": params},
        "artifact": f"{folder}/artifact",
        "calibration": {"holdout_ratio": 0.5},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(values))
    subprocess.run(
        [PYTHON, "-m", "raydetect", "fit", str(folder / "fit.yaml"), "--local"], check=True, capture_output=True
    )


def score_peak_bytes(folder: Path, name: str) -> int:
    """Peak memory of scoring `name/`."""
    values = {
        "kind": "score",
        "source": {"uri": f"{folder}/{name}"},
        "artifact": f"{folder}/artifact",
        "sink": {"uri": f"{folder}/results-{name}", "heatmaps": "none"},
        "flag": {"alpha": 0.1},
        "chunk_images": 16,
        "chunk_bytes": 8 << 20,
        "resources": {"num_workers": 2, "cpus_per_worker": 1},
    }
    return peak_bytes("score", folder / f"{name}.yaml", values)


def fit_peak_bytes(folder: Path, name: str, count: int) -> int:
    """Peak memory of fitting on `count` images of 128 px, 256 patch embeddings each, with a 32 MiB bank budget."""
    files = [(f"{i:05d}.png", encode(normal_image(i % 300, FIT_PX))) for i in range(count)]
    pack(normalise_uri(str(folder / name)), ".tar", files, 8)
    params = {
        "backbone": "resnet18",
        "weights": "random",
        "image_size": [FIT_PX, FIT_PX],
        "max_bank_vectors": 500,
        "projected_dims": 128,
    }
    values = {
        "kind": "fit",
        "source": {"uri": f"{folder}/{name}"},
        "detector": {"name": "patchcore", "params": params},
        "artifact": f"{folder}/artifact-{name}",
        "max_bank_bytes": 32 << 20,
        "resources": {"num_workers": 2, "cpus_per_worker": 1},
    }
    return peak_bytes("fit", folder / f"{name}.yaml", values)


def peak_bytes(command: str, path: Path, values: dict[str, Any]) -> int:
    """Peak memory of `raydetect COMMAND` and its descendants."""
    path.write_text(yaml.safe_dump(values))
    process = subprocess.Popen([PYTHON, "-m", "raydetect", command, str(path)], stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(resident_bytes, [process.pid, *descendants(process.pid)])))
        time.sleep(0.3)
    assert process.returncode == 0
    return peak


def resident_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Runs the benchmark and writes its results."""
    folder = Path(tempfile.mkdtemp(prefix="raydetect-bench-"))
    try:
        make_archive(folder)
        fit(folder)
        scored = [score_peak_bytes(folder, name) for name in ("one", "ten")]
        fitted = [fit_peak_bytes(folder, f"fit{count}", count) for count in FIT_IMAGES]
    finally:
        shutil.rmtree(folder)
    figures = {
        "score": {"images": [PART_IMAGES, 10 * PART_IMAGES], "encoded_bytes_per_image": 3 * SIZE_PX**2},
        "fit": {"images": FIT_IMAGES, "embedding_bytes": [count * 256 * 384 * 4 for count in FIT_IMAGES]},
    }
    for name, (one, ten) in (("score", scored), ("fit", fitted)):
        figures[name] |= {"peak_mb": [one >> 20, ten >> 20], "ten_over_one": round(ten / one, 3)}
    write("memory", "make bench", figures)


if __name__ == "__main__":
    main()
