"""A process that has imported the modules Ray workers need, and forks workers.

Whole jobs start hundreds of workers, each of which needs seconds of CPU time to import torch and other packages. Only
clusters with `QUIET_NODE` fork workers from here; a private Ray and the head that jobs are submitted to start their
own, as in production.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.whole_jobs.fork_worker import FORK_SERVER

LOADED = (  # without Ray, which reads the worker's environment on import
    "aiohttp",
    "fastapi",
    "jsonschema",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "requests",
    "s3fs",
    "torch.distributed",
    "uvicorn",
    "raydetect.detectors.patchcore",
    "raydetect.fitting.worker",
    "raydetect.scoring.scorer",
)
ARROW_THREAD = "jemalloc_bg_thd"  # of Arrow's allocator, which restarts it in a fork


@contextmanager
def running_fork_server(folder: Path) -> Iterator[None]:
    """Runs the fork server; clusters started within the block fork their workers from it."""
    path = folder / "fork_server"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.whole_jobs.fork_server", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.environ[FORK_SERVER] = str(path)
    try:
        yield
    finally:
        del os.environ[FORK_SERVER]
        process.stdin.close()
        process.wait(timeout=20)


def main(path: str) -> None:
    """Forks a worker for each request, until standard input closes."""
    for name in LOADED:
        importlib.import_module(name)
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert threads <= {"python", ARROW_THREAD}, f"a fork would lose threads: {threads}"
    assert "ray" not in sys.modules
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reap forked workers automatically
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                return
            connection, _ = listener.accept()
            length, files, _, _ = socket.recv_fds(connection, 4, 3)
            with connection.makefile("rb") as reader:
                request = json.loads(reader.read(int.from_bytes(length, "big")))
            if os.fork() == 0:
                listener.close()
                _become(request, files)
                return
            connection.close()
            for file in files:
                os.close(file)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Turns this process into the worker, with its working directory, environment and file descriptors."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry and entry not in sys.path]
    sys.argv = request["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
