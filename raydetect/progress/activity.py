"""Says what is being done whenever a command has printed nothing for a while, so that nobody takes it for dead."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENT_SECONDS = 4.0
TICK_SECONDS = 0.5
Step = Callable[[], tuple[str, float]]
"""What is being done, and the time since when, by `time.monotonic`."""


class _Activity:
    """The steps that are under way, innermost last, and when something was printed."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.printed = 0.0
        self.is_live = False
        self.listeners = 0

    def line(self, text: str) -> None:
        """Prints a line of progress."""
        self.printed = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def remind(self) -> None:
        """Prints the innermost step if nothing was printed for some seconds."""
        now = time.monotonic()
        steps = list(self.steps)
        if not steps or self.is_live or now - self.printed < SILENT_SECONDS:
            return
        text, since = steps[-1]()
        self.line(f"{text} ... {now - since:.0f} s")


ACTIVITY = _Activity()


@contextmanager
def doing(step: str | Step) -> Iterator[None]:
    """Names a step for the duration of the block.

    Args:
        step: what is being done, such as `Listing the images`, or a function that says it and since when.
    """
    began = time.monotonic()
    entry: Step = step if callable(step) else lambda: (step, began)
    ACTIVITY.steps.append(entry)
    try:
        yield
    finally:
        ACTIVITY.steps.remove(entry)


@contextmanager
def told(step: str) -> Iterator[None]:
    """Says the current step, `step` if no other is named, whenever nothing else was printed for some seconds."""
    ended = threading.Event()
    ACTIVITY.printed = time.monotonic()

    def remind() -> None:
        while not ended.wait(TICK_SECONDS):
            ACTIVITY.remind()

    thread = threading.Thread(target=remind, name="progress", daemon=True)
    with doing(step):
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
