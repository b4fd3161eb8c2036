"""Garbage collections while a process scores."""

import gc
import weakref

from raydetect.scoring.garbage import loaded_is_spared


class Node:
    """An object in a cycle."""

    def __init__(self) -> None:
        """Refers to itself."""
        self.me = self


def test_what_was_loaded_is_left_out_and_what_comes_later_is_not() -> None:
    gc.collect()
    seen = len(gc.get_objects())
    with loaded_is_spared():
        assert gc.get_freeze_count() > 0.99 * seen  # a collection stops tracking a few that hold only plain values
        assert len(gc.get_objects()) < seen / 10  # all that a collection visits
        later = weakref.ref(Node())
        gc.collect()
        assert later() is None
    assert gc.get_freeze_count() == 0


def test_what_becomes_garbage_meanwhile_is_collected_afterwards() -> None:
    node = Node()
    found = weakref.ref(node)
    with loaded_is_spared():
        del node
        gc.collect()
        assert found() is not None
    gc.collect()
    assert found() is None
