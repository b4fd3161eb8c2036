"""Workers as threads of one process: the collectives of `Group` with a barrier."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from raydetect.blocks.coresets.group import Group

T = TypeVar("T")


class ThreadGroup(Group):
    """A worker that runs as a thread."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        """Shares `slots` and `barrier` with the other workers."""
        self.rank, self.size = rank, size
        self._slots, self._barrier = slots, barrier

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(60)
        found = list(self._slots)
        self._barrier.wait(60)
        return found

    def gather(self, rows_N: Tensor) -> list[Tensor]:
        """See `Group.gather`."""
        return self._exchange(rows_N.clone())

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """See `Group.gather_bytes`."""
        return self._exchange(data)

    def sum(self, values: Tensor) -> Tensor:
        """See `Group.sum`."""
        return torch.stack(self._exchange(values.clone())).sum(0)

    def max(self, values: Tensor) -> Tensor:
        """See `Group.max`."""
        return torch.stack(self._exchange(values.clone())).amax(0)

    def broadcast(self, values: Tensor, root: int) -> Tensor:
        """See `Group.broadcast`."""
        return self._exchange(values.clone())[root].clone()


def together(size: int, work: Callable[[Group], T]) -> list[T]:
    """Runs `work` on `size` workers and returns their results; raises the first error of any worker."""
    slots: list[Any] = [None] * size
    barrier = threading.Barrier(size)

    def run_worker(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, size, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run_worker, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    first = next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), None)
    if first or errors:
        raise first or errors[0]
    return [future.result() for future in futures]
