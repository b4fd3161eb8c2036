"""Archive runs side by side, each on a thread of its own, by the plan and the ledger of jobs."""

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
from raydetect.gateway.http.limits import BROKE
from raydetect.gateway.runs.stream import Stopped, Stream
from raydetect.planning.plan import Committer, ScorePlan, finish, plan_score
from raydetect.records import Chunk, Part, Shard
from raydetect.storage import Storage, normalise_uri

log = logging.getLogger("raydetect.gateway")
KEPT = 100
Send = Callable[[ScorePlan, Chunk], Part]


@dataclass(slots=True)
class Runner:
    """The runs of one server.

    Attributes:
        send: scores a chunk of a plan, writes its part and returns it.
        in_flight: chunks of a run at a time.
        max_runs: at a time.
        sources: below which images may lie; what a link leads to elsewhere is left out.
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
        """Plans a run and begins it; one that runs already is left alone.

        Raises:
            RaydetectError: it cannot be begun.
            TooMany: of them run.
        """
        uri = normalise_uri(spec.sink.uri)
        with self._lock:
            if uri in self._stops:
                if self._specs[uri] != spec:
                    raise ResumeError(f"{uri}: another archive run is writing there. Wait for it, or cancel it.")
                return self._states[uri]
            if len(self._stops) >= self.max_runs:
                raise TooMany(f"{len(self._stops)} archive runs are in hand, which is all this server does at a time.")
            self._stops[uri] = stop = threading.Event()
            self._specs[uri] = spec
            before = self._states.get(uri)
            state = self._note(RunState(uri, "running"))
        try:
            plan = plan_score(spec, self._shards(spec))
            plan.begin()
        except BaseException:
            with self._lock:
                del self._stops[uri], self._specs[uri], self._states[uri]
                if before is not None:
                    self._note(before)
            raise
        threading.Thread(target=self._run, args=(plan, stop), name="archive-run", daemon=True).start()
        return state

    def states(self) -> Mapping[str, RunState]:
        """Runs by results directory; the oldest that ended are forgotten."""
        with self._lock:
            return dict(self._states)

    def cancel(self, uri: str) -> bool:
        """Stops a run after the chunks in hand. False: none runs there."""
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
            committer = Committer(plan)
            for part in Stream(plan, lambda chunk: self.send(plan, chunk), self.in_flight, stop).parts():
                committer.add(part)
            finish(plan)
            state = RunState(uri, "finished")
        except Stopped:
            state = RunState(uri, "cancelled")
        except RaydetectError as error:
            state = RunState(uri, "failed", public_message(error)[1])
        except Exception:
            log.exception("the archive run into %s", uri)
            state = RunState(uri, "failed", BROKE)
        with self._lock:
            self._note(state)
            del self._stops[uri], self._specs[uri]

    def _note(self, state: RunState) -> RunState:
        self._states.pop(state.uri, None)
        self._states[state.uri] = state
        ended = [uri for uri in self._states if uri not in self._stops]
        for uri in ended[:-KEPT]:
            del self._states[uri]
        return state
