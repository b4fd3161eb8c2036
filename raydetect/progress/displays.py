"""Displays of the progress of fits and scoring runs: live on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
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

from raydetect.progress.activity import ACTIVITY, doing, told
from raydetect.progress.texts import rate_text, seconds_text

if TYPE_CHECKING:
    from raydetect.sinks.scored_chunk import ScoredChunk

LINE_SECONDS = 5.0


@dataclass(slots=True)
class _Phase:
    """One phase of a fit.

    Attributes:
        words: its name and the unit that is counted; `collect images` counts images.
        total: how many there are; None = unknown.
        started: time of the first update.
        before: how many were done then.
        done: how many are done.
    """

    words: str
    total: int | None
    started: float
    before: int
    done: int

    def note(self, now: float) -> str:
        """`35.2 images/s, 6 s left`."""
        unit, elapsed, more = self.words.rpartition(" ")[2], now - self.started, self.done - self.before
        parts = [rate_text(more, elapsed, unit)]
        if self.total is not None and more > 0 and self.done < self.total and elapsed >= 1:
            parts.append(f"{seconds_text(elapsed / more * (self.total - self.done))} left")
        return ", ".join(filter(None, parts))

    def line(self, now: float) -> str:
        """`collect: 16 of 240 images, 35.2 images/s, 6 s left`, or only the words if nothing is counted."""
        if not self.done and self.total is None:
            return self.words
        name, _, unit = self.words.rpartition(" ")
        of_total = f" of {self.total:,}" if self.total is not None else ""
        return ", ".join(filter(None, [f"{name}: {self.done:,}{of_total} {unit}", self.note(now)]))


class FitDisplay:
    """Progress display for the phases of a fit."""

    def __init__(self, after_seconds: float = 0.0) -> None:
        """Uses a live display if standard error is a terminal or the code runs in a notebook with ipywidgets.

        Args:
            after_seconds: delay before anything is shown; shorter steps show nothing.
        """
        self._live = _live() if _can_be_live() else None
        self._shows_at = time.monotonic() + after_seconds
        self._tasks: dict[str, TaskID] = {}
        self._phases: dict[str, _Phase] = {}
        self._latest: _Phase | None = None
        self._line_at = 0.0
        self._open = ExitStack()

    def __enter__(self) -> "FitDisplay":
        began = time.monotonic()
        self._open.enter_context(doing(lambda: self._step(began)))
        return self

    def _step(self, began: float) -> tuple[str, float]:
        phase = self._latest
        return ("preparing", began) if phase is None else (phase.line(time.monotonic()), phase.started)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open.close()

    def on_progress(self, phase: str, done: int, total: int | None) -> None:
        """Adds progress of a phase, whose last word is the unit that is counted."""
        now = time.monotonic()
        first = phase not in self._phases
        if first:
            self._phases[phase] = _Phase(phase, total, now, done, 0)
        self._latest = latest = self._phases[phase]
        latest.done += done
        if self._live:
            self._show_live(self._live, latest, now)
            return
        if now < self._shows_at:
            return
        finished = latest.total is not None and latest.done >= latest.total
        if first or finished or now - self._line_at > LINE_SECONDS:
            self._line_at = now
            ACTIVITY.line(latest.line(now))

    def _show_live(self, live: Progress, phase: _Phase, now: float) -> None:
        if phase.words not in self._tasks:
            self._tasks[phase.words] = live.add_task(phase.words, total=phase.total, note="")
        live.update(self._tasks[phase.words], completed=phase.done, note=phase.note(now))
        if now >= self._shows_at and not live.live.is_started:
            self._open.enter_context(_alone(live))


@contextmanager
def shown(progress: bool, after_seconds: float) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields a progress callback that displays steps longer than `after_seconds`, or none if `progress` is False."""
    if not progress:
        yield lambda phase, done, total: None
        return
    with told("preparing"), FitDisplay(after_seconds) as display:
        yield display.on_progress


@contextmanager
def _alone(live: Progress) -> Iterator[None]:
    """Shows a live display, which shows by itself that something is going on."""
    ACTIVITY.is_live = True
    try:
        with live:
            yield
    finally:
        ACTIVITY.is_live = False


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
        self._open = ExitStack()

    def __enter__(self) -> "ScoreDisplay":
        if self._live:
            self._open.enter_context(_alone(self._live))
            self._task = self._live.add_task(
                "shards", total=self.shards_total, completed=self.shards_done, note="starting workers"
            )
        began = time.monotonic()
        self._open.enter_context(doing(lambda: (self._text(), self._started or began)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open.close()

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
            ACTIVITY.line(self._text())

    def _text(self) -> str:
        if self._started is None:
            return "starting workers and loading the detector"
        return f"{self.shards_done:,} of {self.shards_total:,} shards, {self.note()}"

    def note(self) -> str:
        """`412 images, 56.1 images/s, 3 bad, 12 flagged, 4 min left`."""
        elapsed = 0.0 if self._started is None else time.monotonic() - self._started
        parts = [f"{self.images:,} images", rate_text(self.images, elapsed, "images")]
        parts += [f"{self.bad:,} bad", f"{self.flagged:,} flagged"]
        if 0 < self.bytes_done < self._bytes_left and elapsed:
            parts.append(f"{seconds_text(elapsed * (self._bytes_left / self.bytes_done - 1))} left")
        return ", ".join(filter(None, parts))


class _Done(ProgressColumn):
    """`12/40`, or only the count while the total is unknown."""

    _counted = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        """Renders the column."""
        return self._counted.render(task) if task.total is not None else Text(f"{int(task.completed)}")


def _can_be_live() -> bool:
    """Whether standard error is a terminal, or the code runs in a notebook with widgets."""
    if Console(stderr=True).is_jupyter:
        return find_spec("ipywidgets") is not None
    return sys.stderr.isatty()


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
