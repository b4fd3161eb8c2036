"""A replica of the endpoints: an LRU cache of loaded detectors; single images take priority over archives."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ray import serve
from ray.util import metrics

from raydetect.artifacts.fleet import ArtifactIndex, read_index
from raydetect.config import Heatmaps, ScoreSpec, ServeSpec
from raydetect.config.validation import digest
from raydetect.distributed.serving.replica_calls import model_id
from raydetect.errors import ArtifactError, RaydetectError
from raydetect.gateway.single_images import online_spec
from raydetect.records import OK, Answer, Chunk, Member
from raydetect.sinks.parquet import ResultsSink
from raydetect.storage import Storage, normalise_uri

log = logging.getLogger("raydetect.serve")
MILLISECONDS = [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]


@dataclass(frozen=True, slots=True)
class _Request:
    """One image waiting for a batch."""

    model: str
    member: Member
    heatmaps: Heatmaps
    rules: ScoreSpec
    group: str
    arrived: float


class _Meters:
    """Prometheus metrics of a replica, exported by Ray."""

    def __init__(self) -> None:
        self.images = metrics.Counter("raydetect_images", "Images requested.", ("status", "kind"))
        self.sizes = metrics.Histogram("raydetect_batch_images", "Images per batch.", [1, 2, 4, 8, 16, 32, 64])
        self.queued = metrics.Histogram("raydetect_queue_ms", "Time from arrival to batch.", MILLISECONDS)
        self.spent = metrics.Histogram("raydetect_score_ms", "Time from arrival to result.", MILLISECONDS)

    def count(self, statuses: Iterable[str], kind: str) -> None:
        for status in statuses:
            self.images.inc(1, {"status": "ok" if status == OK else "bad", "kind": kind})


class ScorerReplica:
    """Scores single images, batched across requests, alongside chunks of archives."""

    async def __init__(self, spec: ServeSpec) -> None:  # type: ignore[misc]
        """Loads as many detectors of the job file as fit in memory; Serve waits for it to return."""
        import torch

        from raydetect.scoring.device_queue import DeviceQueue
        from raydetect.scoring.garbage import spare_what_is_loaded

        torch.set_num_threads(spec.resources.cpus_per_worker)
        spare_what_is_loaded()
        self._storage, self._meters = Storage(spec.storage), _Meters()
        self._queue = DeviceQueue("cuda" if spec.resources.gpus_per_worker else "cpu")
        room = spec.resources.detectors_in_memory
        self._get = serve.multiplexed(max_num_models_per_replica=room)(self._loader())
        self._batched.set_max_batch_size(spec.online_batch_size)
        self._batched.set_batch_wait_timeout_s(spec.batch_wait_seconds)
        for name, served in islice(spec.detectors.items(), room):
            try:
                index = await asyncio.to_thread(read_index, normalise_uri(served.artifact), self._storage)
                await self.warm_up(model_id(index), online_spec(spec, index.uri, served.flag))
            except RaydetectError as error:  # the version may have been replaced and deleted
                log.warning("%s: not loaded at startup: %s", name, error)

    def _loader(self) -> Callable[[str], Any]:
        from raydetect.scoring.scorer_pool import ScorerPool, SharedDetectors

        async def load(model: str) -> ScorerPool:
            index = await asyncio.to_thread(self._index, model)
            return ScorerPool(SharedDetectors(index, self._storage), self._queue)

        return load

    def _index(self, model: str) -> ArtifactIndex:
        wanted, _, uri = model.partition("@")
        index = read_index(uri, self._storage)
        if index.digest != wanted:
            raise ArtifactError(f"{uri}: was replaced by another version. Fit each version into a folder of its own.")
        return index

    async def warm_up(self, model: str, rules: ScoreSpec) -> None:
        """Loads an artifact ahead of requests."""
        warm = await self._get(model)
        await asyncio.to_thread(warm.warm_up, rules)

    async def answer(
        self, model: str, members: Sequence[Member], heatmaps: Sequence[Heatmaps], rules: ScoreSpec
    ) -> Sequence[Answer]:
        """Scores single images.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded.
        """
        group, arrived = model + digest(rules), time.perf_counter()
        requests = [
            _Request(model, member, heatmap, rules, group, arrived)
            for member, heatmap in zip(members, heatmaps, strict=True)
        ]
        results: list[Answer | RaydetectError] = await asyncio.gather(*map(self._batched, requests))
        answers = []
        for answer in results:
            if isinstance(answer, RaydetectError):
                raise answer
            answers.append(answer)
        self._meters.count((answer.row.status for answer in answers), "online")
        self._meters.spent.observe(1000 * (time.perf_counter() - arrived))
        return answers

    @serve.batch  # type: ignore[untyped-decorator]
    async def _batched(self, requests: list[_Request]) -> list[Answer | RaydetectError]:
        self._meters.sizes.observe(len(requests))
        now, answers = time.perf_counter(), dict[int, Answer | RaydetectError]()
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            self._meters.queued.observe(1000 * (now - request.arrived))
            groups.setdefault(request.group, []).append(i)
        for indices in groups.values():
            answers |= dict(zip(indices, await self._together([requests[i] for i in indices]), strict=True))
        return [answers[i] for i in range(len(requests))]

    async def _together(self, requests: Sequence[_Request]) -> Sequence[Answer | RaydetectError]:
        """Scores images of one artifact; an error applies to these images only, not to the whole batch."""
        try:
            warm = await self._get(requests[0].model)
            members, heatmaps = [request.member for request in requests], [request.heatmaps for request in requests]
            answers: Sequence[Answer] = await asyncio.to_thread(warm.answer, members, heatmaps, requests[0].rules)
        except RaydetectError as error:
            return [error] * len(requests)
        return answers

    async def score_chunk(self, model: str, chunk: Chunk, spec: ScoreSpec, sink: ResultsSink) -> bytes:
        """Scores an archive chunk; returns `ScoredChunk.to_bytes`."""
        warm = await self._get(model)

        def work() -> bytes:
            result = warm.score_chunk(chunk, spec)
            self._meters.count((row.status for row in result.rows), "archive")
            return sink.write(chunk, result.rows, result.pictures, result.clipped_pixels, result.close_ups).to_bytes()

        return await asyncio.to_thread(work)
