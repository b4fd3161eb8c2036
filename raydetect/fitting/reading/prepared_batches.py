"""Batches of a training, each read and prepared on threads of the CPU while the device takes the step before.

An image is prepared alone, from its key, epoch and draw, so what a batch holds depends on no number of threads.
"""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from raydetect.detectors._base import Batch, Detector
from raydetect.fitting.image_cache import ImageCache


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's share of a global batch.

    Attributes:
        epoch: 0-based.
        number: of the batch in its epoch, from 0.
        batches: number of batches of the epoch.
        ratio: images of this worker over all images of the batch.
        keys: images of this worker.
        draws: see `Batch.draws`.
    """

    epoch: int
    number: int
    batches: int
    ratio: float
    keys: list[str]
    draws: list[int]


@contextmanager
def cpu_threads() -> Iterator[Executor]:
    """As many threads as torch has for one operation; here, each operation has one, so that they do not compete."""
    count = torch.get_num_threads()
    all_started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # takes over the process's number, which would else happen at the first operation
        torch.set_num_threads(1)
        all_started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="prepare", initializer=start)
    try:
        for _ in range(count):
            pool.submit(int)
        all_started.wait()
        torch.set_num_threads(count)  # the threads' own number is also that of any later thread
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def prepared_batches(
    detector: Detector, cache: ImageCache, shares: Iterable[Share], pool: Executor
) -> Iterator[tuple[Share, Batch]]:
    """Yields every share with its batch on the detector's device; the next one is being prepared meanwhile.

    Raises what `Detector.prepare_image` raises, when the turn of its batch comes.
    """
    coming: tuple[Share, Future[Batch]] | None = None
    for share in shares:
        started = share, _start(detector, cache, share, pool)
        if coming is not None:
            yield coming[0], _sent(coming[1].result(), detector.device)
        coming = started
    if coming is not None:
        yield coming[0], _sent(coming[1].result(), detector.device)


def _start(detector: Detector, cache: ImageCache, share: Share, pool: Executor) -> Future[Batch]:
    @torch.no_grad()
    def prepare(image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        return detector.prepare_image(image_3HW, key, epoch, draw)

    batch = cache.batch(share.keys, torch.device("cpu"), share.epoch, share.draws)
    images = pool.map(prepare, batch.images_BCHW, batch.keys, repeat(batch.epoch), batch.draws)
    return pool.submit(
        _whole, batch, images, detector.device.type == "cuda"
    )  # after its images, so it never blocks them


def _whole(batch: Batch, images: Iterable[tuple[Tensor, ...]], pinned: bool) -> Batch:
    prepared = tuple(torch.stack(parts) for parts in zip(*images, strict=True))
    return replace(batch, prepared=tuple(part.pin_memory() for part in prepared) if pinned else prepared)


def _sent(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; what was prepared is sent without waiting for the work that the device still has."""
    masks_BHW = None if batch.masks_BHW is None else batch.masks_BHW.to(device)
    prepared = tuple(part.to(device, non_blocking=True) for part in batch.prepared)
    return replace(batch, images_BCHW=batch.images_BCHW.to(device), masks_BHW=masks_BHW, prepared=prepared)
