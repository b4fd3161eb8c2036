"""A process that has loaded what Ray's workers need, and forks them.

Whole jobs start hundreds of workers, and each took seconds of processor time to import torch and the rest. Only
clusters of `QUIET_NODE` have their workers from here; a private Ray and the head that jobs are submitted to start
their own, as people's do.
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

from tests.whole_jobs.fork_worker import NURSERY

LOADED = (  # not Ray, which reads the environment of a worker while it is loaded
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
ARROWS = "jemalloc_bg_thd"  # of Arrow's allocator, which starts it again in a fork


@contextmanager
def running_nursery(folder: Path) -> Iterator[None]:
    """Clusters that are started in the block have their workers from it."""
    place = folder / "nursery"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.whole_jobs.nursery", str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.environ[NURSERY] = str(place)
    try:
        yield
    finally:
        del os.environ[NURSERY]
        process.stdin.close()
        process.wait(timeout=20)


def main(place: str) -> None:
    """Forks a worker for everybody who asks, until standard input closes."""
    for name in LOADED:
        importlib.import_module(name)
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert threads <= {"python", ARROWS}, f"a fork would lose threads: {threads}"
    assert "ray" not in sys.modules
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(place)
        door.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([door, 0], [], [])
            if 0 in ready:
                return
            line, _ = door.accept()
            length, files, _, _ = socket.recv_fds(line, 4, 3)
            with line.makefile("rb") as reader:
                asked = json.loads(reader.read(int.from_bytes(length, "big")))
            if os.fork() == 0:
                door.close()
                _become(asked, files)
                return
            line.close()
            for file in files:
                os.close(file)


def _become(asked: dict[str, Any], files: list[int]) -> None:
    """The worker, in its own folder, environment and files, from here on."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry and entry not in sys.path]
    sys.argv = asked["words"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
