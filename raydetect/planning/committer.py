"""Collects scored chunks, writes their files on a pool of threads, and commits each shard when it is complete."""

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

from raydetect.planning.plan import ScorePlan
from raydetect.records import PART_FILE, Part, Receipt, Shard
from raydetect.sinks.consistency import listed_files, rows_digest
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.parquet import is_full, part_path
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.storage import join_uri

OnProgress = Callable[[ScoredChunk | Receipt], None]
WRITERS = 8
MAX_UNWRITTEN = 4 * WRITERS  # parts and records; beyond, `add` waits for the oldest one
WRITTEN = re.compile(PART_FILE)
SCORES_OF = re.compile(r"scores/shard=(\d{5,})/")


@dataclass(slots=True)
class _OpenShard:
    """A shard with chunks that are not committed.

    Attributes:
        waiting: chunks by number that arrived before one of their predecessors.
        next_number: number of the next chunk in order.
        collected: consecutive chunks of the part that is not full yet.
        rows: rows in them.
        picture_bytes: bytes of their small heatmaps.
        parts: written parts, or those being written.
        is_complete: whether the last chunk is in a part.
    """

    waiting: dict[int, ScoredChunk] = field(default_factory=dict)
    next_number: int = 0
    collected: list[ScoredChunk] = field(default_factory=list)
    rows: int = 0
    picture_bytes: int = 0
    parts: list[Future[Part]] = field(default_factory=list)
    is_complete: bool = False

    def add(self, chunk: ScoredChunk) -> Iterator[list[ScoredChunk]]:
        """Adds a chunk and yields the parts that it completes. Parts depend only on the sequence of chunks."""
        if chunk.facts.number < self.next_number:
            return
        self.waiting[chunk.facts.number] = chunk
        while self.next_number in self.waiting:
            following = self.waiting.pop(self.next_number)
            self.next_number += 1
            self.collected.append(following)
            self.rows += following.images
            self.picture_bytes += following.picture_bytes
            if following.facts.last or is_full(self.rows, self.picture_bytes):
                self.is_complete = following.facts.last
                full, self.collected, self.rows, self.picture_bytes = self.collected, [], 0, 0
                yield full


class Committer:
    """Commits the shards of a plan as a context manager.

    Chunks may arrive in any order and more than once. A shard is committed by its record, which is written when all
    of its files are. Readers of `scores/**/*.parquet` see no row twice at any time: Parquet files that an interrupted
    run or an older version left of a shard are removed before the first file of the shard is written.
    """

    def __init__(self, plan: ScorePlan) -> None:
        """Lists the files of shards that are not committed.

        Raises:
            StorageError: the results directory cannot be listed.
        """
        self._plan, self._run = plan, rows_digest(plan.run)
        self._open: dict[int, _OpenShard] = {}
        self._closed: set[int] = set()
        self._stale = _stale_files(plan.ledger, {shard.index for shard in plan.todo})
        self._running: deque[Future[Part] | Future[Receipt]] = deque()
        self._has_failed = False
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="commit")

    def __enter__(self) -> "Committer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits until complete shards are committed, also after an error elsewhere, unless committing itself failed."""
        self._pool.shutdown(wait=True, cancel_futures=self._has_failed or kind is KeyboardInterrupt)

    def add(self, chunk: ScoredChunk) -> list[Receipt]:
        """Adds a chunk; returns the receipts of the shards that have been committed since the last call.

        Raises:
            ResumeError: another job has taken over the results directory.
            StorageError: `run.json` was removed, or a file cannot be written.
        """
        index = chunk.facts.shard
        if index not in self._closed:
            shard = self._open.setdefault(index, _OpenShard())
            for chunks in shard.add(chunk):
                self._write(index, shard, chunks)
            if shard.is_complete:
                del self._open[index]
                self._closed.add(index)
                self._running.append(self._pool.submit(self._commit, self._plan.shards[index], shard.parts))
        return self._ended(MAX_UNWRITTEN)

    def finish(self) -> list[Receipt]:
        """Waits for all complete shards; returns the receipts of those that have been committed since the last call.

        Raises:
            ResumeError, StorageError: see `add`.
        """
        return self._ended(0)

    def _write(self, index: int, shard: _OpenShard, chunks: list[ScoredChunk]) -> None:
        """Starts writing a part. The first one waits for the removal of stale files, so the others wait for it."""
        stale = self._stale.pop(index, ())
        first = shard.parts[0] if shard.parts else None
        future = self._pool.submit(self._write_part, len(shard.parts), chunks, stale, first)
        shard.parts.append(future)
        self._running.append(future)

    def _write_part(
        self, number: int, chunks: list[ScoredChunk], stale: tuple[str, ...], first: Future[Part] | None
    ) -> Part:
        if first is not None:
            first.result()
        for path in stale:
            if path != part_path(chunks[0].facts.shard, number):
                self._plan.ledger.storage.delete(join_uri(self._plan.ledger.uri, path))
        return self._plan.sink.write_part(number, chunks)

    def _commit(self, shard: Shard, written: list[Future[Part]]) -> Receipt:
        parts = [future.result() for future in written]
        statuses: Counter[str] = Counter()
        for part in parts:
            statuses.update(part.statuses)
        receipt = Receipt(
            shard=shard.index,
            uri=shard.uri,
            fingerprint=shard.fingerprint,
            span=shard.span,
            run=self._run,
            rows=sum(part.rows for part in parts),
            statuses=dict(sorted(statuses.items())),
            parts=tuple(parts),
            committed_unix=time.time(),
        )
        self._plan.ledger.require_own(self._plan.run)  # two drivers may have started in one directory
        self._plan.sink.commit(receipt)
        return receipt

    def _ended(self, limit: int) -> list[Receipt]:
        """Receipts of finished work; waits for the oldest while more than `limit` pieces are unfinished."""
        receipts = []
        while self._running and (len(self._running) > limit or self._running[0].done()):
            try:
                result = self._running.popleft().result()
            except BaseException:
                self._has_failed = True
                raise
            if isinstance(result, Receipt):
                receipts.append(result)
        return receipts


def commit_all(plan: ScorePlan, chunks: Iterable[ScoredChunk], on_progress: OnProgress) -> None:
    """Commits the shards of a plan as their chunks arrive.

    Args:
        plan: the scoring plan.
        chunks: the chunks of all remaining shards.
        on_progress: called with each chunk, and with each receipt once it is written.

    Raises:
        ResumeError: another job has taken over the results directory.
        StorageError: `run.json` was removed, or a file cannot be written.
    """
    with Committer(plan) as committer:
        for chunk in chunks:
            on_progress(chunk)
            for receipt in committer.add(chunk):
                on_progress(receipt)
        for receipt in committer.finish():
            on_progress(receipt)


def _stale_files(ledger: Ledger, todo: set[int]) -> dict[int, tuple[str, ...]]:
    """Parquet files of shards that are not committed, by shard.

    Heatmaps are no rows, and workers may rewrite them before the first part; `finish` removes those without a record.
    """
    stale: dict[int, tuple[str, ...]] = {}
    for path in sorted(listed_files(ledger, ("scores",))):
        match = SCORES_OF.match(path) if WRITTEN.fullmatch(path) else None
        if match and int(match[1]) in todo:
            stale[int(match[1])] = (*stale.get(int(match[1]), ()), path)
    return stale
