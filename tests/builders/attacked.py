"""A server in a process of its own that is attacked, while another client asks for its health."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import yaml

from tests.builders.server import LIMITS

SECRET, OTHER = "a-secret-of-line-four-0001", "a-secret-of-line-five-0002"
SCOPES = ["score", "archive", "admin"]
TOKENS = [{"name": name, "token": token, "scopes": SCOPES} for name, token in (("a", SECRET), ("b", OTHER))]
HOLDER, SECOND = {"Authorization": f"Bearer {SECRET}"}, {"Authorization": f"Bearer {OTHER}"}


@dataclass(frozen=True)
class Attacked:
    """A running server."""

    url: str
    process: "subprocess.Popen[str]"

    def memory_mb(self, key: str = "VmRSS") -> float:
        """Memory of the process; `VmHWM` is its peak since `idle_mb`."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    def idle_mb(self) -> float:
        """The memory now; starts a new peak."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self.memory_mb()

    def health_seconds(self, attack: Callable[[], Any]) -> tuple[Any, float, float]:
        """What an attack returns, the slowest `/healthz` of another client meanwhile, and an upper bound for it.

        The bound is 0.5 s, and more on a machine that is slow without any attack.
        """
        quiet = [self._health() for _ in range(5)]
        taken, stop = [0.0], threading.Event()

        def ask() -> None:
            while not stop.is_set():
                taken.append(self._health())
                stop.wait(0.02)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            found = attack()
        finally:
            stop.set()
            asking.join()
        return found, max(taken), 0.5 + 20 * median(quiet)

    def _health(self) -> float:
        started = time.monotonic()
        assert httpx.get(f"{self.url}/healthz", timeout=120).status_code == 200
        return time.monotonic() - started


@contextmanager
def attacked(folder: Path, **changes: Any) -> Iterator[Attacked]:
    """Serves the place of `make_place` with two tokens, HOLDER's and SECOND's.

    Args:
        folder: the place.
        changes: keys of the serve job to override.
    """
    values = {
        "kind": "serve",
        "detectors": {"bottle": {"artifact": f"{folder}/models/one", "flag": {"alpha": 0.1}}},
        "port": 0,
        "allow": {"sources": [f"{folder}/open"], "sinks": [f"{folder}/results"], "artifacts": [f"{folder}/models"]},
        "limits": LIMITS,
        **changes,
    }
    job = folder / "attacked.yaml"
    job.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "RAYDETECT_TOKENS": yaml.safe_dump(TOKENS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "raydetect", "serve", "--local", str(job)]
    log = (folder / "attacked.log").open("w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("Serving"))
        yield Attacked(line.split()[-1], process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        log.close()
        assert process.stdout is not None
        process.stdout.close()
