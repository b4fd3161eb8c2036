"""What the workers of a fit tell its driver. Its process loads no torch, so it is apart from `fit`."""

from raydetect.errors import RaydetectError
from raydetect.records import FitReport


class Board:
    """What workers say: progress, the report, and errors."""

    def __init__(self) -> None:
        """Nothing has been said."""
        self._ticks: list[tuple[str, int, int | None]] = []
        self._done: dict[str, tuple[int, int | None]] = {}
        self._report: FitReport | None = None
        self._error: RaydetectError | None = None
        self._final = False

    def begin(self) -> None:
        """An attempt begins: what a lost one had done is taken back."""
        self._ticks += [(phase, -done, total) for phase, (done, total) in self._done.items()]
        self._done.clear()

    def tick(self, ticks: list[tuple[str, int, int | None]]) -> None:
        """More of some phases is done."""
        self._ticks += ticks
        for phase, done, total in ticks:
            self._done[phase] = (self._done.get(phase, (0, None))[0] + done, total)

    def report(self, report: FitReport) -> None:
        """The artifact is written."""
        self._report = report

    def fail(self, error: RaydetectError, final: bool) -> None:
        """A worker gave up on purpose. The first final error counts, which no other attempt would mend."""
        if not self._final:
            self._error, self._final = error, final

    def ticks(self) -> list[tuple[str, int, int | None]]:
        """Progress since the last call."""
        ticks, self._ticks = self._ticks, []
        return ticks

    def outcome(self) -> tuple[FitReport | None, RaydetectError | None]:
        """The report, and the error that counts."""
        return self._report, self._error
