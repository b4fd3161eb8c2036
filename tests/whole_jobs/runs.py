"""Whole jobs through the command line, in processes of their own that tests may kill."""

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
from tests.whole_jobs import fork_worker

COMMAND = Path(sys.executable).with_name("raydetect")
PATIENCE = 240  # seconds for a step of a job
QUIET_NODE = {
    "include_dashboard": False,  # nobody reads it, nor the log
    "include_log_monitor": False,
    "setup_worker_path": str(Path(fork_worker.__file__)),  # see nursery.py
}
POLL_SECONDS = 0.25  # listing a bucket costs the store some 20 ms of processor time


@dataclass
class Run:
    """A running command with its output in files."""

    process: subprocess.Popen[bytes]
    folder: Path

    def text(self) -> str:
        """What it said so far."""
        return "".join((self.folder / name).read_text() for name in ("stdout", "stderr"))

    def wait(self, seconds: float = 240) -> int:
        """Its exit code."""
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        """SIGKILL to the command itself."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=20)


STARTED: list[Run] = []


def start(folder: Path, *words: str, **environment: str) -> Run:
    """Starts `raydetect WORDS`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err, _interruptible():
        process = subprocess.Popen(
            [COMMAND, *words], stdout=out, stderr=err, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
        )
    made = Run(process, folder)
    STARTED.append(made)
    return made


def end_started() -> None:
    """Ends what a failed test left running, and all that it started; the next test needs the machine."""
    while STARTED:
        left = STARTED.pop()
        if left.process.poll() is None:
            below = list(descendants(left.process.pid))
            left.kill()
            end(below)


@contextmanager
def _interruptible() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and so would what they start.

    A `preexec_fn` would fork this process while Ray's threads run in it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(folder: Path, *words: str, **environment: str) -> Run:
    """Runs `raydetect WORDS` to its end; exit code 0."""
    made = start(folder, *words, **environment)
    code = made.wait()
    assert code == 0, f"raydetect {' '.join(words)} ended with {code}:\n{made.text()}"
    return made


def run_here(*words: str) -> str:
    """Runs `raydetect WORDS --local` in this process, which has loaded torch already; what it said. Exit code 0."""
    return _invoked(0, *words, "--local")


def run_on(address: str, *words: str) -> str:
    """Runs `raydetect WORDS` with this process as driver of a job on a cluster; what it said. Exit code 0.

    Not for `engine: serve`: the threads of Ray Serve's client outlive the job, and a fork beside them may break.
    """
    return _invoked(0, *words, "--address", address)


def refused_on(address: str, *words: str) -> str:
    """The same of a job that must fail: exit code 1."""
    return _invoked(1, *words, "--address", address)


def _invoked(code: int, *words: str) -> str:
    threads = torch.get_num_threads()
    try:
        ended = CliRunner().invoke(main, words, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert ended.exit_code == code, f"raydetect {' '.join(words)} ended with {ended.exit_code}:\n{ended.output}"
    return ended.output


def write_job(path: Path, values: dict[str, Any]) -> str:
    """A job file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def descendants(pid: int) -> Iterator[int]:
    """Processes that `pid` started, and those that these started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # it ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            yield child
            waiting.append(child)


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """Hexadecimal addresses, as the kernel lists them, on which these processes listen for TCP connections."""
    sockets = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":  # LISTEN
                sockets[f"socket:[{words[9]}]"] = words[1].partition(":")[0]
    found = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):  # it was closed meanwhile
                found.add(sockets.get(os.readlink(entry), ""))
    return found - {""}


def processes_of(word: bytes, pid: int) -> list[int]:
    """Processes below `pid` whose command line holds a word: `ScoreActor`, `RayTrainWorker`."""
    found = []
    for child in descendants(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if word in words:
            found.append(child)
    return found


def scoring_actors(pid: int) -> list[int]:
    """Ray's processes below `pid` that hold a scoring actor."""
    return processes_of(b"ScoreActor", pid)


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"{what} did not happen in {seconds} s")


def wait_for_slots(address: str, wanted: int) -> None:
    """Waits until no job before holds the slots: a fit begins on those that it finds."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        wait_until(lambda: ray.available_resources().get("CPU", 0) >= wanted, PATIENCE, f"{wanted} free slots")
    finally:
        ray.shutdown()


def rows_of(uri: str, storage: Storage) -> list[dict[str, Any]]:
    """Committed rows in order of keys, heatmap URIs relative to the results directory; no key twice."""
    found: list[dict[str, Any]] = []
    for part in Ledger(uri, storage).part_uris():
        with storage.open(part) as handle:
            found += pq.read_table(handle).to_pylist()
    for row in found:
        row["heatmap_uri"] = (row["heatmap_uri"] or "").replace(uri, "")
    keys = [row["key"] for row in found]
    assert len(set(keys)) == len(keys), "a key is there twice"
    return sorted(found, key=lambda row: row["key"])


def open_heatmaps(uri: str, storage: Storage) -> int:
    """Opens every heatmap of the rows by its URI; how many there are."""
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
    """SIGKILL to processes that this test started and that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes with one CPU slot each, on this machine; yields (cluster, its second node)."""
    from ray.cluster_utils import Cluster

    words = {**QUIET_NODE, "num_cpus": 1, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=words)
    try:
        # an address of its own: the command connects to the node that has this machine's, which is the first
        second = cluster.add_node(**words, node_ip_address="127.0.0.2")
        cluster.wait_for_nodes()
        yield cluster, second
    finally:
        cluster.shutdown()
