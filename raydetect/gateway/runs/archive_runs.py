"""Archive runs over HTTP: from a request to a job, and from a ledger to an answer."""

import base64
import binascii
import threading
from collections import OrderedDict

from raydetect.config import AllowSpec, ScoreSpec, ServeSpec, SinkSpec, SourceSpec
from raydetect.errors import StorageError
from raydetect.gateway.allowed_uris import WEB, NotAllowed, Prefixes
from raydetect.gateway.backend import RunState, Served
from raydetect.gateway.http.schemas import RunAnswer, RunRequest
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.run_progress import ProgressReader, RunProgress
from raydetect.storage import Storage

REMEMBERED = 100


def job_of(body: RunRequest, served: Served, spec: ServeSpec, allow: "Allowed") -> ScoreSpec:
    """The scoring job that a request asks for; storage, batch size and resources are the server's.

    Raises:
        NotAllowed: a URI outside of what may be read or written.
    """
    uris = [body.source.uri] if isinstance(body.source.uri, str) else body.source.uri
    words = body.source.model_dump(exclude={"uri"})
    source = SourceSpec(
        uri=tuple(_archive(allow.sources.check(uri, "source.uri")) for uri in uris),
        max_pixels=spec.limits.max_pixels,
        max_image_bytes=spec.limits.max_image_bytes,
        **words,
    )
    sink = SinkSpec(**body.sink.model_dump(exclude={"uri"}), uri=allow.sinks.check(body.sink.uri, "sink.uri"))
    return ScoreSpec(
        kind="score",
        source=source,
        artifact=served.index.uri,
        sink=sink,
        storage=spec.storage,
        flag=served.flag,
        batch_size=spec.batch_size,
        chunk_images=body.chunk_images,
        max_bad_fraction=body.max_bad_fraction,
        engine="serve",
        resources=spec.resources,
    )


def _archive(uri: str) -> str:
    """Archives are read by storage libraries, which follow redirects to wherever a web server sends them."""
    if uri.partition("://")[0] in WEB:
        raise NotAllowed(f"source.uri: {uri[:200]!r} is a web address, of which only single images are read.")
    return uri


class Allowed:
    """The prefixes of a server."""

    def __init__(self, allow: AllowSpec) -> None:
        """Normalises them.

        Raises:
            SpecError: one is no URI.
        """
        self.sources, self.sinks = Prefixes.of(allow.sources), Prefixes.of(allow.sinks)
        self.artifacts = Prefixes.of(allow.artifacts)


def run_id(uri: str) -> str:
    """Names a run by its results directory, so that any server can tell of it from the ledger."""
    return base64.urlsafe_b64encode(uri.encode()).decode().rstrip("=")


def uri_of(name: str) -> str | None:
    """The results directory of `run_id`; None when it names none."""
    try:
        uri = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
    except (binascii.Error, ValueError):
        return None
    return uri if run_id(uri) == name else None


class Ledgers:
    """The ledgers of runs that are asked for; the ones asked for last are remembered, so each record is read once."""

    def __init__(self, storage: Storage) -> None:
        """Reads nothing yet."""
        self._storage, self._followed = storage, OrderedDict[str, ProgressReader]()
        self._lock = threading.Lock()

    def progress(self, uri: str) -> RunProgress:
        """How far the run into a results directory is.

        Raises:
            StorageError: none was begun there.
        """
        with self._lock:
            followed = self._followed.pop(uri, None) or ProgressReader(Ledger(uri, self._storage))
            self._followed[uri] = followed
            if len(self._followed) > REMEMBERED:
                self._followed.popitem(last=False)
        return followed.progress()


def answer_of(uri: str, known: RunState | None, ledgers: Ledgers) -> RunAnswer | None:
    """How far a run is; None when none was begun there."""
    try:
        found = ledgers.progress(uri)
    except StorageError:
        if known is None:
            return None
        return RunAnswer(
            id=run_id(uri), uri=uri, state=known.state, error=known.error, shards_done=0, shards=0, images=0,
            bad_images=0, flagged=0, statuses={},
        )  # fmt: skip
    totals = found.totals
    state = known.state if known is not None else ("finished" if found.finished else "stopped")
    return RunAnswer(
        id=run_id(uri),
        uri=uri,
        state=state,
        error="" if known is None else known.error,
        shards_done=totals.shards,
        shards=found.num_shards,
        images=totals.rows,
        bad_images=totals.rows - totals.statuses.get("ok", 0),
        flagged=found.flagged or 0,
        statuses=dict(totals.statuses),
    )
