"""Connecting to Ray: a cluster by address, or a private local one that ends with the command."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # before ray is loaded: its C++ side reads it once

import ray
from ray.data import DataContext

from raydetect.errors import RaydetectError
from raydetect.spec import ResourceSpec

LOOPBACK = "127.0.0.1"


class ClusterError(RaydetectError):
    """The cluster cannot be reached, refuses the token, or broke down."""


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


def _start_local(resources: ResourceSpec) -> None:
    ray.init(
        num_cpus=resources.num_workers * resources.cpus_per_worker,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=LOOPBACK,
        _system_config={"local_fs_capacity_threshold": 0.99},
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


def translate(error: BaseException, target: str | None) -> RaydetectError:
    """Ray's exception as ours: the deliberate error inside it, or one sentence about the cluster."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RaydetectError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    text = " ".join(str(error).split())
    place = target or "the local Ray"
    if "token" in text.lower() or "Unauthenticated" in text or "401" in text:
        return ClusterError(
            f"{place}: refused the connection (authentication). Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's token."
        )
    return ClusterError(f"{place}: {type(error).__name__}: {text[:400]}")
