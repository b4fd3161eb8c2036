"""How parts of the endpoints ask each other: again when a replica was lost, and with our errors."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from raydetect.distributed.ray_errors import translate
from raydetect.distributed.serve_loopback import listen_on_loopback
from raydetect.fleet_record import ArtifactIndex
from raydetect.gateway.desk import Busy, Served
from raydetect.gateway.rules import online_spec
from raydetect.plan import ScorePlan
from raydetect.records import Chunk, Part
from raydetect.spec import ServeSpec

APP, SCORER, DESK, DOOR = "raydetect", "Scorer", "Desk", "Door"
CHUNKS_PER_REPLICA = 2  # of archives, scored or on their way; so many calls on each also bring more replicas
TRIES, PAUSE_SECONDS = 4, 0.5
LOST = (RayActorError, BackPressureError, DeploymentUnavailableError)
listen_on_loopback()  # every replica imports this before it listens


def model_id(index: ArtifactIndex) -> str:
    """How Serve names an artifact version."""
    return f"{index.digest}@{index.uri}"


@dataclass(frozen=True, slots=True)
class Lanes:
    """Ways from a door to replicas.

    When every replica has room for all served detectors, single images go to the one that has least to do. Otherwise
    they go to those that hold the detector, as long as these have room for more requests.

    Attributes:
        spec: the job.
        scorer: all replicas.
    """

    spec: ServeSpec
    scorer: DeploymentHandle

    def towards(self, served: Served) -> DeploymentHandle:
        """The handle for single images of a detector."""
        return self.scorer if self._spread else self.scorer.options(multiplexed_model_id=model_id(served.index))

    async def warm_up(self, served: Served) -> None:
        """Has a version loaded: by every replica that has room for all, else by one.

        Raises:
            ArtifactError, SpecError: it cannot be loaded.
            Busy: no replica is there.
        """
        name, rules = model_id(served.index), online_spec(self.spec, served.index.uri, served.flag)
        if self._spread:
            await tried(lambda: self.scorer.broadcast("warm_up", name, rules).results_async())
        else:
            await tried(lambda: self.towards(served).warm_up.remote(name, rules))

    @property
    def _spread(self) -> bool:
        return len(self.spec.detectors) <= self.spec.resources.detectors_in_memory


def chunks_in_flight(spec: ServeSpec) -> int:
    """Chunks of an archive that are with replicas at a time; enough to bring all of them."""
    return CHUNKS_PER_REPLICA * (spec.max_workers or spec.resources.num_workers)


async def tried(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The answer of a deployment; asked again when the replica that had it was lost.

    Raises:
        Busy: it was lost every time.
        RaydetectError: what the deployment raised.
    """
    for left in reversed(range(TRIES)):
        try:
            return await ask()
        except LOST:
            if not left:
                raise Busy("what scores images is not there just now. Try again.") from None
            await asyncio.sleep(PAUSE_SECONDS)
        except RayError as error:
            raise translate(error, None) from error


def send_chunk(scorer: DeploymentHandle, plan: ScorePlan, chunk: Chunk) -> Part:
    """Has a replica score a chunk; sent again when the replica was lost, since its files are the same then.

    Raises:
        RaydetectError: what the replica raised, or it was lost every time.
    """
    for left in reversed(range(TRIES)):
        try:
            part: Part = scorer.score_chunk.remote(model_id(plan.artifact), chunk, plan.spec, plan.sink).result()
            return part
        except LOST as error:
            if not left:
                raise translate(error, None) from error
            time.sleep(PAUSE_SECONDS)
        except RayError as error:
            raise translate(error, None) from error
    raise AssertionError
