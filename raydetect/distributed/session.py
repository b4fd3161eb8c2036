"""Connects to Ray: a cluster by address, or a private local Ray that ends with the command."""

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
LOCAL_RAY = "local"  # Ray's own word, as an address
STARTING_AT_ONCE = 8  # actors with num_cpus=0 start in addition to workers; Ray warns above four per CPU slot


@contextmanager
def session(address: str | None, resources: ResourceSpec) -> Iterator[None]:
    """Connects to Ray for the duration of the block.

    Args:
        address: address of a cluster; None uses RAY_ADDRESS or, if unset, starts a private local Ray with exactly
            these resources; `local` starts one in any case.
        resources: resources of the job.

    Raises:
        ClusterError: the cluster cannot be reached or refuses the connection.
    """
    target = address or os.environ.get("RAY_ADDRESS")
    target = None if target == LOCAL_RAY else target
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
    """Redirects messages of Ray's C++ code to a file; they go to file descriptor 2 and ignore Python's settings.

    Python's own stderr is unchanged. Ray's notices of lost workers, which it prints to stdout, go to the file too.

    The file is `raydetect-ray-PID.log` in the temporary folder, and is removed if empty.
    """
    file, log = open_message_log()
    sys.stderr.flush()
    saved_descriptor = os.dup(2)
    terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    saved_stderr, saved_print = sys.stderr, ray_worker.print_to_stdstream
    with file:
        os.dup2(file.fileno(), 2)
    ray_worker.print_to_stdstream = _to_descriptor_2
    if _is_descriptor_2(saved_stderr):
        sys.stderr = terminal
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = saved_print
        sys.stderr = saved_stderr
        terminal.close()
        os.dup2(saved_descriptor, 2)
        os.close(saved_descriptor)
        if log.exists() and log.stat().st_size == 0:
            log.unlink()


def _to_descriptor_2(notice: dict[str, Any], **_: object) -> None:
    os.write(2, "".join(f"{line}\n" for line in notice["lines"]).encode())


def _is_descriptor_2(stream: object) -> bool:
    try:
        return stream.fileno() == 2  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):  # replaced by an object that is not a file, as in tests
        return False


@contextmanager
def _one_machine() -> Iterator[None]:
    """Applies settings of a private local Ray and its child processes.

    Unless clusters are disabled, Ray replaces 127.0.0.1 by the machine's own address and listens on all interfaces.
    Ray Train's preemption watcher would be an idle process. Usage statistics are disabled.
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
        address=LOCAL_RAY,  # otherwise Ray joins any cluster that was started on this machine
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
    """Sends Ray Data's progress and notes to its log files only."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
