"""The desk on Ray Serve: one deployment that manages versions and archive runs, and the interface doors use."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from ray import serve
from ray.serve.handle import DeploymentHandle

from raydetect.distributed.serve_calls import (
    APP,
    DESK,
    SCORER,
    Lanes,
    chunks_in_flight,
    model_id,
    send_chunk,
    tried,
)
from raydetect.gateway.allow import Prefixes
from raydetect.gateway.desk import RunState, Served, load_served
from raydetect.gateway.rules import online_spec
from raydetect.gateway.runner import Runner
from raydetect.records import Answer, Member
from raydetect.spec import Heatmaps, ScoreSpec, ServeSpec
from raydetect.storage import Storage

VERSIONS_SECONDS = 0.5  # how long a door caches the served versions


class Desk:
    """The single deployment that tracks the served version of each detector and runs archives."""

    def __init__(self, spec: ServeSpec, scorer: DeploymentHandle) -> None:
        """Reads the records of all artifacts.

        Raises:
            ArtifactError, SpecError: an artifact cannot be served.
        """
        self._spec, self._storage, self._lanes = spec, Storage(spec.storage), Lanes(spec, scorer)
        self._served = {name: load_served(name, served, self._storage) for name, served in spec.detectors.items()}
        self._runner = Runner(
            partial(send_chunk, scorer), chunks_in_flight(spec), spec.limits.max_runs, Prefixes.of(spec.allow.sources)
        )

    async def served(self) -> Mapping[str, Served]:
        """See `gateway.desk.Desk`."""
        return dict(self._served)

    async def replace(self, name: str, artifact: str) -> Served:
        """See `gateway.desk.Desk`."""
        settings = replace(self._spec.detectors[name], artifact=artifact)
        served = await asyncio.to_thread(load_served, name, settings, self._storage)
        await self._lanes.warm_up(served)
        self._served[name] = served
        return served

    async def start(self, spec: ScoreSpec) -> RunState:
        """See `gateway.desk.Desk`."""
        return await asyncio.to_thread(self._runner.start, spec)

    async def runs(self) -> Mapping[str, RunState]:
        """See `gateway.desk.Desk`."""
        return self._runner.states()

    async def cancel(self, uri: str) -> bool:
        """See `gateway.desk.Desk`."""
        return self._runner.cancel(uri)

    async def in_flight(self) -> int:
        """Number of chunks in flight per archive; for jobs with `engine: serve`."""
        return chunks_in_flight(self._spec)


class DoorDesk:
    """The desk as seen by a door: replicas score, the desk does the rest. See `gateway.desk.Desk`."""

    def __init__(self, spec: ServeSpec) -> None:
        """Looks up the deployments of its application."""
        self._spec = spec
        self._desk = serve.get_deployment_handle(DESK, APP)
        self._lanes = Lanes(spec, serve.get_deployment_handle(SCORER, APP))
        self._served: Mapping[str, Served] = {}
        self._fetched_at = -VERSIONS_SECONDS
        self._loaded: set[str] = set()
        self._loading = False

    async def served(self) -> Mapping[str, Served]:
        """See `Desk.served`; at most VERSIONS_SECONDS old."""
        if time.monotonic() - self._fetched_at >= VERSIONS_SECONDS:
            self._served = await tried(lambda: self._desk.served.remote())
            self._fetched_at = time.monotonic()
        return self._served

    async def answer(self, served: Served, members: Sequence[Member], heatmaps: Sequence[Heatmaps]) -> Sequence[Answer]:
        """See `Desk.answer`."""
        rules, model = online_spec(self._spec, served.index.uri, served.flag), model_id(served.index)
        replica = self._lanes.towards(served)
        answers: Sequence[Answer] = await tried(lambda: replica.answer.remote(model, members, heatmaps, rules))
        return answers

    async def replace(self, name: str, artifact: str) -> Served:
        """See `Desk.replace`."""
        served: Served = await tried(lambda: self._desk.replace.remote(name, artifact))
        self._fetched_at = -VERSIONS_SECONDS
        return served

    async def start(self, spec: ScoreSpec) -> RunState:
        """See `Desk.start`."""
        state: RunState = await tried(lambda: self._desk.start.remote(spec))
        return state

    async def runs(self) -> Mapping[str, RunState]:
        """See `Desk.runs`."""
        runs: Mapping[str, RunState] = await tried(lambda: self._desk.runs.remote())
        return runs

    async def cancel(self, uri: str) -> bool:
        """See `Desk.cancel`."""
        return bool(await tried(lambda: self._desk.cancel.remote(uri)))

    async def ready(self) -> bool:
        """Whether every served detector is loaded somewhere; one who asks waits for that, others are told no."""
        missing = [one for one in (await self.served()).values() if one.index.digest not in self._loaded]
        if not missing or self._loading:
            return not missing
        self._loading = True
        try:
            for served in missing:
                await self._lanes.warm_up(served)
                self._loaded.add(served.index.digest)
        finally:
            self._loading = False
        return True
