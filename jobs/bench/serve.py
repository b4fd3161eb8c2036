"""The endpoints under load: rate over the bare Scorer's, latency, also while an archive is scored, and fuzzed bodies.

Started with a word it is the client, a process of its own: `one`, `many` or `fuzz`, then the URL and how many requests.
"""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from jobs.bench.job import PYTHON, SIZE_PX, fit
from jobs.bench.record import write
from raydetect.records import Chunk, Member
from raydetect.spec import ScoreSpec, parse_job
from raydetect.storage import Storage
from tests.made.archives import normal_files, pack
from tests.made.images import encode, normal_image
from tests.test_gateway_fuzz import BOUNDARY, form, mutated

BATCH = 16
ROUNDS, SINGLES, BATCHES, REQUESTS, FUZZED = 3, 200, 60, 10_000, 10_000
AT_ONCE = 8
SMALL_PX = 64  # of the 10,000 requests
NAME = "line"


def pictures(count: int, size_px: int = SIZE_PX) -> list[bytes]:
    """PNGs."""
    return [encode(normal_image(i, size_px)) for i in range(count)]


async def ask(url: str, requests: int, per_request: int, at_once: int, size_px: int) -> dict[str, Any]:
    """Sends requests, `at_once` at a time; seconds of each, and how many had which status."""
    files = [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(pictures(per_request, size_px))]
    waiting, seconds, statuses = iter(range(requests)), list[float](), dict[int, int]()

    async def worker(client: httpx.AsyncClient) -> None:
        for _ in waiting:
            begun = time.perf_counter()
            answer = await client.post(f"{url}/v1/detectors/{NAME}/score", files=files)
            seconds.append(time.perf_counter() - begun)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

    begun = time.perf_counter()
    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(worker(client) for _ in range(at_once)))
    spent = time.perf_counter() - begun
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {
        "images_per_second": round(requests * per_request / spent, 2),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "statuses": statuses,
    }


async def fuzz(url: str, requests: int) -> dict[str, Any]:
    """Sends broken images and forms."""
    dice, statuses = random.Random(1), dict[int, int]()
    good = [encode(normal_image(i, SMALL_PX), kind) for i, kind in enumerate(("PNG", "JPEG", "BMP", "TIFF", "WEBP"))]
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    async with httpx.AsyncClient(timeout=120) as client:
        for number in range(requests):
            picture = dice.choice(good)
            body = form(mutated(picture, dice)) if number % 2 else mutated(form(picture), dice)
            answer = await client.post(f"{url}/v1/detectors/{NAME}/score", content=body, headers=headers)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    return {"statuses": statuses}


def client(mode: str, url: str, requests: int) -> dict[str, Any]:
    """What another process found."""
    words = [PYTHON, "-m", "jobs.bench.serve", mode, url, str(requests)]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return found


def bare(folder: Path, count: int) -> float:
    """Images/s of the bare Scorer in a process of one thread for each core, batches of BATCH."""
    import torch

    from raydetect.worker.artifact import load_artifact
    from raydetect.worker.score import Scorer

    torch.set_num_threads(os.cpu_count() or 1)
    job = {
        "kind": "score",
        "source": {"uri": f"{folder}/day"},
        "artifact": f"{folder}/artifact",
        "sink": {"uri": f"{folder}/none", "heatmaps": "none"},
        "flag": {"alpha": 0.1},
        "batch_size": BATCH,
        "resources": {"cpus_per_worker": os.cpu_count()},
    }
    spec = parse_job(job, "bare")
    assert isinstance(spec, ScoreSpec)
    scorer = Scorer(load_artifact(f"file://{folder}/artifact", Storage()), spec)
    members = tuple(Member(f"{i}", f"{i}", data=data) for i, data in enumerate(pictures(BATCH)))
    scorer.score_chunk(Chunk(0, 0, True, members))
    begun = time.perf_counter()
    for _ in range(count):
        scorer.score_chunk(Chunk(0, 0, True, members))
    return count * BATCH / (time.perf_counter() - begun)


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`raydetect serve` on a local Ray, one replica for each core; its process and URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {
        "kind": "serve",
        "detectors": {NAME: {"artifact": f"{folder}/artifact", "flag": {"alpha": 0.1}}},
        "port": port,
        "batch_size": BATCH,
        "allow": {"sources": [str(folder)], "sinks": [str(folder)]},
        "resources": {"num_workers": os.cpu_count(), "cpus_per_worker": 1},
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(values))
    with (folder / "serve.log").open("wb") as log:
        words = [PYTHON, "-m", "raydetect", "serve", str(folder / "serve.yaml")]
        process = subprocess.Popen(words, stdout=log, stderr=log)
    while b"Serving" not in (folder / "serve.log").read_bytes():
        assert process.poll() is None, (folder / "serve.log").read_text()
        time.sleep(0.5)
    url = f"http://127.0.0.1:{port}"
    httpx.get(f"{url}/readyz", timeout=120).raise_for_status()
    return process, url


def replica_bytes() -> int:
    """Memory of all scoring replicas."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"ServeReplica:raydetect" in (entry / "cmdline").read_bytes():
                total += int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # it ended meanwhile
            continue
    return total


def while_an_archive_runs(folder: Path, url: str) -> dict[str, Any]:
    """Latency of single images, alone and while an archive is scored."""
    alone = client("one", url, SINGLES)
    body = {"detector": NAME, "source": {"uri": f"{folder}/day"}, "sink": {"uri": f"{folder}/bulk", "heatmaps": "none"}}
    begun = httpx.post(f"{url}/v1/archives", json=body, timeout=60)
    begun.raise_for_status()
    where = f"{url}/v1/archives/{begun.json()['id']}"
    beside = client("one", url, SINGLES)
    still = httpx.get(where, timeout=60).json()["state"]
    httpx.delete(where, timeout=60)
    return {"alone": alone, "beside_an_archive": beside, "the_archive_was": still}


def main() -> None:
    """Measures everything."""
    with tempfile.TemporaryDirectory(prefix="raydetect-serve-") as place:
        folder = Path(place)
        pack(f"file://{folder}/normal", ".tar", normal_files(100), 2)
        base = pictures(100)
        pack(f"file://{folder}/day", ".tar", [(f"{i:05d}.png", base[i % 100]) for i in range(4000)], 16)
        fit(folder)
        process, url = serve(folder)
        try:
            rounds = []
            for _ in range(ROUNDS):
                alone = bare(folder, BATCHES // 2)
                served = client("many", url, BATCHES)
                rounds.append(
                    {"bare": round(alone, 2), **served, "over_bare": round(served["images_per_second"] / alone, 3)}
                )
                print(rounds[-1], flush=True)
            latencies = while_an_archive_runs(folder, url)
            print(latencies, flush=True)
            many = client("small", url, REQUESTS)
            print(many, flush=True)
            before = replica_bytes()
            fuzzed = client("fuzz", url, FUZZED)
            figures = {
                "size_px": SIZE_PX,
                "batches_of_16": sorted(rounds, key=lambda one: one["over_bare"])[len(rounds) // 2],
                "single_images": latencies,
                "requests": many,
                "fuzzed": {**fuzzed, "replica_memory_after_over_before": round(replica_bytes() / before, 3)},
            }
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        write("serve", "python -m jobs.bench.serve", figures)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        mode, url, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
        work = {
            "one": lambda: ask(url, count, 1, 1, SIZE_PX),
            "many": lambda: ask(url, count, BATCH, AT_ONCE, SIZE_PX),
            "small": lambda: ask(url, count, 1, AT_ONCE, SMALL_PX),
            "fuzz": lambda: fuzz(url, count),
        }
        print(json.dumps(asyncio.run(work[mode]())))
