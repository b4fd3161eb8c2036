"""An actor that collects the messages of fit workers. Apart from `fit`, so that its process does not import torch."""

from raydetect.errors import RaydetectError
from raydetect.records import FitReport


class Board:
    """Progress, report and errors reported by the workers."""

    def __init__(self) -> None:
        """Starts without any messages."""
        self._ticks: list[tuple[str, int, int | None]] = []
        self._done: dict[str, tuple[int, int | None]] = {}
        self._report: FitReport | None = None
        self._error: RaydetectError | None = None
        self._final = False

    def begin(self) -> None:
        """Starts an attempt and takes back the progress of a lost one."""
        self._ticks += [(phase, -done, total) for phase, (done, total) in self._done.items()]
        self._done.clear()

    def tick(self, ticks: list[tuple[str, int, int | None]]) -> None:
        """Adds progress: (phase, amount done since the last call, total)."""
        self._ticks += ticks
        for phase, done, total in ticks:
            self._done[phase] = (self._done.get(phase, (0, None))[0] + done, total)

    def report(self, report: FitReport) -> None:
        """Stores the report once the artifact is written."""
        self._report = report

    def fail(self, error: RaydetectError, final: bool) -> None:
        """Stores an error raised by a worker. The first final error, which no retry can fix, is kept."""
        if not self._final:
            self._error, self._final = error, final

    def ticks(self) -> list[tuple[str, int, int | None]]:
        """Returns the progress since the last call."""
        ticks, self._ticks = self._ticks, []
        return ticks

    def outcome(self) -> tuple[FitReport | None, RaydetectError | None]:
        """Returns the report and the error."""
        return self._report, self._error
