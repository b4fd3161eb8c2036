"""Archive runs over HTTP: converts a request to a scoring job, and a ledger to a response."""

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
MAX_ID_LETTERS = 11_000  # base64 of 2000 letters of up to 4 bytes


def job_of(body: RunRequest, served: Served, spec: ServeSpec, allow: "Allowed") -> ScoreSpec:
    """Converts a request to a scoring job with the server's storage, batch size and resources.

    Raises:
        NotAllowed: a URI is outside the allowed prefixes.
    """
    uris = [body.source.uri] if isinstance(body.source.uri, str) else body.source.uri
    options = body.source.model_dump(exclude={"uri"})
    source = SourceSpec(
        uri=tuple(_archive(allow.sources.check(uri, "source.uri")) for uri in uris),
        max_pixels=spec.limits.max_pixels,
        max_image_bytes=spec.limits.max_image_bytes,
        **options,
    )
    sink = SinkSpec(**body.sink.model_dump(exclude={"uri"}), uri=allow.sinks.check(body.sink.uri, "sink.uri"))
    return ScoreSpec(
        kind="score",
        source=source,
        artifact=served.index.uri,
        sink=sink,
        storage=spec.storage,
        flag=served.flag,
        batch_size=spec.archive_batch_size,
        chunk_images=body.chunk_images,
        max_bad_fraction=body.max_bad_fraction,
        engine="serve",
        resources=spec.resources,
    )


def _archive(uri: str) -> str:
    """Refuses http(s) archives: the storage libraries that read them follow any redirect."""
    if uri.partition("://")[0] in WEB:
        raise NotAllowed(f"source.uri: {uri[:200]!r} is a URL; only single images are read by URL.")
    return uri


class Allowed:
    """The allowed prefixes of a server."""

    def __init__(self, allow: AllowSpec) -> None:
        """Normalises the prefixes.

        Raises:
            SpecError: one is not a URI.
        """
        self.sources, self.sinks = Prefixes.of(allow.sources), Prefixes.of(allow.sinks)
        self.artifacts = Prefixes.of(allow.artifacts)


def run_id(uri: str) -> str:
    """The id of a run: its results directory in base64, so that any server can report on it from the ledger."""
    return base64.urlsafe_b64encode(uri.encode()).decode().rstrip("=")


def uri_of(name: str) -> str | None:
    """The results directory of a run id; None if the id is invalid."""
    if len(name) > MAX_ID_LETTERS:
        return None
    try:
        uri = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
    except (binascii.Error, ValueError):
        return None
    return uri if run_id(uri) == name else None


class Ledgers:
    """Progress of runs; caches the most recently requested ledgers, so that each record is read once."""

    def __init__(self, storage: Storage) -> None:
        """Creates an empty cache."""
        self._storage, self._readers = storage, OrderedDict[str, ProgressReader]()
        self._lock = threading.Lock()

    def progress(self, uri: str) -> RunProgress:
        """Reads the progress of the run in a results directory.

        Raises:
            StorageError: no run was started there.
        """
        with self._lock:
            reader = self._readers.pop(uri, None) or ProgressReader(Ledger(uri, self._storage))
            self._readers[uri] = reader
            if len(self._readers) > REMEMBERED:
                self._readers.popitem(last=False)
        return reader.progress()


def answer_of(uri: str, known: RunState | None, ledgers: Ledgers) -> RunAnswer | None:
    """The progress of a run; None if no run was started there."""
    try:
        progress = ledgers.progress(uri)
    except StorageError:
        if known is None:
            return None
        return RunAnswer(
            id=run_id(uri), uri=uri, state=known.state, error=known.error, shards_done=0, shards=0, images=0,
            bad_images=0, flagged=0, statuses={},
        )  # fmt: skip
    totals = progress.totals
    state = known.state if known is not None else ("finished" if progress.finished else "stopped")
    return RunAnswer(
        id=run_id(uri),
        uri=uri,
        state=state,
        error="" if known is None else known.error,
        shards_done=totals.shards,
        shards=progress.num_shards,
        images=totals.rows,
        bad_images=totals.rows - totals.statuses.get("ok", 0),
        flagged=progress.flagged or 0,
        statuses=dict(totals.statuses),
    )
