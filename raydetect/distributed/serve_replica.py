"""A replica of the endpoints: detectors kept warm, the least recently used one goes; people before archives."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ray import serve
from ray.util import metrics

from raydetect.config import digest
from raydetect.distributed.serve_calls import model_id
from raydetect.errors import ArtifactError, RaydetectError
from raydetect.fleet_record import ArtifactIndex, read_index
from raydetect.gateway.rules import online_spec
from raydetect.records import OK, Answer, Chunk, Member, Part
from raydetect.sinks.parquet import ResultsSink
from raydetect.spec import Heatmaps, ScoreSpec, ServeSpec
from raydetect.storage import Storage, normalise_uri

log = logging.getLogger("raydetect.serve")
MILLISECONDS = [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One image that waits for a batch."""

    model: str
    member: Member
    heatmaps: Heatmaps
    rules: ScoreSpec
    group: str
    begun: float


class _Meters:
    """What Ray's Prometheus endpoint tells of a replica."""

    def __init__(self) -> None:
        self.images = metrics.Counter("raydetect_images", "Images that were asked for.", ("status", "kind"))
        self.sizes = metrics.Histogram("raydetect_batch_images", "Images of one batch.", [1, 2, 4, 8, 16, 32, 64])
        self.queued = metrics.Histogram("raydetect_queue_ms", "Until an image was in a batch.", MILLISECONDS)
        self.spent = metrics.Histogram("raydetect_score_ms", "From arrival to row.", MILLISECONDS)

    def count(self, statuses: Iterable[str], kind: str) -> None:
        for status in statuses:
            self.images.inc(1, {"status": "ok" if status == OK else "bad", "kind": kind})


class Scorer:
    """Scores single images, in batches with those of other requests, and chunks of archives meanwhile."""

    async def __init__(self, spec: ServeSpec) -> None:  # type: ignore[misc]
        """Loads the detectors of the job file, as many as there is room for; Serve waits for it."""
        import torch

        from raydetect.worker.turns import Turns

        torch.set_num_threads(spec.resources.cpus_per_worker)
        self._storage, self._turns, self._meters = Storage(spec.storage), Turns(), _Meters()
        self._device = "cuda" if spec.resources.gpus_per_worker else "cpu"
        room = spec.resources.detectors_in_memory
        self._get = serve.multiplexed(max_num_models_per_replica=room)(self._loader())
        self._batched.set_max_batch_size(spec.batch_size)
        self._batched.set_batch_wait_timeout_s(spec.batch_wait_seconds)
        for name, served in islice(spec.detectors.items(), room):
            try:
                index = await asyncio.to_thread(read_index, normalise_uri(served.artifact), self._storage)
                await self.warm_up(model_id(index), online_spec(spec, index.uri, served.flag))
            except RaydetectError as error:  # another version may serve by now, and this one be gone
                log.warning("%s: is not loaded at the start: %s", name, error)

    def _loader(self) -> Callable[[str], Any]:
        from raydetect.worker.warm import SharedDetectors, Warm

        async def load(model: str) -> Warm:
            index = await asyncio.to_thread(self._index, model)
            return Warm(SharedDetectors(index, self._storage, self._turns), self._device, self._turns)

        return load

    def _index(self, model: str) -> ArtifactIndex:
        wanted, _, uri = model.partition("@")
        index = read_index(uri, self._storage)
        if index.digest != wanted:
            raise ArtifactError(f"{uri}: was replaced by another version. Fit each version into a folder of its own.")
        return index

    async def warm_up(self, model: str, rules: ScoreSpec) -> None:
        """Loads an artifact before requests come for it."""
        warm = await self._get(model)
        await asyncio.to_thread(warm.warm_up, rules)

    async def answer(
        self, model: str, members: Sequence[Member], heatmaps: Sequence[Heatmaps], rules: ScoreSpec
    ) -> Sequence[Answer]:
        """Scores single images.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded.
        """
        group, begun = model + digest(rules), time.perf_counter()
        asked = [
            _Asked(model, member, wanted, rules, group, begun) for member, wanted in zip(members, heatmaps, strict=True)
        ]
        found: list[Answer | RaydetectError] = await asyncio.gather(*map(self._batched, asked))
        answers = []
        for one in found:
            if isinstance(one, RaydetectError):
                raise one
            answers.append(one)
        self._meters.count((answer.row.status for answer in answers), "online")
        self._meters.spent.observe(1000 * (time.perf_counter() - begun))
        return answers

    @serve.batch  # type: ignore[untyped-decorator]
    async def _batched(self, asked: list[_Asked]) -> list[Answer | RaydetectError]:
        self._meters.sizes.observe(len(asked))
        now, answers = time.perf_counter(), dict[int, Answer | RaydetectError]()
        groups: dict[str, list[int]] = {}
        for place, one in enumerate(asked):
            self._meters.queued.observe(1000 * (now - one.begun))
            groups.setdefault(one.group, []).append(place)
        for places in groups.values():
            answers |= dict(zip(places, await self._together([asked[place] for place in places]), strict=True))
        return [answers[place] for place in range(len(asked))]

    async def _together(self, asked: Sequence[_Asked]) -> Sequence[Answer | RaydetectError]:
        """Images of one artifact; its error is theirs alone, not that of the batch."""
        try:
            warm = await self._get(asked[0].model)
            members, heatmaps = [one.member for one in asked], [one.heatmaps for one in asked]
            found: Sequence[Answer] = await asyncio.to_thread(warm.answer, members, heatmaps, asked[0].rules)
        except RaydetectError as error:
            return [error] * len(asked)
        return found

    async def score_chunk(self, model: str, chunk: Chunk, spec: ScoreSpec, sink: ResultsSink) -> Part:
        """Scores a chunk of an archive and writes its part."""
        warm = await self._get(model)

        def work() -> Part:
            result = warm.score_chunk(chunk, spec)
            self._meters.count((row.status for row in result.rows), "archive")
            return sink.write(chunk, result.rows, result.pictures, result.clipped_pixels)

        return await asyncio.to_thread(work)
