"""Runs the work of one device on one thread, so that the device stage overlaps with decoding and writing."""

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Submit(Protocol):
    """Runs work, now or later, and returns its future."""

    def __call__(self, work: Callable[[], T], /) -> "Future[T]":
        """Submits the work."""


class DeviceQueue:
    """Runs submitted work one piece at a time, on a thread of its own; online work goes before bulk work.

    A piece that has started is never interrupted. On a CUDA device, a piece of work ends when its kernels are queued,
    so that the next piece does not wait for their results. One thread also means one pool of torch threads on a CPU.

    Attributes:
        device: the device.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Creates an idle queue; its thread starts with the first piece of work."""
        self.device = torch.device(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._waiting: list[tuple[bool, int, Callable[[], Any], Future[Any]]] = []
        self._numbers, self._lock = itertools.count(), threading.Lock()

    def bulk(self, work: Callable[[], T], /) -> "Future[T]":
        """Submits work that waits while online work is queued."""
        return self._submit(work, True)

    def online(self, work: Callable[[], T], /) -> "Future[T]":
        """Submits work that a person or another program is waiting for."""
        return self._submit(work, False)

    def _submit(self, work: Callable[[], T], is_bulk: bool) -> "Future[T]":
        future: Future[T] = Future()
        with self._lock:
            heapq.heappush(self._waiting, (is_bulk, next(self._numbers), work, future))
        self._thread.submit(self._run_next)
        return future

    def _run_next(self) -> None:
        with self._lock:
            _, _, work, future = heapq.heappop(self._waiting)
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            del work  # whoever waits may evict the detector that it holds
            future.set_result(result)


def run_now(work: Callable[[], T], /) -> "Future[T]":
    """Runs the work in this thread."""
    future: Future[T] = Future()
    future.set_result(work())
    return future
