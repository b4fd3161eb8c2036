"""The endpoints in one process, without Ray: `raydetect serve --local`."""

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

from raydetect.errors import SpecError
from raydetect.fleet_record import ArtifactIndex
from raydetect.gateway.allow import Prefixes
from raydetect.gateway.app import build_app
from raydetect.gateway.desk import RunState, Served, load_served
from raydetect.gateway.rules import online_spec
from raydetect.gateway.runner import Runner
from raydetect.gateway.tokens import Tokens
from raydetect.gateway.wire import BACKLOG, wire
from raydetect.plan import ScorePlan
from raydetect.records import Answer, Chunk, Member, Part
from raydetect.spec import Heatmaps, ScoreSpec, ServeSpec
from raydetect.storage import Storage
from raydetect.worker.turns import Turns
from raydetect.worker.warm import SharedDetectors, Warm

CHUNKS_IN_FLIGHT = 2
SCORED_AT_ONCE = 2  # requests: one is decoded while the images of the other are with the detector


class LocalDesk:
    """Scores in this process; see `gateway.desk.Desk`."""

    def __init__(self, spec: ServeSpec) -> None:
        """Loads every served detector.

        Raises:
            ArtifactError, SpecError: one cannot be served.
        """
        torch.set_num_threads(spec.resources.cpus_per_worker)
        self._spec, self._storage = spec, Storage(spec.storage)
        self._device = "cuda" if spec.resources.gpus_per_worker else "cpu"
        self._turns, self._warm, self._lock = Turns(), OrderedDict[str, Warm](), threading.Lock()
        self._served: dict[str, Served] = {}
        for name in spec.detectors:
            self._load(name, spec.detectors[name].artifact)
        self._scoring = ThreadPoolExecutor(SCORED_AT_ONCE, thread_name_prefix="score")
        self._runner = Runner(self._send, CHUNKS_IN_FLIGHT, spec.limits.max_runs, Prefixes.of(spec.allow.sources))

    async def served(self) -> Mapping[str, Served]:
        """See `Desk.served`."""
        return dict(self._served)

    async def answer(self, served: Served, members: Sequence[Member], heatmaps: Sequence[Heatmaps]) -> Sequence[Answer]:
        """See `Desk.answer`."""
        rules = online_spec(self._spec, served.index.uri, served.flag)
        work = partial(self._score, served.index, members, heatmaps, rules)
        return await asyncio.get_running_loop().run_in_executor(self._scoring, work)

    async def replace(self, name: str, artifact: str) -> Served:
        """See `Desk.replace`."""
        return await asyncio.to_thread(self._load, name, artifact)

    async def start(self, spec: ScoreSpec) -> RunState:
        """See `Desk.start`."""
        return await asyncio.to_thread(self._runner.start, spec)

    async def runs(self) -> Mapping[str, RunState]:
        """See `Desk.runs`."""
        return self._runner.states()

    async def cancel(self, uri: str) -> bool:
        """See `Desk.cancel`."""
        return self._runner.cancel(uri)

    async def ready(self) -> bool:
        """See `Desk.ready`."""
        return True

    def _load(self, name: str, artifact: str) -> Served:
        served = load_served(name, replace(self._spec.detectors[name], artifact=artifact), self._storage)
        self._get(served.index).warm_up(online_spec(self._spec, served.index.uri, served.flag))
        self._served[name] = served
        return served

    def _score(
        self, index: ArtifactIndex, members: Sequence[Member], heatmaps: Sequence[Heatmaps], rules: ScoreSpec
    ) -> Sequence[Answer]:
        return self._get(index).answer(members, heatmaps, rules)

    def _get(self, index: ArtifactIndex) -> Warm:
        with self._lock:
            found = self._warm.pop(index.digest, None)
            if found is None:
                if len(self._warm) >= self._spec.resources.detectors_in_memory:
                    self._warm.popitem(last=False)
                found = Warm(SharedDetectors(index, self._storage, self._turns), self._device, self._turns)
            self._warm[index.digest] = found
            return found

    def _send(self, plan: ScorePlan, chunk: Chunk) -> Part:
        result = self._get(plan.artifact).score_chunk(chunk, plan.spec)
        return plan.sink.write(chunk, result.rows, result.pictures, result.clipped_pixels)


def serve_here(
    spec: ServeSpec, tokens: Tokens, on_ready: Callable[[str, str], None], wait: Callable[[], None], **bounds: float
) -> None:
    """Answers requests until `wait` returns; requests in hand are finished.

    Args:
        spec: the job.
        tokens: who may do what.
        on_ready: told when requests are answered: of their URL, and of "" since there are no metrics.
        wait: returns when it is to end.
        bounds: of connections, other than those of `gateway.wire.Bounds`.

    Raises:
        ArtifactError, SpecError: a detector cannot be served, or the port is taken.
    """
    desk = LocalDesk(spec)
    with socket.socket(socket.AF_INET6 if ":" in spec.host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((spec.host, spec.port))
            listener.listen(BACKLOG)  # from here on clients wait instead of being refused
        except OSError as error:
            said = f"{spec.host}:{spec.port}: cannot be listened on ({error.strerror}). Set host and port."
            raise SpecError(said) from None
        config = uvicorn.Config(
            build_app(spec, tokens, desk),
            http=wire(**bounds),
            ws="none",
            log_level="error",
            access_log=False,
            lifespan="off",
            backlog=BACKLOG,
            timeout_graceful_shutdown=math.ceil(spec.limits.request_seconds),
        )
        server = uvicorn.Server(config)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
        serving.start()
        on_ready(f"http://{spec.host}:{listener.getsockname()[1]}", "")
        wait()
        server.should_exit = True
        serving.join()
