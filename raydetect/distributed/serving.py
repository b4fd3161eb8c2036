"""The endpoints on Ray Serve: replicas keep detectors warm, one desk knows versions and runs, doors answer HTTP.

door (HTTP, many) ──> scorer (replicas, detectors multiplexed) <── desk (one): archive runs, which version serves
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from raydetect.config import digest
from raydetect.distributed.session import translate
from raydetect.errors import SpecError
from raydetect.fleet_record import ArtifactIndex, read_index
from raydetect.gateway.app import build_app
from raydetect.gateway.desk import Busy, RunState, Served, load_served
from raydetect.gateway.guard import Guard
from raydetect.gateway.rules import online_spec
from raydetect.gateway.runner import Runner
from raydetect.gateway.tokens import Tokens, read_tokens
from raydetect.plan import ScorePlan
from raydetect.records import OK, Answer, Chunk, Member, Part
from raydetect.sinks.parquet import ResultsSink
from raydetect.spec import Heatmaps, ScoreSpec, ServeSpec, parse_job
from raydetect.storage import Storage

APP, SCORER, DESK, DOOR = "raydetect", "Scorer", "Desk", "Door"
CHUNKS_PER_REPLICA = 2
ONGOING = 1000
TRIES, PAUSE_SECONDS = 4, 0.5
VERSIONS_SECONDS = 0.5  # how long a door believes what the desk said of versions
LOST = (RayActorError, BackPressureError, DeploymentUnavailableError)
MILLISECONDS = [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
T = TypeVar("T")


def model_id(index: ArtifactIndex) -> str:
    """How Serve names an artifact version: replicas that hold it are asked first."""
    return f"{index.digest}@{index.uri}"


class Scorer:
    """A replica: many artifacts, the least recently used one goes; single images go before archives."""

    def __init__(self, spec: ServeSpec) -> None:
        """Loads nothing yet."""
        import torch

        from raydetect.worker.turns import Turns

        torch.set_num_threads(spec.resources.cpus_per_worker)
        self._storage, self._turns = Storage(spec.storage), Turns()
        self._device = "cuda" if spec.resources.gpus_per_worker else "cpu"
        limit = spec.resources.detectors_in_memory
        self._get = serve.multiplexed(max_num_models_per_replica=limit)(self._loader())
        self._batched.set_max_batch_size(spec.batch_size)
        self._batched.set_batch_wait_timeout_s(spec.batch_wait_seconds)
        self._images = metrics.Counter("raydetect_images", "Images that were asked for.", ("status", "kind"))
        self._sizes = metrics.Histogram("raydetect_batch_images", "Images of one batch.", [1, 2, 4, 8, 16, 32, 64])
        self._queued = metrics.Histogram("raydetect_queue_ms", "Until an image was in a batch.", MILLISECONDS)
        self._spent = metrics.Histogram("raydetect_score_ms", "From arrival to row.", MILLISECONDS)

    def _loader(self) -> Callable[[str], Any]:
        from raydetect.worker.warm import SharedDetectors, Warm

        async def load(name: str) -> Warm:
            index = await asyncio.to_thread(self._index, name)
            return Warm(SharedDetectors(index, self._storage), self._device, self._turns)

        return load

    def _index(self, name: str) -> ArtifactIndex:
        wanted, _, uri = name.partition("@")
        index = read_index(uri, self._storage)
        if index.digest != wanted:
            raise SpecError(f"{uri}: was replaced by another version.")
        return index

    async def warm_up(self, rules: ScoreSpec) -> None:
        """Loads an artifact before requests come for it."""
        warm = await self._get(serve.get_multiplexed_model_id())
        await asyncio.to_thread(warm.warm_up, rules)

    async def answer(
        self, members: Sequence[Member], heatmaps: Sequence[Heatmaps], rules: ScoreSpec
    ) -> Sequence[Answer]:
        """Scores single images, in batches with those of other requests."""
        name, begun = serve.get_multiplexed_model_id(), time.perf_counter()
        items = [(name, member, wanted, rules, begun) for member, wanted in zip(members, heatmaps, strict=True)]
        found: Sequence[Answer] = await asyncio.gather(*(self._batched(item) for item in items))
        self._count((answer.row.status for answer in found), "online")
        self._spent.observe(1000 * (time.perf_counter() - begun))
        return found

    @serve.batch  # type: ignore[untyped-decorator]
    async def _batched(self, items: list[tuple[str, Member, Heatmaps, ScoreSpec, float]]) -> list[Answer]:
        self._sizes.observe(len(items))
        now, answers = time.perf_counter(), dict[int, Answer]()
        groups: dict[str, list[int]] = {}
        for place, (name, _, _, rules, begun) in enumerate(items):
            self._queued.observe(1000 * (now - begun))
            groups.setdefault(name + digest(rules), []).append(place)
        for places in groups.values():
            name, _, _, rules, _ = items[places[0]]
            warm = await self._get(name)
            members, wanted = [items[place][1] for place in places], [items[place][2] for place in places]
            found = await asyncio.to_thread(warm.answer, members, wanted, rules)
            answers |= dict(zip(places, found, strict=True))
        return [answers[place] for place in range(len(items))]

    async def score_chunk(self, chunk: Chunk, spec: ScoreSpec, sink: ResultsSink) -> Part:
        """Scores a chunk of an archive and writes its part."""
        warm = await self._get(serve.get_multiplexed_model_id())

        def work() -> Part:
            result = warm.score_chunk(chunk, spec)
            self._count((row.status for row in result.rows), "archive")
            return sink.write(chunk, result.rows, result.pictures, result.clipped_pixels)

        return await asyncio.to_thread(work)

    def _count(self, statuses: Any, kind: str) -> None:
        for status in statuses:
            self._images.inc(1, {"status": "ok" if status == OK else "bad", "kind": kind})


class Desk:
    """The one that knows which version of a detector serves, and runs archives."""

    def __init__(self, spec: ServeSpec, scorer: DeploymentHandle) -> None:
        """Reads the records of all artifacts and has them loaded.

        Raises:
            ArtifactError, SpecError: one cannot be served.
        """
        self._spec, self._scorer, self._storage = spec, scorer, Storage(spec.storage)
        self._served = {name: load_served(name, served, self._storage) for name, served in spec.detectors.items()}
        in_flight = CHUNKS_PER_REPLICA * (spec.max_workers or spec.resources.num_workers)
        self._runner = Runner(lambda plan, chunk: send_chunk(scorer, plan, chunk), in_flight, spec.limits.max_runs)

    async def served(self) -> Mapping[str, Served]:
        """See `gateway.desk.Desk`."""
        return dict(self._served)

    async def replace(self, name: str, artifact: str) -> Served:
        """See `gateway.desk.Desk`."""
        words = replace(self._spec.detectors[name], artifact=artifact)
        served = await asyncio.to_thread(load_served, name, words, self._storage)
        await warm_up(self._scorer, self._spec, served)
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


async def warm_up(scorer: DeploymentHandle, spec: ServeSpec, served: Served) -> None:
    """Has a replica load a version.

    Raises:
        ArtifactError, SpecError: it cannot be loaded.
    """
    rules = online_spec(spec, served.index.uri, served.flag)
    handle = scorer.options(multiplexed_model_id=model_id(served.index))
    await tried(lambda: handle.warm_up.remote(rules))


async def tried(ask: Callable[[], Any]) -> Any:
    """The answer of a deployment; asked again when the replica that had it was lost.

    Raises:
        Busy: it was lost every time.
        RaydetectError: what the deployment raised.
    """
    for last in (False,) * (TRIES - 1) + (True,):
        try:
            return await ask()
        except LOST:
            if last:
                raise Busy("what scores images is not there just now. Try again.") from None
            await asyncio.sleep(PAUSE_SECONDS)
        except RayError as error:
            raise translate(error, None) from error


def send_chunk(scorer: DeploymentHandle, plan: ScorePlan, chunk: Chunk) -> Part:
    """Has a replica score a chunk; sent again when the replica was lost, since its files are the same then.

    Raises:
        RaydetectError: what the replica raised, or it was lost every time.
    """
    handle = scorer.options(multiplexed_model_id=model_id(plan.artifact))
    for last in (False,) * (TRIES - 1) + (True,):
        try:
            part: Part = handle.score_chunk.remote(chunk, plan.spec, plan.sink).result()
            return part
        except LOST as error:
            if last:
                raise translate(error, None) from error
            time.sleep(PAUSE_SECONDS)
        except RayError as error:
            raise translate(error, None) from error
    raise AssertionError


class DoorDesk:
    """What a door asks: the scorer itself for scores, the desk for all else. See `gateway.desk.Desk`."""

    def __init__(self, spec: ServeSpec) -> None:
        """Finds the deployments of its application."""
        self._spec = spec
        self._desk = serve.get_deployment_handle(DESK, APP)
        self._scorer = serve.get_deployment_handle(SCORER, APP)
        self._served: Mapping[str, Served] = {}
        self._asked = -VERSIONS_SECONDS
        self._loaded: set[str] = set()

    async def served(self) -> Mapping[str, Served]:
        """See `Desk.served`; as it was at most VERSIONS_SECONDS ago."""
        if time.monotonic() - self._asked >= VERSIONS_SECONDS:
            self._served = await tried(lambda: self._desk.served.remote())
            self._asked = time.monotonic()
        return self._served

    async def answer(self, served: Served, members: Sequence[Member], heatmaps: Sequence[Heatmaps]) -> Sequence[Answer]:
        """See `Desk.answer`."""
        rules = online_spec(self._spec, served.index.uri, served.flag)
        handle = self._scorer.options(multiplexed_model_id=model_id(served.index))
        found: Sequence[Answer] = await tried(lambda: handle.answer.remote(members, heatmaps, rules))
        return found

    async def replace(self, name: str, artifact: str) -> Served:
        """See `Desk.replace`."""
        made: Served = await tried(lambda: self._desk.replace.remote(name, artifact))
        self._asked = -VERSIONS_SECONDS
        return made

    async def start(self, spec: ScoreSpec) -> RunState:
        """See `Desk.start`."""
        state: RunState = await tried(lambda: self._desk.start.remote(spec))
        return state

    async def runs(self) -> Mapping[str, RunState]:
        """See `Desk.runs`."""
        found: Mapping[str, RunState] = await tried(lambda: self._desk.runs.remote())
        return found

    async def cancel(self, uri: str) -> bool:
        """See `Desk.cancel`."""
        return bool(await tried(lambda: self._desk.cancel.remote(uri)))

    async def ready(self) -> bool:
        """Whether every served detector is loaded somewhere."""
        for served in (await self.served()).values():
            if served.index.digest not in self._loaded:
                await warm_up(self._scorer, self._spec, served)
                self._loaded.add(served.index.digest)
        return True


def application(values: Mapping[str, Any]) -> Application:
    """The Serve application of a job file's values; `import_path` of Serve's own config files.

    Raises:
        SpecError: the job file or the tokens are wrong.
    """
    spec = parse_job(dict(values), "serve")
    if not isinstance(spec, ServeSpec):
        raise SpecError(f"serve: is a {spec.kind} job. State kind: serve.")
    return bound(spec, read_tokens(spec))


def bound(spec: ServeSpec, tokens: Tokens) -> Application:
    """The application of a checked job."""

    def door() -> Guard:
        return build_app(spec, tokens, DoorDesk(spec))

    resources = spec.resources
    scorer = serve.deployment(Scorer, name=SCORER).options(
        ray_actor_options={"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker},
        max_ongoing_requests=ONGOING,
        graceful_shutdown_timeout_s=60,
        **_replicas(spec),
    )
    alone: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": ONGOING}
    desk = serve.deployment(Desk, name=DESK).options(num_replicas=1, **alone)
    doors = serve.deployment(serve.ingress(door)(_Door), name=DOOR).options(num_replicas=1, **alone)
    return doors.bind(desk.bind(spec, scorer.bind(spec)))


class _Door:
    """Holds the application of `bound`; its argument makes Serve deploy what it asks."""

    def __init__(self, desk: DeploymentHandle) -> None:
        """Nothing: the endpoints find the deployments by name."""


def _replicas(spec: ServeSpec) -> dict[str, Any]:
    least, most = spec.resources.num_workers, spec.max_workers
    if most is None or most == least:
        return {"num_replicas": least}
    config = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 2 * spec.batch_size}
    return {"num_replicas": None, "autoscaling_config": config}
