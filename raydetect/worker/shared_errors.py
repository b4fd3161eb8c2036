"""A deliberate error of one worker becomes the error of all, so that none waits for a worker that gave up."""

from collections.abc import Iterator
from contextlib import contextmanager

from raydetect.blocks.group import Group
from raydetect.errors import RaydetectError, error_of, error_text


@contextmanager
def shared_errors(group: Group) -> Iterator[None]:
    """Every worker runs the block; no collective may be inside it.

    Raises:
        RaydetectError: the block of some worker raised it; of several, that of the smallest rank. Its kind and its
            message are the same on all.
    """
    own: RaydetectError | None = None
    try:
        yield
    except RaydetectError as error:
        own = error
    for text in group.gather_bytes(b"" if own is None else error_text(own).encode()):
        if text:
            raise error_of(text.decode()) from own
