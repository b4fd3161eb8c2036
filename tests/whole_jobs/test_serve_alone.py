"""The endpoints on a local Ray: loopback only, more detectors than fit in memory, more replicas under load."""

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.builders.archives import mixed_files
from tests.builders.server import fit_small
from tests.objectstore import free_port
from tests.whole_jobs.runs import PATIENCE, Run, descendants, listening_addresses, processes_of, start, wait_until
from tests.whole_jobs.served import REPLICA, metrics_of

LOOPBACK = {
    "0100007F",
    "0000000000000000FFFF00000100007F",
    "00000000000000000000000001000000",
}  # in the kernel's notation
PICTURES = [data for _, data in mixed_files(4, 2, masks=False)]


def started(folder: Path, **changes: Any) -> tuple[Run, str]:
    """`raydetect serve` on a local Ray, and its URL."""
    port = free_port()
    names = ("one", "two", "three")
    served = {
        name: {"artifact": fit_small(folder, name, seed), "flag": {"alpha": 0.1}} for seed, name in enumerate(names)
    }
    values = {"kind": "serve", "detectors": served, "port": port, "batch_size": 4, **changes}
    (folder / "serve.yaml").write_text(yaml.safe_dump(values))
    running = start(folder, "serve", str(folder / "serve.yaml"))

    def ready() -> bool:
        assert running.process.poll() is None, running.text()
        return "Tokens: none" in running.text()

    wait_until(ready, PATIENCE, "the start of the server")
    return running, f"http://127.0.0.1:{port}"


def test_detectors_are_evicted_and_replicas_added_under_load(tmp_path: Path) -> None:
    resources = {"num_workers": 1, "cpus_per_worker": 1, "detectors_in_memory": 2}
    running, url = started(tmp_path, max_workers=2, resources=resources)
    below = list(descendants(running.process.pid))
    addresses = listening_addresses(below)
    assert addresses and addresses <= LOOPBACK

    def scores(name: str) -> list[float]:
        files = [("images", (f"{i}.png", data)) for i, data in enumerate(PICTURES)]
        response = httpx.post(f"{url}/v1/detectors/{name}/score", files=files, timeout=PATIENCE)
        assert response.status_code == 200, response.text
        return [entry["image_score"] for entry in response.json()["results"]]

    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), PATIENCE) as endless:
        endless.sendall(b"GET / HTTP/1.1\r\nx-a: " + b"a" * 70_000)
        assert endless.recv(100).startswith(b"HTTP/1.1 431 ")
    first = {name: scores(name) for name in ("one", "two", "three")}
    assert len({tuple(found) for found in first.values()}) == 3
    stop = threading.Event()

    def ask(name: str) -> None:
        while not stop.is_set():
            assert scores(name) == pytest.approx(first[name], rel=1e-6)

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(ask, name) for name in 2 * sorted(first)]
        try:
            wait_until(lambda: len(processes_of(REPLICA, running.process.pid)) == 2, PATIENCE, "a second replica")
        finally:
            stop.set()
        for future in futures:
            future.result()
    metrics = metrics_of(running.text())
    evicted = "ray_serve_multiplexed_models_unload_counter"
    wait_until(lambda: evicted in httpx.get(metrics).text, PATIENCE, "the eviction of detectors")
    os.kill(running.process.pid, signal.SIGINT)
    assert running.wait(PATIENCE) == 0 and "Stopped." in running.text()
