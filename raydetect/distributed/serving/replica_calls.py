"""Calls between the deployments of the endpoints, with retries after a lost replica and raydetect's errors."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from raydetect.artifacts.fleet import ArtifactIndex
from raydetect.config import ServeSpec
from raydetect.distributed.ray_errors import translate
from raydetect.distributed.serving.loopback import listen_on_loopback
from raydetect.gateway.backend import Busy, Served
from raydetect.gateway.single_images import online_spec
from raydetect.planning.plan import ScorePlan
from raydetect.records import Chunk
from raydetect.sinks.scored_chunk import ScoredChunk

APP, SCORER, CONTROLLER, INGRESS = "raydetect", "Scorer", "Controller", "Ingress"
CHUNKS_PER_REPLICA = 2  # archive chunks in flight per replica; also the target load for autoscaling
TRIES, PAUSE_SECONDS = 4, 0.5
LOST = (RayActorError, BackPressureError, DeploymentUnavailableError)
listen_on_loopback()  # every replica imports this module before it listens


def model_id(index: ArtifactIndex) -> str:
    """The model ID of an artifact version in Serve."""
    return f"{index.digest}@{index.uri}"


@dataclass(frozen=True, slots=True)
class ReplicaRouter:
    """Routes requests from an ingress to replicas.

    If every replica can hold all served detectors, single images go to the least loaded replica. Otherwise they go to
    replicas that have the detector loaded, as long as these accept more requests.

    Attributes:
        spec: the serve job.
        scorer: handle of all replicas.
    """

    spec: ServeSpec
    scorer: DeploymentHandle

    def handle_for(self, served: Served) -> DeploymentHandle:
        """The handle for single images of a detector."""
        return self.scorer if self._spread else self.scorer.options(multiplexed_model_id=model_id(served.index))

    async def warm_up(self, served: Served) -> None:
        """Loads a version: on all replicas if each can hold all detectors, else on one.

        Raises:
            ArtifactError, SpecError: it cannot be loaded.
            Busy: no replica is available.
        """
        name, job = model_id(served.index), online_spec(self.spec, served.index.uri, served.flag)
        if self._spread:
            await with_retries(lambda: self.scorer.broadcast("warm_up", name, job).results_async())
        else:
            await with_retries(lambda: self.handle_for(served).warm_up.remote(name, job))

    @property
    def _spread(self) -> bool:
        return len(self.spec.detectors) <= self.spec.resources.detectors_in_memory


def chunks_in_flight(spec: ServeSpec) -> int:
    """Number of archive chunks in flight, enough to scale up to the maximum number of replicas."""
    return CHUNKS_PER_REPLICA * (spec.max_workers or spec.resources.num_workers)


async def with_retries(call: Callable[[], Awaitable[Any]]) -> Any:
    """Calls a deployment and retries if the replica that handled the call was lost.

    Raises:
        Busy: a replica was lost on every try.
        RaydetectError: raised by the deployment.
    """
    for left in reversed(range(TRIES)):
        try:
            return await call()
        except LOST:
            if not left:
                raise Busy("no scoring replica is available right now. Try again.") from None
            await asyncio.sleep(PAUSE_SECONDS)
        except RayError as error:
            raise translate(error, None) from error


def send_chunk(scorer: DeploymentHandle, plan: ScorePlan, chunk: Chunk) -> ScoredChunk:
    """Scores a chunk on a replica; retries if the replica was lost, which is safe as it writes the same files.

    Raises:
        RaydetectError: raised by the replica, or a replica was lost on every try.
    """
    for left in reversed(range(TRIES)):
        try:
            data: bytes = scorer.score_chunk.remote(model_id(plan.artifact), chunk, plan.spec, plan.sink).result()
            return ScoredChunk.from_bytes(data)
        except LOST as error:
            if not left:
                raise translate(error, None) from error
            time.sleep(PAUSE_SECONDS)
        except RayError as error:
            raise translate(error, None) from error
    raise AssertionError
