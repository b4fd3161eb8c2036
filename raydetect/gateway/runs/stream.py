"""Streams an archive to warm detectors: reads chunks here and sends a bounded number at a time."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from raydetect.archives.chunks import read_chunks
from raydetect.planning.plan import ScorePlan
from raydetect.records import Chunk, Part, Shard

POLL_SECONDS = 0.2


class Stopped(Exception):
    """The run was cancelled."""


@dataclass(slots=True)
class Stream:
    """The stream of one archive.

    Attributes:
        plan: the job.
        send: scores a chunk, writes its part and returns it; called from several threads.
        in_flight: chunks being scored at a time; up to as many more are read ahead.
        stop: set to end the stream.
    """

    plan: ScorePlan
    send: Callable[[Chunk], Part]
    in_flight: int
    stop: threading.Event = field(default_factory=threading.Event)
    _chunks: "queue.Queue[Chunk]" = field(init=False)
    _done: "queue.Queue[Part | BaseException | None]" = field(default_factory=queue.Queue)
    _readers_ended: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._chunks = queue.Queue(self.in_flight)

    def parts(self) -> Iterator[Part]:
        """Yields the parts of all remaining chunks as they complete.

        Raises:
            RaydetectError: the first error of `send` or the archive; no more chunks are sent.
            Stopped: `stop` was set; chunks in flight were scored.
        """
        with ThreadPoolExecutor(2 * self.in_flight, thread_name_prefix="stream") as pool:
            for i in range(self.in_flight):
                pool.submit(self._guarded, self._read, self.plan.todo[i :: self.in_flight])
                pool.submit(self._guarded, self._score)
            try:
                yield from self._collected(2 * self.in_flight)
            finally:
                self.stop.set()

    def _collected(self, threads: int) -> Iterator[Part]:
        first_error: BaseException | None = None
        while threads:
            item = self._done.get()
            if item is None:
                threads -= 1
            elif isinstance(item, Part):
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
            self._done.put(self.send(chunk))

    def _all_read(self) -> bool:
        return self._readers_ended == self.in_flight
