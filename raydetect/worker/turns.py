"""One device, two kinds of work: people who wait go before archives."""

import threading
from types import TracebackType


class Turns:
    """A lock with two doors. Whoever holds it keeps it; among those who wait, `online` goes first."""

    def __init__(self) -> None:
        """Free."""
        self._condition = threading.Condition()
        self._held = False
        self._online_waiting = 0
        self.online = Door(self, True)
        self.bulk = Door(self, False)

    def take(self, online: bool) -> None:
        """Waits for the turn."""
        with self._condition:
            self._online_waiting += online
            while self._held or (not online and self._online_waiting):
                self._condition.wait()
            self._online_waiting -= online
            self._held = True

    def give(self) -> None:
        """Ends the turn."""
        with self._condition:
            self._held = False
            self._condition.notify_all()


class Door:
    """One way into `Turns`, as a context manager."""

    def __init__(self, turns: Turns, online: bool) -> None:
        """`online` goes first."""
        self._turns, self._online = turns, online

    def __enter__(self) -> None:
        self._turns.take(self._online)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.give()
