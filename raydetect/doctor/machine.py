"""Cores, memory, disks and ports of this machine, and the cluster of RAY_ADDRESS."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from raydetect.doctor.finding import Finding
from raydetect.progress.texts import bytes_text
from raydetect.redaction import redacted

GB = 10**9
LOW_DISK, LOW_MEMORY, LOW_STORE = 2 * GB, 2 * GB, GB
SHARED = Path("/dev/shm")  # noqa: S108
CONNECT_SECONDS = 5.0
GCS_PORT = 6379


def machine_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Memory, disks, the object store of Ray, and Ray itself.

    Args:
        environment: variables, such as `os.environ`.
    """
    yield _memory(free_memory())
    yield disk("temp", Path(tempfile.gettempdir()), "Free some, or set TMPDIR.")
    yield disk("cache", _cache(environment), "Free some, or set TORCH_HOME and HF_HOME.")
    yield _object_store(SHARED)
    yield _loopback()
    address = environment.get("RAY_ADDRESS")
    yield Finding("Ray", "ok", "RAY_ADDRESS is not set; jobs start a local Ray") if not address else cluster(address)


def free_memory() -> int:
    """Bytes that processes can still use, by the system and the limits of a container."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def disk(topic: str, folder: Path, advice: str) -> Finding:
    """Free space of the disk of a folder, which need not exist yet, and whether it can be written."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(topic, "missing", f"{folder}: cannot be written ({error.strerror})", advice)
    text = f"{folder}: {bytes_text(free)} free"
    return Finding(topic, "ok", text) if free >= LOW_DISK else Finding(topic, "note", text, advice)


def cluster(address: str) -> Finding:
    """Whether something listens at the address of a cluster."""
    text = f"RAY_ADDRESS={redacted(address)}"
    if address in ("auto", "local"):
        return Finding("Ray", "ok", text)
    advice = "Start the cluster, correct RAY_ADDRESS, or unset it to use a local Ray."
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port or GCS_PORT
    except ValueError:
        return Finding("Ray", "missing", f"{text}: is not HOST:PORT", advice)
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return Finding("Ray", "missing", f"{text}: cannot be reached ({error.strerror or error})", advice)
    return Finding("Ray", "ok", f"{text}: answers")


def _memory(free: int) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{bytes_text(free)} free, {cores} CPU cores"
    if free >= LOW_MEMORY:
        return Finding("memory", "ok", text)
    return Finding("memory", "note", text, "A worker needs 1 to 2 GB; end other programs, or use one worker.")


def _cache(environment: Mapping[str, str]) -> Path:
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("TORCH_HOME") or f"{home}/torch").expanduser()


def _object_store(folder: Path) -> Finding:
    if not folder.exists():
        return Finding(str(folder), "ok", "not there; Ray keeps its objects in the temp folder")
    free = shutil.disk_usage(folder).free
    text = f"{bytes_text(free)} free for the object store of a local Ray"
    if free >= LOW_STORE:
        return Finding(str(folder), "ok", text)
    advice = "Ray uses the temp folder instead, which is slower; start a container with --shm-size=2g."
    return Finding(str(folder), "note", text, advice)


def _loopback() -> Finding:
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            socket.create_connection(server.getsockname(), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        found = f"127.0.0.1 cannot be listened on ({error.strerror or error})"
        return Finding("ports", "note", found, "A local Ray and `raydetect serve` need it; --local does not.")
    return Finding("ports", "ok", "127.0.0.1 can be listened on, as a local Ray does")
