"""How many pixels a process decodes at a time: whoever decodes waits for space, first come first served.

One `SPACE` serves all threads of a process, whatever they decode for: scoring, a fit, masks, endpoints, reports. A
decoder takes space once, for one image, and takes no more until it has given that back, so nobody waits for each other.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

BYTES_PER_PIXEL = 16  # at most, of every format that is read, from its decoder to the resized picture
LEAST_PIXELS = 1 << 26  # 1 GiB, so that a small source.max_pixels does not make decoders wait for each other


class PixelBudget:
    """Pixels in flight, bounded."""

    def __init__(self) -> None:
        """All of it is free."""
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._taken = 0

    @contextmanager
    def taken(self, pixels: int, max_pixels: int) -> Iterator[None]:
        """Waits until so many pixels fit in, and holds them; one image that never fits goes alone.

        Args:
            pixels: of the image.
            max_pixels: of the image's source: with less than LEAST_PIXELS, that many may be in flight.
        """
        room, turn = max(max_pixels, LEAST_PIXELS), object()

        def is_next() -> bool:
            return self._waiting[0] is turn and (not self._taken or self._taken + pixels <= room)

        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(is_next)
                self._taken += pixels
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


SPACE = PixelBudget()
