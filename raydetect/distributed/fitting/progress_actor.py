"""An actor that collects the messages of fit workers. Apart from `fit`, so that its process does not import torch."""

from raydetect.errors import RaydetectError
from raydetect.records import FitReport


class ProgressActor:
    """Progress, report and errors reported by the workers."""

    def __init__(self) -> None:
        """Starts without any messages."""
        self._updates: list[tuple[str, int, int | None]] = []
        self._done: dict[str, tuple[int, int | None]] = {}
        self._report: FitReport | None = None
        self._error: RaydetectError | None = None
        self._final = False

    def begin(self) -> None:
        """Starts an attempt and takes back the progress of a lost one."""
        self._updates += [(phase, -done, total) for phase, (done, total) in self._done.items()]
        self._done.clear()

    def on_progress(self, updates: list[tuple[str, int, int | None]]) -> None:
        """Adds progress: (phase, amount done since the last call, total)."""
        self._updates += updates
        for phase, done, total in updates:
            self._done[phase] = (self._done.get(phase, (0, None))[0] + done, total)

    def report(self, report: FitReport) -> None:
        """Stores the report once the artifact is written."""
        self._report = report

    def fail(self, error: RaydetectError, final: bool) -> None:
        """Stores an error raised by a worker. The first final error, which no retry can fix, is kept."""
        if not self._final:
            self._error, self._final = error, final

    def updates(self) -> list[tuple[str, int, int | None]]:
        """Returns the progress since the last call."""
        updates, self._updates = self._updates, []
        return updates

    def outcome(self) -> tuple[FitReport | None, RaydetectError | None]:
        """Returns the report and the error."""
        return self._report, self._error
