"""Serves the endpoints in one process, without Ray: `raydetect serve --local`."""

import asyncio
import math
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
import uvicorn

from raydetect.artifacts.fleet import ArtifactIndex
from raydetect.config import Heatmaps, ScoreSpec, ServeSpec
from raydetect.errors import SpecError
from raydetect.gateway.allowed_uris import Prefixes
from raydetect.gateway.backend import RunState, Served, load_served
from raydetect.gateway.http.app import build_app
from raydetect.gateway.http.connections import BACKLOG, bounded_protocol
from raydetect.gateway.http.tokens import Tokens
from raydetect.gateway.runs.runner import Runner
from raydetect.gateway.single_images import online_spec
from raydetect.planning.plan import ScorePlan
from raydetect.records import Answer, Chunk, Member
from raydetect.scoring.device_queue import DeviceQueue
from raydetect.scoring.garbage import spare_what_is_loaded
from raydetect.scoring.scorer_pool import ScorerPool, SharedDetectors
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.storage import Storage

CHUNKS_IN_FLIGHT = 2
STOP_SECONDS = 10.0  # for requests in flight when the server stops
SCORED_AT_ONCE = 2  # requests: one is decoded while the other's images are scored


class LocalBackend:
    """Scores in this process; see `gateway.backend.Backend`."""

    def __init__(self, spec: ServeSpec) -> None:
        """Loads every served detector.

        Raises:
            ArtifactError, SpecError: one cannot be served.
        """
        torch.set_num_threads(spec.resources.cpus_per_worker)
        spare_what_is_loaded()
        self._spec, self._storage = spec, Storage(spec.storage)
        self._queue = DeviceQueue("cuda" if spec.resources.gpus_per_worker else "cpu")
        self._pools, self._lock = OrderedDict[str, ScorerPool](), threading.Lock()
        self._served: dict[str, Served] = {}
        for name in spec.detectors:
            self._load(name, spec.detectors[name].artifact)
        self._scoring = ThreadPoolExecutor(SCORED_AT_ONCE, thread_name_prefix="score")
        self._runner = Runner(self._send, CHUNKS_IN_FLIGHT, spec.limits.max_runs, Prefixes.of(spec.allow.sources))

    async def served(self) -> Mapping[str, Served]:
        """See `Backend.served`."""
        return dict(self._served)

    async def answer(self, served: Served, members: Sequence[Member], heatmaps: Sequence[Heatmaps]) -> Sequence[Answer]:
        """See `Backend.answer`."""
        job = online_spec(self._spec, served.index.uri, served.flag)
        work = partial(self._score, served.index, members, heatmaps, job)
        return await asyncio.get_running_loop().run_in_executor(self._scoring, work)

    async def replace(self, name: str, artifact: str) -> Served:
        """See `Backend.replace`."""
        return await asyncio.to_thread(self._load, name, artifact)

    async def start(self, spec: ScoreSpec) -> RunState:
        """See `Backend.start`."""
        return await asyncio.to_thread(self._runner.start, spec)

    async def runs(self) -> Mapping[str, RunState]:
        """See `Backend.runs`."""
        return self._runner.states()

    async def cancel(self, uri: str) -> bool:
        """See `Backend.cancel`."""
        return self._runner.cancel(uri)

    async def ready(self) -> bool:
        """See `Backend.ready`."""
        return True

    def _load(self, name: str, artifact: str) -> Served:
        served = load_served(name, replace(self._spec.detectors[name], artifact=artifact), self._storage)
        self._get(served.index).warm_up(online_spec(self._spec, served.index.uri, served.flag))
        self._served[name] = served
        return served

    def _score(
        self, index: ArtifactIndex, members: Sequence[Member], heatmaps: Sequence[Heatmaps], job: ScoreSpec
    ) -> Sequence[Answer]:
        return self._get(index).answer(members, heatmaps, job)

    def _get(self, index: ArtifactIndex) -> ScorerPool:
        with self._lock:
            pool = self._pools.pop(index.digest, None)
            if pool is None:
                if len(self._pools) >= self._spec.resources.detectors_in_memory:
                    self._pools.popitem(last=False)
                pool = ScorerPool(SharedDetectors(index, self._storage), self._queue)
            self._pools[index.digest] = pool
            return pool

    def _send(self, plan: ScorePlan, chunk: Chunk) -> ScoredChunk:
        result = self._get(plan.artifact).score_chunk(chunk, plan.spec)
        return plan.sink.write(chunk, result.rows, result.pictures, result.clipped_pixels, result.close_ups)


def serve_here(
    spec: ServeSpec, tokens: Tokens, on_ready: Callable[[str, str], None], wait: Callable[[], None], **bounds: float
) -> None:
    """Serves requests until `wait` returns, then finishes those in flight, for at most STOP_SECONDS.

    Args:
        spec: the job.
        tokens: accepted tokens and their scopes.
        on_ready: called with the server's URL and "", since there is no metrics URL, once it accepts requests.
        wait: blocks until the server should stop.
        bounds: fields of `gateway.http.connections.ConnectionLimits` to override.

    Raises:
        ArtifactError, SpecError: a detector cannot be served, or the port is in use.
    """
    backend = LocalBackend(spec)
    with socket.socket(socket.AF_INET6 if ":" in spec.host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((spec.host, spec.port))
            listener.listen(BACKLOG)  # from now on clients wait instead of being refused
        except OSError as error:
            message = f"{spec.host}:{spec.port}: cannot be listened on ({error.strerror}). Set host and port."
            raise SpecError(message) from None
        config = uvicorn.Config(
            build_app(spec, tokens, backend),
            http=bounded_protocol(**bounds),
            ws="none",
            log_level="error",
            access_log=False,
            lifespan="off",
            backlog=BACKLOG,
            timeout_graceful_shutdown=math.ceil(min(STOP_SECONDS, spec.limits.request_seconds)),
        )
        server = uvicorn.Server(config)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
        serving.start()
        on_ready(f"http://{spec.host}:{listener.getsockname()[1]}", "")
        wait()
        server.should_exit = True
        serving.join()
