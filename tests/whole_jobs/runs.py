"""Runs whole jobs through the command line, in separate processes that tests may kill."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import ray
import torch
import yaml
from click.testing import CliRunner

from raydetect.cli.main import main
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from tests.builders.commands import interruptible
from tests.whole_jobs import fork_worker

COMMAND = Path(sys.executable).with_name("raydetect")
PATIENCE = 240  # timeout in seconds for a step of a job
QUIET_NODE = {
    "include_dashboard": False,  # neither it nor the log is read
    "include_log_monitor": False,
    "setup_worker_path": str(Path(fork_worker.__file__)),  # see fork_server.py
}
POLL_SECONDS = 0.25  # listing a bucket costs the store about 20 ms of CPU time


@dataclass
class Run:
    """A running command whose output goes to files."""

    process: subprocess.Popen[bytes]
    folder: Path

    def text(self) -> str:
        """Its output so far."""
        return "".join((self.folder / name).read_text() for name in ("stdout", "stderr"))

    def wait(self, seconds: float = 240) -> int:
        """Waits for the command and returns its exit code."""
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        """Sends SIGKILL to the command only."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=20)


STARTED: list[Run] = []


def start(folder: Path, *arguments: str, **environment: str) -> Run:
    """Starts `raydetect WORDS`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err, interruptible():
        process = subprocess.Popen(
            [COMMAND, *arguments], stdout=out, stderr=err, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
        )
    started = Run(process, folder)
    STARTED.append(started)
    return started


def end_started() -> None:
    """Kills commands that a failed test left running, and their descendants, before the next test."""
    while STARTED:
        left = STARTED.pop()
        if left.process.poll() is None:
            below = list(descendants(left.process.pid))
            left.kill()
            end(below)


def run(folder: Path, *arguments: str, **environment: str) -> Run:
    """Runs `raydetect WORDS` to completion; its exit code must be 0."""
    started = start(folder, *arguments, **environment)
    code = started.wait()
    assert code == 0, f"raydetect {' '.join(arguments)} ended with {code}:\n{started.text()}"
    return started


def run_here(*arguments: str) -> str:
    """Runs `raydetect WORDS --local` in this process, where torch is loaded; returns its output. Exit code 0."""
    return _invoked(0, *arguments, "--local")


def run_on(address: str, *arguments: str) -> str:
    """Runs `raydetect WORDS` on a cluster with this process as the driver; returns its output. Exit code 0.

    Not for `engine: serve`: the threads of Ray Serve's client outlive the job, which makes forking unsafe.
    """
    return _invoked(0, *arguments, "--address", address)


def refused_on(address: str, *arguments: str) -> str:
    """The same for a job that must fail: exit code 1."""
    return _invoked(1, *arguments, "--address", address)


def _invoked(code: int, *arguments: str) -> str:
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == code, f"raydetect {' '.join(arguments)} ended with {result.exit_code}:\n{result.output}"
    return result.output


def write_job(path: Path, values: dict[str, Any]) -> str:
    """Writes a job file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def descendants(pid: int) -> Iterator[int]:
    """Yields all descendant processes of `pid`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # it has ended in the meantime
                continue
            children.setdefault(parent, []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            yield child
            waiting.append(child)


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """Addresses on which these processes listen for TCP connections, in the kernel's hexadecimal notation."""
    sockets = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                sockets[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    found = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):  # it has been closed in the meantime
                found.add(sockets.get(os.readlink(entry), ""))
    return found - {""}


def processes_of(name: bytes, pid: int) -> list[int]:
    """Descendants of `pid` whose command line contains a name, e.g. `ScoreActor` or `RayTrainWorker`."""
    found = []
    for child in descendants(pid):
        try:
            command_line = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:  # it has ended in the meantime
            continue
        if name in command_line:
            found.append(child)
    return found


def scoring_actors(pid: int) -> list[int]:
    """Descendants of `pid` that are scoring actors."""
    return processes_of(b"ScoreActor", pid)


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Polls a condition and returns its first true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"{what} did not happen in {seconds} s")


def wait_for_slots(address: str, wanted: int) -> None:
    """Waits until earlier jobs have released their CPUs: a fit starts on those that are free."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        wait_until(lambda: ray.available_resources().get("CPU", 0) >= wanted, PATIENCE, f"{wanted} free CPUs")
    finally:
        ray.shutdown()


def rows_of(uri: str, storage: Storage) -> list[dict[str, Any]]:
    """Committed rows sorted by key, heatmap URIs relative to the results directory; checks that keys are unique."""
    found: list[dict[str, Any]] = []
    for part in Ledger(uri, storage).part_uris():
        with storage.open(part) as handle:
            found += pq.read_table(handle).to_pylist()
    for row in found:
        row["heatmap_uri"] = (row["heatmap_uri"] or "").replace(uri, "")
    keys = [row["key"] for row in found]
    assert len(set(keys)) == len(keys), "duplicate keys"
    return sorted(found, key=lambda row: row["key"])


def open_heatmaps(uri: str, storage: Storage) -> int:
    """Opens all heatmaps of the rows by their URIs; returns their number."""
    wanted: dict[str, list[str]] = {}
    for row in rows_of(uri, storage):
        if row["heatmap_uri"]:
            member, _, container = row["heatmap_uri"].partition("::")
            wanted.setdefault(uri + container, []).append(member.removeprefix("zip://"))
    options = storage.fsspec_options(uri)
    for container, members in wanted.items():
        scheme = container.partition("://")[0]
        zipped = fsspec.filesystem("zip", fo=container, target_protocol=scheme, target_options=options)
        for member in members:
            assert zipped.cat_file(member)[:8] == b"\x89PNG\r\n\x1a\n"
    return sum(map(len, wanted.values()))


def end(pids: list[int]) -> None:
    """Sends SIGKILL to processes started by this test that are still running."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Runs a cluster of two nodes with one CPU each on this machine; yields (cluster, its second node)."""
    from ray.cluster_utils import Cluster

    node = {**QUIET_NODE, "num_cpus": 1, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=node)
    try:
        # its own address, since the command connects to the node with this machine's address, the first one
        second = cluster.add_node(**node, node_ip_address="127.0.0.2")
        cluster.wait_for_nodes()
        yield cluster, second
    finally:
        cluster.shutdown()
