"""The controller on Ray Serve, a deployment that manages versions and archive runs, and the ingress's client for it."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from ray import serve
from ray.serve.handle import DeploymentHandle

from raydetect.config import Heatmaps, ScoreSpec, ServeSpec
from raydetect.distributed.serving.replica_calls import (
    APP,
    CONTROLLER,
    SCORER,
    ReplicaRouter,
    chunks_in_flight,
    model_id,
    send_chunk,
    with_retries,
)
from raydetect.gateway.allowed_uris import Prefixes
from raydetect.gateway.backend import RunState, Served, load_served
from raydetect.gateway.runs.runner import Runner
from raydetect.gateway.single_images import online_spec
from raydetect.records import Answer, Member
from raydetect.storage import Storage

VERSIONS_SECONDS = 0.5  # how long an ingress caches the served versions


class Controller:
    """The single deployment that tracks the served version of each detector and runs archives."""

    def __init__(self, spec: ServeSpec, scorer: DeploymentHandle) -> None:
        """Reads the records of all artifacts.

        Raises:
            ArtifactError, SpecError: an artifact cannot be served.
        """
        self._spec, self._storage, self._router = spec, Storage(spec.storage), ReplicaRouter(spec, scorer)
        self._served = {name: load_served(name, served, self._storage) for name, served in spec.detectors.items()}
        self._runner = Runner(
            partial(send_chunk, scorer), chunks_in_flight(spec), spec.limits.max_runs, Prefixes.of(spec.allow.sources)
        )

    async def served(self) -> Mapping[str, Served]:
        """See `gateway.backend.Backend`."""
        return dict(self._served)

    async def replace(self, name: str, artifact: str) -> Served:
        """See `gateway.backend.Backend`."""
        settings = replace(self._spec.detectors[name], artifact=artifact)
        served = await asyncio.to_thread(load_served, name, settings, self._storage)
        await self._router.warm_up(served)
        self._served[name] = served
        return served

    async def start(self, spec: ScoreSpec) -> RunState:
        """See `gateway.backend.Backend`."""
        return await asyncio.to_thread(self._runner.start, spec)

    async def runs(self) -> Mapping[str, RunState]:
        """See `gateway.backend.Backend`."""
        return self._runner.states()

    async def cancel(self, uri: str) -> bool:
        """See `gateway.backend.Backend`."""
        return self._runner.cancel(uri)

    async def in_flight(self) -> int:
        """Number of chunks in flight per archive; for jobs with `engine: serve`."""
        return chunks_in_flight(self._spec)


class ServeBackend:
    """The backend of an ingress: replicas score, the controller does the rest. See `gateway.backend.Backend`."""

    def __init__(self, spec: ServeSpec) -> None:
        """Looks up the deployments of its application."""
        self._spec = spec
        self._controller = serve.get_deployment_handle(CONTROLLER, APP)
        self._router = ReplicaRouter(spec, serve.get_deployment_handle(SCORER, APP))
        self._served: Mapping[str, Served] = {}
        self._fetched_at = -VERSIONS_SECONDS
        self._loaded: set[str] = set()
        self._loading = False

    async def served(self) -> Mapping[str, Served]:
        """See `Controller.served`; at most VERSIONS_SECONDS old."""
        if time.monotonic() - self._fetched_at >= VERSIONS_SECONDS:
            self._served = await with_retries(lambda: self._controller.served.remote())
            self._fetched_at = time.monotonic()
        return self._served

    async def answer(self, served: Served, members: Sequence[Member], heatmaps: Sequence[Heatmaps]) -> Sequence[Answer]:
        """See `Controller.answer`."""
        job, model = online_spec(self._spec, served.index.uri, served.flag), model_id(served.index)
        replica = self._router.handle_for(served)
        answers: Sequence[Answer] = await with_retries(lambda: replica.answer.remote(model, members, heatmaps, job))
        return answers

    async def replace(self, name: str, artifact: str) -> Served:
        """See `Controller.replace`."""
        served: Served = await with_retries(lambda: self._controller.replace.remote(name, artifact))
        self._fetched_at = -VERSIONS_SECONDS
        return served

    async def start(self, spec: ScoreSpec) -> RunState:
        """See `Controller.start`."""
        state: RunState = await with_retries(lambda: self._controller.start.remote(spec))
        return state

    async def runs(self) -> Mapping[str, RunState]:
        """See `Controller.runs`."""
        runs: Mapping[str, RunState] = await with_retries(lambda: self._controller.runs.remote())
        return runs

    async def cancel(self, uri: str) -> bool:
        """See `Controller.cancel`."""
        return bool(await with_retries(lambda: self._controller.cancel.remote(uri)))

    async def ready(self) -> bool:
        """Whether every served detector is loaded; the first caller waits for loading, others get False meanwhile."""
        missing = [served for served in (await self.served()).values() if served.index.digest not in self._loaded]
        if not missing or self._loading:
            return not missing
        self._loading = True
        try:
            for served in missing:
                await self._router.warm_up(served)
                self._loaded.add(served.index.digest)
        finally:
            self._loading = False
        return True
