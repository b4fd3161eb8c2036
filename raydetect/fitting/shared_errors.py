"""Raises one worker's error on all workers, so that the others do not wait for a worker that has stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

from raydetect.blocks.coresets.group import Group
from raydetect.errors import RaydetectError, error_of, error_text


@contextmanager
def shared_errors(group: Group) -> Iterator[None]:
    """Runs the block on every worker and raises any worker's error on all; the block must contain no collective.

    Raises:
        RaydetectError: the block raised it on some worker; if on several, the error of the smallest rank. Type and
            message are the same on all workers.
    """
    own: RaydetectError | None = None
    try:
        yield
    except RaydetectError as error:
        own = error
    for text in group.gather_bytes(b"" if own is None else error_text(own).encode()):
        if text:
            raise error_of(text.decode()) from own
