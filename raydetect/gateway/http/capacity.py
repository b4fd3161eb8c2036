"""What a server has in hand at a time: bytes that clients sent or named, and work on threads."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from raydetect.gateway.backend import TooMany

T = TypeVar("T")


class ByteBudget:
    """Encoded bytes of all requests together. Threads may share it."""

    def __init__(self, most: int) -> None:
        """None yet, and never more than `most`."""
        self._most, self._held, self._lock = most, 0, threading.Lock()

    def take(self, count: int) -> None:
        """More are held from now on.

        Raises:
            TooMany: there is no room for them.
        """
        with self._lock:
            if self._held + count > self._most:
                raise TooMany(
                    f"the requests in hand have {self._most:,} bytes, which is all this server takes. Try again."
                )
            self._held += count

    def give(self, count: int) -> None:
        """They are held no longer."""
        with self._lock:
            self._held -= count


class ThreadLane:
    """A pool of threads for one kind of work, so that no kind waits for another."""

    def __init__(self, what: str, threads: int, waiting: int) -> None:
        """Starts no thread yet.

        Args:
            what: is done, for messages.
            threads: of it at a time.
            waiting: for a thread, beside those; more are refused.
        """
        self._what, self._room = what, threads + waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=what.replace(" ", "-"))
        self._in_hand, self._lock = 0, threading.Lock()

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. One that is no longer waited for keeps its thread until it ends.

        Raises:
            TooMany: all threads have work, and enough waits for them.
        """
        with self._lock:
            if self._in_hand >= self._room:
                raise TooMany(f"{self._room} requests {self._what} just now, which is all this server does. Try again.")
            self._in_hand += 1
        future = self._pool.submit(work)
        future.add_done_callback(self._ended)
        return await asyncio.wrap_future(future)

    def _ended(self, _: Future[Any]) -> None:
        with self._lock:
            self._in_hand -= 1
