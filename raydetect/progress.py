"""Progress of long steps on standard error: a live display on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from raydetect.sinks.scored_chunk import ScoredChunk

LINE_SECONDS = 5.0


class FitDisplay:
    """Progress display for the phases of a fit."""

    def __init__(self, after_seconds: float = 0.0) -> None:
        """Uses a live display if standard error is a terminal or the code runs in a notebook.

        Args:
            after_seconds: delay before anything is shown; shorter steps show nothing.
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

    def on_progress(self, phase: str, done: int, total: int | None) -> None:
        """Adds progress of a phase."""
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
        finished = total is not None and self._done[phase] >= total
        if first or finished or now - self._line_at > LINE_SECONDS:
            self._line_at = now
            of_total = f"/{total}" if total is not None else ""
            _line(f"{phase}: {self._done[phase]}{of_total}" if done else phase)


@contextmanager
def shown(progress: bool, after_seconds: float) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields a progress callback that displays steps longer than `after_seconds`, or none if `progress` is False."""
    if not progress:
        yield lambda phase, done, total: None
        return
    with FitDisplay(after_seconds) as display:
        yield display.on_progress


class ScoreDisplay:
    """Progress display of a scoring run: shards, images, images/s, bad rows and time left."""

    def __init__(self, shards_done: int, shards_total: int, bytes_left: int) -> None:
        """Starts with the shards committed by earlier runs."""
        self.shards_done, self.shards_total = shards_done, shards_total
        self.images = self.bad = self.flagged = self.bytes_done = 0
        self._bytes_left = bytes_left
        self._started: float | None = None
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

    def scored(self, chunk: "ScoredChunk") -> None:
        """Adds a scored chunk."""
        if self._started is None:
            self._started = time.monotonic() - chunk.facts.seconds
        self.images += chunk.images
        self.bad += chunk.bad
        self.flagged += chunk.flagged
        self._show()

    def committed(self, shard_bytes: int) -> None:
        """Adds a committed shard of `shard_bytes` bytes."""
        self.shards_done += 1
        self.bytes_done += shard_bytes
        self._show()

    def _show(self) -> None:
        if self._live and self._task is not None:
            self._live.update(self._task, completed=self.shards_done, note=self.note())
            return
        now = time.monotonic()
        if self.shards_done == self.shards_total or now - self._line_at > LINE_SECONDS:
            self._line_at = now
            _line(f"shards {self.shards_done}/{self.shards_total}, {self.note()}")

    def rate(self) -> float:
        """Images per second since the first chunk started."""
        if self._started is None:
            return 0.0
        return self.images / max(time.monotonic() - self._started, 1e-3)

    def note(self) -> str:
        """`412 images, 56.1 images/s, 3 bad, 12 flagged, 4 min left`."""
        text = f"{self.images:,} images, {self.rate():.1f} images/s, {self.bad} bad, {self.flagged} flagged"
        if self._started is not None and 0 < self.bytes_done < self._bytes_left:
            elapsed = time.monotonic() - self._started
            text += f", {seconds_text(elapsed * (self._bytes_left / self.bytes_done - 1))} left"
        return text


class _Done(ProgressColumn):
    """`12/40`, or only the count while the total is unknown."""

    _counted = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        """Renders the column."""
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
