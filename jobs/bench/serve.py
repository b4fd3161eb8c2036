"""The endpoints under load: rate relative to the bare Scorer, latency with and without an archive run, fuzzed bodies.

The client (`load.py`) runs in its own process. Its modes `small` and `fuzz` use a second detector with small images, so
that 10,000 requests take only minutes.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from jobs.bench.job import PYTHON, SIZE_PX, fit
from jobs.bench.load import BATCH, NAME, SMALL, SMALL_PX, pictures
from jobs.bench.record import write
from tests.builders.archives import normal_files, pack

ROUNDS, SINGLES, BATCHES, REQUESTS, KILLED, FUZZED = 3, 50, 30, 10_000, 3_000, 10_000
KILL_AFTER_SECONDS = 6
SETTLED = 2_000  # number of fuzzed bodies before the first memory measurement


def client(mode: str, url: str, requests: int) -> dict[str, Any]:
    """Runs the load generator and returns its results."""
    command = [PYTHON, "-m", "jobs.bench.load", mode, url, str(requests)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def bare(folder: Path, count: int) -> float:
    """Images/s of bare Scorers in batches of BATCH, with one single-threaded process per core, like replicas."""
    command = [PYTHON, "-m", "jobs.bench.bare", str(folder), str(count)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(os.cpu_count() or 1)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    seconds = [float(process.communicate()[0]) for process in processes]
    return len(processes) * count * BATCH / max(seconds)


def fit_small(folder: Path) -> None:
    """Fits a second artifact, for small images."""
    values = yaml.safe_load((folder / "fit.yaml").read_text())
    values["detector"]["params"]["image_size"] = [SMALL_PX, SMALL_PX]
    (folder / "fit_small.yaml").write_text(yaml.safe_dump({**values, "artifact": f"{folder}/small"}))
    command = [PYTHON, "-m", "raydetect", "fit", str(folder / "fit_small.yaml"), "--local"]
    subprocess.run(command, check=True, capture_output=True)


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Starts `raydetect serve` on a local Ray with one replica per core; returns its process and URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flag = {"alpha": 0.1}
    values = {
        "kind": "serve",
        "detectors": {
            NAME: {"artifact": f"{folder}/artifact", "flag": flag},
            SMALL: {"artifact": f"{folder}/small", "flag": flag},
        },
        "port": port,
        "batch_size": BATCH,
        "allow": {"sources": [str(folder)], "sinks": [str(folder)]},
        "resources": {"num_workers": os.cpu_count(), "cpus_per_worker": 1},
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(values))
    with (folder / "serve.log").open("wb") as log:
        command = [PYTHON, "-m", "raydetect", "serve", str(folder / "serve.yaml")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    while b"Serving" not in (folder / "serve.log").read_bytes():
        assert process.poll() is None, (folder / "serve.log").read_text()
        time.sleep(0.5)
    url = f"http://127.0.0.1:{port}"
    httpx.get(f"{url}/readyz", timeout=120).raise_for_status()
    return process, url


def replicas(deployment: str) -> list[Path]:
    """The /proc entries of Serve replicas of a deployment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and f"ServeReplica:raydetect:{deployment}".encode() in (entry / "cmdline").read_bytes()
            ):
                found.append(entry)
        except OSError:  # it has ended in the meantime
            continue
    return found


def replica_bytes() -> int:
    """Memory of all replicas: scorers, controller and ingress."""
    pages = sum(int((entry / "statm").read_text().split()[1]) for entry in replicas(""))
    return pages * os.sysconf("SC_PAGE_SIZE")


def with_a_replica_killed(url: str) -> dict[str, Any]:
    """Sends requests while one of the scoring replicas is killed."""
    command = [PYTHON, "-m", "jobs.bench.load", "small", url, str(KILLED)]
    load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(KILL_AFTER_SECONDS)
    assert load.poll() is None, "the requests finished before a replica was killed"
    os.kill(int(replicas("Scorer")[0].name), signal.SIGKILL)
    output, _ = load.communicate()
    found: dict[str, Any] = json.loads(output)
    return found


def fuzzed(url: str) -> dict[str, Any]:
    """Sends broken bodies; returns counts by status and memory growth after the first SETTLED."""
    first = client("fuzz", url, SETTLED)
    before = replica_bytes()
    rest = client("fuzz", url, FUZZED - SETTLED)
    statuses = {
        status: first["statuses"].get(status, 0) + rest["statuses"].get(status, 0)
        for status in sorted({*first["statuses"], *rest["statuses"]})
    }
    return {"statuses": statuses, "memory_after_over_before": round(replica_bytes() / before, 3)}


def while_an_archive_runs(folder: Path, url: str) -> dict[str, Any]:
    """Latency of single images, alone and during an archive run."""
    alone = client("one", url, SINGLES)
    body = {"detector": NAME, "source": {"uri": f"{folder}/day"}, "sink": {"uri": f"{folder}/bulk", "heatmaps": "none"}}
    started = httpx.post(f"{url}/v1/archives", json=body, timeout=60)
    started.raise_for_status()
    run_url = f"{url}/v1/archives/{started.json()['id']}"
    beside = client("one", url, SINGLES)
    state = httpx.get(run_url, timeout=60).json()["state"]
    httpx.delete(run_url, timeout=60)
    return {"alone": alone, "beside_an_archive": beside, "the_archive_was": state}


def main() -> None:
    """Runs the benchmark and writes its results."""
    with tempfile.TemporaryDirectory(prefix="raydetect-serve-") as temporary:
        folder = Path(temporary)
        pack(f"file://{folder}/normal", ".tar", normal_files(100), 2)
        base = pictures(100, SIZE_PX)
        pack(f"file://{folder}/day", ".tar", [(f"{i:05d}.png", base[i % 100]) for i in range(4000)], 16)
        fit(folder)
        fit_small(folder)
        process, url = serve(folder)
        try:
            rounds = []
            for _ in range(ROUNDS):
                alone = bare(folder, BATCHES // (os.cpu_count() or 1))
                served = client("many", url, BATCHES)
                rounds.append(
                    {"bare": round(alone, 2), **served, "over_bare": round(served["images_per_second"] / alone, 3)}
                )
                print(rounds[-1], flush=True)
            latencies = while_an_archive_runs(folder, url)
            print(latencies, flush=True)
            many = client("small", url, REQUESTS)
            print(many, flush=True)
            killed = with_a_replica_killed(url)
            print(killed, flush=True)
            figures = {
                "size_px": SIZE_PX,
                "batches_of_16": sorted(rounds, key=lambda r: r["over_bare"])[len(rounds) // 2],
                "all_over_bare": [r["over_bare"] for r in rounds],
                "single_images": latencies,
                "requests": many,
                "with_a_replica_killed": killed,
                "fuzzed": fuzzed(url),
            }
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        write("serve", "python -m jobs.bench.serve", figures)


if __name__ == "__main__":
    main()
