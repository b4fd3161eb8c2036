"""The endpoints on Ray Serve: replicas keep detectors loaded, a controller manages versions, an ingress serves HTTP.

ingress (HTTP) ──> scorer (replicas, multiplexed detectors)
controller (one: archive runs, served versions) ──> scorer
"""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from raydetect.config import ServeSpec, parse_job
from raydetect.distributed.serving.controller import Controller, ServeBackend
from raydetect.distributed.serving.replica import ScorerReplica
from raydetect.distributed.serving.replica_calls import CHUNKS_PER_REPLICA, CONTROLLER, INGRESS, SCORER
from raydetect.errors import SpecError
from raydetect.gateway.http.app import build_app
from raydetect.gateway.http.limits import Guard
from raydetect.gateway.http.tokens import Tokens, read_tokens

UNBOUNDED = 100_000  # `limits.max_requests` limits requests in flight, so that clients are told to retry
BATCHES_WAITING = 4  # requests queued on a replica per image of a batch, before other replicas are used
UPSCALE_SECONDS = 5


def application(values: Mapping[str, Any]) -> Application:
    """Builds the Serve application from the values of a job file; the `import_path` of Serve config files.

    Raises:
        SpecError: the job file or the tokens are invalid.
    """
    spec = parse_job(dict(values), "serve")
    if not isinstance(spec, ServeSpec):
        raise SpecError(f"serve: is a {spec.kind} job. Set kind: serve.")
    return bound(spec, read_tokens(spec))


def bound(spec: ServeSpec, tokens: Tokens) -> Application:
    """Builds the Serve application of a validated job."""

    def guarded_app() -> Guard:
        return build_app(spec, tokens, ServeBackend(spec))

    resources = spec.resources
    scorer = serve.deployment(ScorerReplica, name=SCORER).options(
        ray_actor_options={"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker},
        max_ongoing_requests=BATCHES_WAITING * spec.archive_batch_size + CHUNKS_PER_REPLICA,
        graceful_shutdown_timeout_s=60,
        **_replicas(spec),
    )
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": UNBOUNDED}
    controller = serve.deployment(Controller, name=CONTROLLER).options(num_replicas=1, **options)
    ingress = serve.deployment(serve.ingress(guarded_app)(_Ingress), name=INGRESS).options(num_replicas=1, **options)
    return ingress.bind(controller.bind(spec, scorer.bind(spec)))


class _Ingress:
    """Wraps the HTTP app; its argument makes Serve deploy the controller."""

    def __init__(self, backend: DeploymentHandle) -> None:
        """Does nothing: the endpoints find the deployments by name."""


def _replicas(spec: ServeSpec) -> dict[str, Any]:
    """Replica options: a fixed number, or autoscaling with the load up to `max_workers`."""
    least, most = spec.resources.num_workers, spec.max_workers
    if most is None or most == least:
        return {"num_replicas": least}
    config = {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": CHUNKS_PER_REPLICA,
        "upscale_delay_s": UPSCALE_SECONDS,
    }
    return {"num_replicas": None, "autoscaling_config": config}
