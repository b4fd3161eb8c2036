"""Concurrent archive runs, each on its own thread, with the plan and ledger of batch jobs."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from raydetect.archives.open import open_archive
from raydetect.config import ScoreSpec, source_storage
from raydetect.errors import RaydetectError, ResumeError
from raydetect.gateway.allowed_uris import Prefixes
from raydetect.gateway.backend import RunState, TooMany
from raydetect.gateway.http.errors import public_message
from raydetect.gateway.http.limits import INTERNAL_ERROR
from raydetect.planning.committer import commit_all
from raydetect.planning.plan import ScorePlan, finish, plan_score
from raydetect.planning.stream import Stopped, Stream
from raydetect.records import Chunk, Shard
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.storage import Storage, normalise_uri

log = logging.getLogger("raydetect.gateway")
KEPT = 100
Send = Callable[[ScorePlan, Chunk], ScoredChunk]


@dataclass(slots=True)
class Runner:
    """The archive runs of one server.

    Attributes:
        send: scores a chunk of a plan.
        in_flight: chunks in flight per run.
        max_runs: concurrent runs.
        sources: prefixes of allowed images; links that lead outside them are left out.
    """

    send: Send
    in_flight: int
    max_runs: int
    sources: Prefixes
    _states: dict[str, RunState] = field(default_factory=dict)
    _stops: dict[str, threading.Event] = field(default_factory=dict)
    _specs: dict[str, ScoreSpec] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, spec: ScoreSpec) -> RunState:
        """Plans and starts a run; does nothing if the same run is already in progress.

        Raises:
            RaydetectError: it cannot be started.
            TooMany: `max_runs` are in progress.
        """
        uri = normalise_uri(spec.sink.uri)
        with self._lock:
            if uri in self._stops:
                if self._specs[uri] != spec:
                    raise ResumeError(f"{uri}: another archive run is writing there. Wait for it, or cancel it.")
                return self._states[uri]
            if len(self._stops) >= self.max_runs:
                raise TooMany(f"{len(self._stops)} archive runs are in progress, which is this server's limit.")
            self._stops[uri] = stop = threading.Event()
            self._specs[uri] = spec
            previous = self._states.get(uri)
            state = self._set_state(RunState(uri, "running"))
        try:
            plan = plan_score(spec, self._shards(spec))
            plan.begin()
        except BaseException:
            with self._lock:
                del self._stops[uri], self._specs[uri], self._states[uri]
                if previous is not None:
                    self._set_state(previous)
            raise
        threading.Thread(target=self._run, args=(plan, stop), name="archive-run", daemon=True).start()
        return state

    def states(self) -> Mapping[str, RunState]:
        """Returns the runs by results directory, with at most KEPT that have ended."""
        with self._lock:
            return dict(self._states)

    def cancel(self, uri: str) -> bool:
        """Stops a run after its chunks in flight. Returns False if no run is in progress."""
        with self._lock:
            stop = self._stops.get(uri)
            if stop is not None:
                stop.set()
        return stop is not None

    def _shards(self, spec: ScoreSpec) -> tuple[Shard, ...]:
        archive = open_archive(spec.source, Storage(source_storage(spec, spec.source)), self.sources.holds)
        return archive.listing().shards

    def _run(self, plan: ScorePlan, stop: threading.Event) -> None:
        uri = plan.ledger.uri
        try:
            stream = Stream(plan, lambda chunk: self.send(plan, chunk), self.in_flight, self.in_flight, stop)
            commit_all(plan, stream.scored(), lambda _: None)
            finish(plan)
            state = RunState(uri, "finished")
        except Stopped:
            state = RunState(uri, "cancelled")
        except RaydetectError as error:
            state = RunState(uri, "failed", public_message(error)[1])
        except Exception:
            log.exception("the archive run into %s", uri)
            state = RunState(uri, "failed", INTERNAL_ERROR)
        with self._lock:
            self._set_state(state)
            del self._stops[uri], self._specs[uri]

    def _set_state(self, state: RunState) -> RunState:
        self._states.pop(state.uri, None)
        self._states[state.uri] = state
        ended = [uri for uri in self._states if uri not in self._stops]
        for uri in ended[:-KEPT]:
            del self._states[uri]
        return state
