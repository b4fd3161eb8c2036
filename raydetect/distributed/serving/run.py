"""Starts the endpoints: on a local Ray while the command runs, or on a cluster, where they keep running."""

import os
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import serve

from raydetect.config import ResourceSpec, ServeSpec
from raydetect.distributed.ray_errors import ClusterError, translated
from raydetect.distributed.scoring.score import refuse_memory_uris
from raydetect.distributed.serving.app import bound
from raydetect.distributed.serving.proxy import BOUNDED, CALLBACK
from raydetect.distributed.serving.replica_calls import APP, CONTROLLER, SCORER, send_chunk
from raydetect.distributed.session import session
from raydetect.errors import SpecError
from raydetect.gateway.backend import load_served
from raydetect.gateway.http.tokens import Tokens
from raydetect.planning.committer import OnProgress, commit_all
from raydetect.planning.plan import ScorePlan, finish
from raydetect.planning.stream import Stream
from raydetect.storage import Storage

CONTROLLER_SECONDS = 60


def serve_on_ray(
    spec: ServeSpec, tokens: Tokens, address: str | None, on_ready: Callable[[str, str], None], wait: Callable[[], None]
) -> None:
    """Deploys the endpoints, replacing an earlier deployment without dropping requests.

    Args:
        spec: the serve job.
        tokens: clients and their permissions.
        address: address of a cluster, where the endpoints keep running; None = a local Ray, until `wait` returns.
        on_ready: called with the URLs of the endpoints and of the Prometheus metrics once requests are served.
        wait: returns when the local Ray should stop.

    Raises:
        ClusterError: the cluster cannot be reached, or the endpoints do not start.
        ArtifactError, SpecError: a detector cannot be served, or the port is taken.
    """
    storage = Storage(spec.storage)
    for name, served in spec.detectors.items():
        load_served(name, served, storage)
    if address is None:
        refuse_taken(spec.host, spec.port)
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 s is too short on a busy machine
        os.environ.setdefault(CALLBACK, BOUNDED)
    with session(address, _resources(spec)):
        with translated(address):
            serve.start(
                http_options={"host": spec.host, "port": spec.port}, logging_config={"enable_access_log": False}
            )
            serve.run(bound(spec, tokens), name=APP, route_prefix="/")
        on_ready(f"http://{spec.host}:{spec.port}", metrics_uri())
        if address is None:
            wait()
            serve.shutdown()


def score_through(plan: ScorePlan, address: str | None, on_progress: OnProgress) -> dict[str, Any]:
    """Scores the remaining shards of a plan on the replicas of a cluster's endpoints, and returns the manifest.

    Args:
        plan: the scoring plan.
        address: address of the cluster running `raydetect serve`; None uses RAY_ADDRESS.
        on_progress: called with each scored chunk, and with each receipt.

    Raises:
        ClusterError: no endpoints run there, or replicas were lost repeatedly; committed shards are kept.
        RaydetectError: as for any scoring job.
    """
    refuse_memory_uris([plan.ledger.uri, plan.artifact.uri, *(shard.uri for shard in plan.shards[:1])])
    plan.begin()
    if plan.todo:
        with session(address, plan.spec.resources):
            try:
                serve.status().applications[APP]
                scorer = serve.get_deployment_handle(SCORER, APP)
                in_flight = (
                    serve.get_deployment_handle(CONTROLLER, APP).in_flight.remote().result(timeout_s=CONTROLLER_SECONDS)
                )
            except Exception as error:
                message = f"{address}: no raydetect endpoints run there. Start `raydetect serve` first."
                raise ClusterError(message) from error
            stream = Stream(plan, partial(send_chunk, scorer, plan), in_flight, in_flight)
            commit_all(plan, stream.scored(), on_progress)
    return finish(plan)


def metrics_uri() -> str:
    """The metrics URL of the first node; every node exports metrics, including raydetect's."""
    node = next(node for node in ray.nodes() if node["Alive"])
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def refuse_taken(host: str, port: int) -> None:
    """Checks that the port is free.

    Raises:
        SpecError: the port is taken, or the address does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SpecError(f"{host}:{port}: cannot be listened on ({error.strerror}). Set host and port.") from None


def _resources(spec: ServeSpec) -> ResourceSpec:
    return replace(spec.resources, num_workers=spec.max_workers or spec.resources.num_workers)
