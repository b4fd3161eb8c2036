"""What a person sees of a long step: a live display on a terminal, plain lines elsewhere (standard error)."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from raydetect.records import Part, Receipt

LINE_SECONDS = 5.0


class FitDisplay:
    """Phases of a fit."""

    def __init__(self, after_seconds: float = 0.0) -> None:
        """Chooses the display by whether standard error is a terminal or a notebook's cell.

        Args:
            after_seconds: shows nothing of a step that takes less.
        """
        self._live = _live() if sys.stderr.isatty() or Console(stderr=True).is_jupyter else None
        self._shows_at = time.monotonic() + after_seconds
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._line_at = 0.0

    def __enter__(self) -> "FitDisplay":
        if self._live and time.monotonic() >= self._shows_at:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def tick(self, phase: str, done: int, total: int | None) -> None:
        """More of a phase is done."""
        first = phase not in self._done
        self._done[phase] = self._done.get(phase, 0) + done
        now = time.monotonic()
        if self._live:
            if first:
                self._tasks[phase] = self._live.add_task(phase, total=total, note="")
            self._live.advance(self._tasks[phase], done)
            if now >= self._shows_at:
                self._live.start()
            return
        if now < self._shows_at:
            return
        ended = total is not None and self._done[phase] >= total
        if first or ended or now - self._line_at > LINE_SECONDS:
            self._line_at = now
            of_all = f"/{total}" if total is not None else ""
            _line(f"{phase}: {self._done[phase]}{of_all}" if done else phase)


@contextmanager
def shown(progress: bool, after_seconds: float) -> Iterator[Callable[[str, int, int | None], None]]:
    """What to tell of a step: it is shown once the step takes long, or never."""
    if not progress:
        yield lambda phase, done, total: None
        return
    with FitDisplay(after_seconds) as display:
        yield display.tick


class ScoreDisplay:
    """Shards, images, images/s, bad rows and time left of a scoring run."""

    def __init__(self, shards_done: int, shards_total: int, bytes_left: int) -> None:
        """Begins at what earlier runs committed."""
        self.shards_done, self.shards_total = shards_done, shards_total
        self.images = self.bad = self.flagged = self.bytes_done = 0
        self._bytes_left = bytes_left
        self._begun: float | None = None
        self._line_at = 0.0
        self._live = _live() if sys.stderr.isatty() else None
        self._task: TaskID | None = None

    def __enter__(self) -> "ScoreDisplay":
        if self._live:
            self._live.start()
            self._task = self._live.add_task(
                "shards", total=self.shards_total, completed=self.shards_done, note="starting"
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def part(self, part: Part, receipt: Receipt | None, shard_bytes: int = 0) -> None:
        """A chunk is written, and with a receipt its shard is committed."""
        if self._begun is None:
            self._begun = time.monotonic() - part.seconds
        self.images += part.rows
        self.bad += part.rows - part.statuses.get("ok", 0)
        self.flagged += part.flagged
        if receipt is not None:
            self.shards_done += 1
            self.bytes_done += shard_bytes
        if self._live and self._task is not None:
            self._live.update(self._task, completed=self.shards_done, note=self.note())
            return
        now = time.monotonic()
        if self.shards_done == self.shards_total or now - self._line_at > LINE_SECONDS:
            self._line_at = now
            _line(f"shards {self.shards_done}/{self.shards_total}, {self.note()}")

    def rate(self) -> float:
        """Images per second since the first chunk began."""
        if self._begun is None:
            return 0.0
        return self.images / max(time.monotonic() - self._begun, 1e-3)

    def note(self) -> str:
        """`412 images, 56.1 images/s, 3 bad, 12 flagged, 4 min left`."""
        text = f"{self.images:,} images, {self.rate():.1f} images/s, {self.bad} bad, {self.flagged} flagged"
        if self._begun is not None and 0 < self.bytes_done < self._bytes_left:
            spent = time.monotonic() - self._begun
            text += f", {seconds_text(spent * (self._bytes_left / self.bytes_done - 1))} left"
        return text


class _Done(ProgressColumn):
    """`12/40`, or the count alone while the whole is unknown."""

    _counted = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        """The column's text."""
        return self._counted.render(task) if task.total is not None else Text(f"{int(task.completed)}")


def _live() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _Done(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def seconds_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def bytes_text(count: float) -> str:
    """`4.2 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"
