"""Helpers for endpoints on Ray Serve."""

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.builders.archives import mixed_files
from tests.whole_jobs.conftest import Line
from tests.whole_jobs.runs import PATIENCE, processes_of, wait_until

PICTURES = mixed_files(12, 3, masks=False)
REPLICA = b"ray::ServeReplica:raydetect:Scorer"


@dataclass(frozen=True)
class Endpoints:
    """A running server."""

    line: Line
    url: str
    address: str
    metrics: str
    job: Path

    def score(self, *pictures: bytes, heatmaps: str = "none") -> httpx.Response:
        """Scores uploaded images."""
        files = [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(pictures)]
        return httpx.post(
            f"{self.url}/v1/detectors/widget/score", files=files, data={"heatmaps": heatmaps}, timeout=PATIENCE
        )

    def run(self, body: dict[str, Any]) -> str:
        """Begins an archive run; its own URL."""
        started = httpx.post(f"{self.url}/v1/archives", json=body, timeout=PATIENCE)
        assert started.status_code == 202, started.text
        return f"{self.url}/v1/archives/{started.json()['id']}"

    def archive(self, results: str) -> dict[str, Any]:
        """The body of an archive run with the settings of `Line.job`."""
        store = self.line.store
        patterns = {"pattern": "{category}/test/{defect}/{name}.png"}
        patterns["mask_pattern"] = "{category}/ground_truth/{defect}/{name}_mask.png"
        source = {"uri": store.uri("mixed"), **patterns}
        sink = {"uri": store.uri(results), "heatmaps": "all"}
        return {"detector": "widget", "source": source, "sink": sink, "chunk_images": 8}


def replicas() -> list[int]:
    """Process IDs of scoring replicas."""
    return processes_of(REPLICA, os.getpid())


def metrics_of(message: str) -> str:
    """The URL that Prometheus reads, from what the command said."""
    found = re.search(r"^Metrics: (http://\S+)$", message, re.MULTILINE)
    assert found is not None, message
    return found.group(1)


@contextmanager
def asking(endpoints: Endpoints) -> Iterator[list[tuple[int, str]]]:
    """Sends requests one after another while the block runs; yields the (status, version) of each response."""
    stop = threading.Event()
    seen: list[tuple[int, str]] = []

    def ask() -> None:
        while not stop.is_set():
            response = endpoints.score(PICTURES[0][1])
            body = response.json()
            assert response.status_code != httpx.codes.OK or body["artifact"] == body["results"][0]["artifact"]
            seen.append((response.status_code, body.get("artifact", "")))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask)
        try:
            wait_until(lambda: len(seen) > 3, PATIENCE, "responses")
            yield seen
            time.sleep(0.5)
        finally:
            stop.set()
        future.result()


def without_repeats(seen: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The responses without consecutive duplicates."""
    return [current for current, previous in zip(seen, [None, *seen], strict=False) if current != previous]
