"""Streams an archive: threads read chunks ahead and send a bounded number at a time to be scored."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from raydetect.archives.chunks import read_chunks
from raydetect.planning.plan import ScorePlan
from raydetect.records import Chunk, Shard
from raydetect.sinks.scored_chunk import ScoredChunk

POLL_SECONDS = 0.2


class Stopped(Exception):
    """The run was cancelled."""


@dataclass(slots=True)
class Stream:
    """The stream of one archive.

    Attributes:
        plan: the job.
        send: scores a chunk; called from several threads.
        in_flight: chunks being scored at a time; as many more may be read ahead, and twice as many may be scored but
            not yet taken.
        readers: shards being read at a time, each with one more chunk in memory.
        stop: set to end the stream.
    """

    plan: ScorePlan
    send: Callable[[Chunk], ScoredChunk]
    in_flight: int
    readers: int
    stop: threading.Event = field(default_factory=threading.Event)
    _chunks: "queue.Queue[Chunk]" = field(init=False)
    _done: "queue.Queue[ScoredChunk | BaseException | None]" = field(default_factory=queue.Queue)
    _room: threading.Semaphore = field(init=False)
    _abandoned: threading.Event = field(default_factory=threading.Event)
    _readers_ended: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._chunks = queue.Queue(self.in_flight)
        self._room = threading.Semaphore(2 * self.in_flight)

    def scored(self) -> Iterator[ScoredChunk]:
        """Yields all remaining chunks as they are scored.

        Raises:
            RaydetectError: the first error of `send` or the archive; no more chunks are sent.
            Stopped: `stop` was set; chunks in flight were scored.
        """
        threads = self.readers + self.in_flight
        with ThreadPoolExecutor(threads, thread_name_prefix="stream") as pool:
            for i in range(self.readers):
                pool.submit(self._guarded, self._read, self.plan.todo[i :: self.readers])
            for _ in range(self.in_flight):
                pool.submit(self._guarded, self._score)
            try:
                yield from self._collected(threads)
            finally:
                self.stop.set()
                self._abandoned.set()

    def _collected(self, threads: int) -> Iterator[ScoredChunk]:
        first_error: BaseException | None = None
        while threads:
            item = self._done.get()
            if item is None:
                threads -= 1
            elif isinstance(item, ScoredChunk):
                self._room.release()
                yield item
            else:
                first_error = first_error or item
                self.stop.set()
        if first_error is not None:
            raise first_error

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        try:
            work(*args)
        except BaseException as error:
            self._done.put(error)
        finally:
            self._done.put(None)

    def _read(self, shards: Sequence[Shard]) -> None:
        spec = self.plan.spec
        try:
            for shard in shards:
                for chunk in read_chunks(self.plan.archive, shard, spec.source, spec.chunk_images, spec.chunk_bytes):
                    self._put(chunk)
        finally:
            with self._lock:
                self._readers_ended += 1

    def _put(self, chunk: Chunk) -> None:
        while not self.stop.is_set():
            try:
                self._chunks.put(chunk, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return
        raise Stopped

    def _score(self) -> None:
        """Scores queued chunks until all readers have ended and the queue is empty."""
        while not self.stop.is_set():
            all_read = self._all_read()
            try:
                chunk = self._chunks.get(timeout=0 if all_read else POLL_SECONDS)
            except queue.Empty:
                if all_read:
                    return
                continue
            scored = self.send(chunk)
            while not self._room.acquire(timeout=POLL_SECONDS):
                if self._abandoned.is_set():
                    return
            self._done.put(scored)

    def _all_read(self) -> bool:
        return self._readers_ended == self.readers
