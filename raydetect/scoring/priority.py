"""Shares one device between two kinds of work: online requests take priority over archives."""

import threading
from types import TracebackType


class PriorityLock:
    """A lock with two priorities. The holder is never interrupted; of the waiting threads, `online` goes first."""

    def __init__(self) -> None:
        """Creates an unlocked lock."""
        self._condition = threading.Condition()
        self._held = False
        self._online_waiting = 0
        self.online = _PrioritisedLock(self, True)
        self.bulk = _PrioritisedLock(self, False)

    def take(self, online: bool) -> None:
        """Acquires the lock, waiting if needed."""
        with self._condition:
            self._online_waiting += online
            while self._held or (not online and self._online_waiting):
                self._condition.wait()
            self._online_waiting -= online
            self._held = True

    def give(self) -> None:
        """Releases the lock."""
        with self._condition:
            self._held = False
            self._condition.notify_all()


class _PrioritisedLock:
    """A context manager that acquires `PriorityLock` with one priority."""

    def __init__(self, device_lock: PriorityLock, online: bool) -> None:
        """Creates a context manager; `online` has priority."""
        self._device_lock, self._online = device_lock, online

    def __enter__(self) -> None:
        self._device_lock.take(self._online)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device_lock.give()
