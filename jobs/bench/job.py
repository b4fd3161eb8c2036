"""A whole Ray job compared with the bare Scorer on the same cores; time to the first image; planning a large resume."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from jobs.bench.record import write
from raydetect.config import parse_job
from raydetect.config.validation import to_plain
from raydetect.planning.plan import plan_score
from raydetect.records import Receipt
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.storage import Storage
from tests.builders.archives import normal_files, pack, tar_bytes
from tests.builders.images import encode, normal_image
from tests.whole_jobs.test_submit import WITH_TOKEN, running_head

SIZE_PX = 256
SHARDS = 24
IMAGES = 4500
COMMITTED = 100_000
PYTHON = sys.executable


def make_archive(folder: Path) -> None:
    """Writes IMAGES pictures in SHARDS tars, and normal images for fitting."""
    base = [encode(normal_image(i, SIZE_PX)) for i in range(200)]
    files = [(f"{i:05d}.png", base[i % len(base)]) for i in range(IMAGES)]
    pack(f"file://{folder}/day", ".tar", files, SHARDS)
    pack(f"file://{folder}/normal", ".tar", normal_files(100), 2)


def job(folder: Path, results: str, workers: int, threads: int, source: str = "day") -> str:
    """Writes a scoring job file and returns its path."""
    values = {
        "kind": "score",
        "source": {"uri": f"{folder}/{source}"},
        "artifact": f"{folder}/artifact",
        "sink": {"uri": f"{folder}/{results}", "heatmaps": "none"},
        "flag": {"alpha": 0.1},
        "resources": {"num_workers": workers, "cpus_per_worker": threads},
    }
    path = folder / f"{results}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def fit(folder: Path) -> None:
    """Fits the artifact used by all runs."""
    params = {"backbone": "resnet18", "weights": "random", "image_size": [SIZE_PX, SIZE_PX], "max_bank_vectors": 2000}
    values = {
        "kind": "fit",
        "source": {"uri": f"{folder}/normal"},
        "detector": {"name": "patchcore", "params": params},
        "artifact": f"{folder}/artifact",
        "resources": {"cpus_per_worker": os.cpu_count()},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(values))
    subprocess.run(
        [PYTHON, "-m", "raydetect", "fit", str(folder / "fit.yaml"), "--local"], check=True, capture_output=True
    )


def bare(path: str) -> None:
    """Reads, decodes and scores every chunk in one process without a sink; prints the time at which each chunk ends."""
    import torch

    from raydetect.archives.base import chunk_members
    from raydetect.artifacts.store import load_artifact
    from raydetect.scoring.scorer import Scorer

    plan = plan_score(parse_job(yaml.safe_load(Path(path).read_text()), path))  # type: ignore[arg-type]
    torch.set_num_threads(plan.spec.resources.cpus_per_worker)
    scorer = Scorer(load_artifact(plan.artifact.uri, Storage()), plan.spec)
    for shard in plan.shards:
        for chunk in chunk_members(shard, plan.archive.read(shard), plan.spec.chunk_images, plan.spec.chunk_bytes):
            print(time.time(), len(scorer.score_chunk(chunk).rows), flush=True)


def on_ray(path: str) -> None:
    """Runs the whole job on a local Ray; prints the same."""
    from raydetect.distributed.scoring.score import score

    def on_progress(done: ScoredChunk | Receipt) -> None:
        if isinstance(done, ScoredChunk):
            print(time.time(), done.images, flush=True)

    score(plan_score(parse_job(yaml.safe_load(Path(path).read_text()), path)), None, on_progress)  # type: ignore[arg-type]


def measured(mode: str, path: str) -> tuple[float, float]:
    """(images/s in steady state, images/s including start-up and shutdown) of a run in its own process."""
    start = time.time()
    command = [PYTHON, "-m", "jobs.bench.job", mode, path]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    whole = time.time() - start
    ends = [(float(line.split()[0]), int(line.split()[1])) for line in lines]
    assert sum(count for _, count in ends) == IMAGES
    middle = ends[len(ends) // 5 : -len(ends) // 10]
    steady = sum(count for _, count in middle[1:]) / (middle[-1][0] - middle[0][0])
    assert all(a[0] <= b[0] for a, b in pairwise(ends))
    return steady, IMAGES / whole


def ray_over_bare(folder: Path) -> dict[str, Any]:
    """Alternates between both modes and compares them."""
    rounds = []
    cores = os.cpu_count() or 1
    for number in range(3):
        one = measured("bare", job(folder, f"bare{number}", 1, cores))
        many = measured("ray", job(folder, f"ray{number}", cores, 1))
        rounds.append({"steady": round(many[0] / one[0], 3), "with_start_up": round(many[1] / one[1], 3)})
        print(f"round {number}: {rounds[-1]} ({one[0]:.1f} and {many[0]:.1f} images/s)", flush=True)
    median = {key: sorted(r[key] for r in rounds)[1] for key in rounds[0]}
    return {"images": IMAGES, "size_px": SIZE_PX, "ray_over_bare_scorer": median, "rounds": rounds}


def seconds_to_first_image(folder: Path) -> float:
    """Time from `raydetect submit` to the first Parquet part, on a running head with token authentication."""
    path = job(folder, "submitted", 1, 1, "day/part-0.tar")
    parts = folder / "submitted" / "scores"
    with running_head(folder) as address:
        command = [PYTHON, "-m", "raydetect", "submit", path, "--address", address]
        start = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **WITH_TOKEN}, stdout=subprocess.DEVNULL)
        while not list(parts.rglob("*.parquet")):
            assert process.poll() in (None, 0)
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        process.wait()
    return round(seconds, 1)


def seconds_to_plan_a_resume(folder: Path) -> dict[str, float]:
    """Duration of `plan_score` when all but one of COMMITTED + 1 shards are committed."""
    day = folder / "many"
    day.mkdir()
    tar = tar_bytes([("a.png", b"x")])
    for i in range(COMMITTED + 1):
        (day / f"{i:06d}.tar").write_bytes(tar)
    spec = parse_job(yaml.safe_load(Path(job(folder, "resume", 1, 1)).read_text()), "resume")
    plain = to_plain(spec) | {"source": {"uri": str(day)}}
    spec = parse_job(plain, "resume")
    plan = plan_score(spec)  # type: ignore[arg-type]
    plan.begin()
    ledger = folder / "resume" / "ledger"
    ledger.mkdir()
    for i in range(COMMITTED):
        (ledger / f"{i:05d}.json").write_text("{}")
    start = time.perf_counter()
    again = plan_score(spec)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    assert [shard.index for shard in again.todo] == [COMMITTED]
    assert len(Ledger(again.ledger.uri, again.ledger.storage).committed()) == COMMITTED
    return {"committed_shards": COMMITTED, "seconds": round(seconds, 2)}


def main() -> None:
    """Runs the benchmark and writes its results."""
    folder = Path(tempfile.mkdtemp(prefix="raydetect-bench-"))
    try:
        make_archive(folder)
        fit(folder)
        figures = ray_over_bare(folder)
        figures["submit_to_first_image_seconds"] = seconds_to_first_image(folder)
        figures["plan_a_resume"] = seconds_to_plan_a_resume(folder)
    finally:
        shutil.rmtree(folder)
    write("job", "make bench", figures)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        {"bare": bare, "ray": on_ray}[sys.argv[1]](sys.argv[2])
    else:
        main()
