"""Limits the number of pixels that a process decodes at a time; threads wait in order of arrival.

All threads of a process share `PIXEL_BUDGET`: scoring, fits, masks, endpoints, reports. A thread holds one reservation
at a time, for one image, so there is no deadlock.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

BYTES_PER_PIXEL = 16  # maximum over all formats, including decoder and resizing
MIN_PIXELS = 1 << 26  # 1 GiB, so that a small source.max_pixels does not serialise decoding


class PixelBudget:
    """A bounded number of pixels being decoded."""

    def __init__(self) -> None:
        """Creates a budget without reservations."""
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._reserved = 0

    @contextmanager
    def reserve(self, pixels: int, max_pixels: int) -> Iterator[None]:
        """Waits until the pixels fit and reserves them; an image larger than the budget is decoded alone.

        Args:
            pixels: number of pixels of the image.
            max_pixels: `max_pixels` of its source; the budget is at least `MIN_PIXELS`.
        """
        budget, ticket = max(max_pixels, MIN_PIXELS), object()

        def is_next() -> bool:
            return self._waiting[0] is ticket and (not self._reserved or self._reserved + pixels <= budget)

        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(is_next)
                self._reserved += pixels
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= pixels
                self._changed.notify_all()


PIXEL_BUDGET = PixelBudget()
