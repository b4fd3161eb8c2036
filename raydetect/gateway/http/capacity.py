"""Limits of a server's concurrent work: bytes in flight, and threads."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from raydetect.gateway.backend import TooMany

T = TypeVar("T")


class ByteBudget:
    """Encoded bytes of all requests in flight. Thread-safe."""

    def __init__(self, most: int) -> None:
        """Starts at zero and never exceeds `most`."""
        self._most, self._held, self._lock = most, 0, threading.Lock()

    def take(self, count: int) -> None:
        """Reserves bytes.

        Raises:
            TooMany: they would exceed the limit.
        """
        with self._lock:
            if self._held + count > self._most:
                raise TooMany(f"the requests in flight have reached the limit of {self._most:,} bytes. Try again.")
            self._held += count

    def give(self, count: int) -> None:
        """Releases bytes."""
        with self._lock:
            self._held -= count


class ThreadLane:
    """A thread pool with a bounded queue for one kind of work, so that no kind blocks another."""

    def __init__(self, what: str, threads: int, waiting: int) -> None:
        """Starts no threads yet.

        Args:
            what: the work, for messages.
            threads: the size of the pool.
            waiting: the size of the queue; more work is refused.
        """
        self._what, self._room = what, threads + waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=what.replace(" ", "-"))
        self._in_hand, self._lock = Counter[str](), threading.Lock()  # by holder

    async def run(self, work: Callable[[], T], holder: str = "", share: int | None = None) -> T:
        """Returns or raises what `work` does. If cancelled, the work keeps its thread until it ends.

        Args:
            work: runs in a thread.
            holder: the name of the token that asks for it.
            share: how much work one holder may have running and queued; all of it by default.

        Raises:
            TooMany: the queue is full, or the holder has its share.
        """
        with self._lock:
            if self._in_hand.total() >= self._room or (share is not None and self._in_hand[holder] >= share):
                most = self._room if self._in_hand.total() >= self._room else share
                raise TooMany(f"{most} requests already {self._what}, which is this server's limit. Try again.")
            self._in_hand[holder] += 1
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: self._ended(holder))
        return await asyncio.wrap_future(future)

    def _ended(self, holder: str) -> None:
        with self._lock:
            self._in_hand[holder] -= 1
