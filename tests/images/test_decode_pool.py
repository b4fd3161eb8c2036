"""Which threads decode images."""

import threading
import time
from collections.abc import Iterator

import pytest

from raydetect.images.decode import TINY_BYTES, DecodePool
from raydetect.records import Member


def members(sizes: list[int]) -> list[Member]:
    """Members with so many bytes each."""
    return [Member(f"{i}", "", data=bytes(size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "threads"), [([100] * 64, 1), ([2 * TINY_BYTES] * 64, 3), ([0, 3 * TINY_BYTES] * 9, 3)]
)
def test_tiny_images_are_decoded_by_one_thread(sizes: list[int], threads: int) -> None:
    seen = set[str]()
    many_at_once = threading.Barrier(threads)

    def decode(member: Member) -> Iterator[str]:
        if len(seen) < threads:
            seen.add(threading.current_thread().name)
            many_at_once.wait(20)
        yield from (member.key, f"{member.key} again")

    with DecodePool(3) as pool:
        given = members(sizes)
        found = list(pool.map_members(decode, given))
    assert found == [name for member in given for name in (member.key, f"{member.key} again")]
    assert len(seen) == threads


def test_the_pool_ends_with_all_its_threads() -> None:
    before = set(threading.enumerate())
    with DecodePool(2) as pool:
        assert len(list(pool.map_members(lambda member: [time.sleep(0.01)], members([1, 1])))) == 2
        assert len(list(pool.map_members(lambda member: [time.sleep(0.01)], members([10_000] * 9)))) == 9
    assert set(threading.enumerate()) == before


def test_the_first_error_is_raised() -> None:
    def decode(member: Member) -> list[int]:
        return [1 // len(member.data)]

    with DecodePool(2) as pool, pytest.raises(ZeroDivisionError):
        list(pool.map_members(decode, members([1, 0, 1])))
