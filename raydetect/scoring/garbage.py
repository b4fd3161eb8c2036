"""Keeps Python's garbage collector from stopping a process that scores.

A full collection visits every object that imports have made, about half a million of them, and no thread runs
meanwhile: 0.2 s in which a device has nothing to do. What is loaded before scoring begins stays anyway.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def spare_what_is_loaded() -> None:
    """Leaves all objects that are in use now out of further collections; for a process that scores until it ends."""
    gc.collect()
    gc.freeze()


@contextmanager
def loaded_is_spared() -> Iterator[None]:
    """The same for the time of a block."""
    spare_what_is_loaded()
    try:
        yield
    finally:
        gc.unfreeze()
