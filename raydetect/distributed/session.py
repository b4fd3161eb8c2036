"""Connecting to Ray: a cluster by address, or a private local one that ends with the command."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.data import DataContext

from raydetect.config import ResourceSpec
from raydetect.distributed.local_disk import open_message_log, require_ray_folder
from raydetect.distributed.ray_errors import translate

LOOPBACK = "127.0.0.1"
STARTING_AT_ONCE = 8  # actors without CPU slots start beside the workers; Ray warns past four times the slots


@contextmanager
def session(address: str | None, resources: ResourceSpec) -> Iterator[None]:
    """A connection to Ray while the block runs.

    Args:
        address: of a cluster; None uses RAY_ADDRESS, and without that starts a private local Ray that has exactly
            the stated resources.
        resources: what the job asks for.

    Raises:
        ClusterError: it cannot be reached or refuses.
    """
    target = address or os.environ.get("RAY_ADDRESS")
    with _native_messages_in_a_file(), nullcontext() if target else _one_machine():
        try:
            if target:
                ray.init(address=target, log_to_driver=False, logging_level=logging.ERROR)
            else:
                _start_local(resources)
        except Exception as error:
            raise translate(error, target) from None
        try:
            _quiet()
            yield
        finally:
            ray.shutdown()


@contextmanager
def _native_messages_in_a_file() -> Iterator[None]:
    """Ray's C++ side writes to file descriptor 2 past every Python setting; Python's own messages still reach people.

    Notices of lost workers, which Ray prints to standard output among what commands say, go the same way.

    The file `raydetect-ray-PID.log` lies in the temporary folder, and is removed when nothing was written.
    """
    file, log = open_message_log()
    sys.stderr.flush()
    kept = os.dup(2)
    people = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    before, notices = sys.stderr, ray_worker.print_to_stdstream
    with file:
        os.dup2(file.fileno(), 2)
    ray_worker.print_to_stdstream = _to_descriptor_2
    if _is_descriptor_2(before):
        sys.stderr = people
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = notices
        sys.stderr = before
        people.close()
        os.dup2(kept, 2)
        os.close(kept)
        if log.exists() and log.stat().st_size == 0:
            log.unlink()


def _to_descriptor_2(notice: dict[str, Any], **_: object) -> None:
    os.write(2, "".join(f"{line}\n" for line in notice["lines"]).encode())


def _is_descriptor_2(stream: object) -> bool:
    try:
        return stream.fileno() == 2  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):  # replaced by something that is no file, as in tests
        return False


@contextmanager
def _one_machine() -> Iterator[None]:
    """Settings of a private local Ray and its child processes.

    Ray turns 127.0.0.1 into the machine's own address, and listens on all interfaces, unless clusters are off. Ray
    Train's watcher of nodes that a cloud is about to take away is a process with nothing to do. What Ray would tell
    its makers of a cluster's use stays here.
    """
    names = (
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR,
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
        "RAY_USAGE_STATS_ENABLED",
    )
    clusters, environment = ray_constants.ENABLE_RAY_CLUSTER, {name: os.environ.get(name) for name in names}
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.update(dict.fromkeys(names, "0"))
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name in names:
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if value is not None})


def _start_local(resources: ResourceSpec) -> None:
    require_ray_folder()
    ray.init(
        address="local",  # without it, Ray joins any cluster that was started on this machine
        num_cpus=resources.num_actors * resources.cpus_per_worker,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=LOOPBACK,
        _system_config={
            "local_fs_capacity_threshold": 0.99,
            "worker_maximum_startup_concurrency": STARTING_AT_ONCE,
        },
    )


def _quiet() -> None:
    """Ray Data's own progress and notes go to its log files."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
