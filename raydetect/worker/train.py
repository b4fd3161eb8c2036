"""Training a gradient detector in one process: images decoded once to disk, order keyed by seed and epoch."""

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raydetect.blocks.seeding import shuffled
from raydetect.detectors._base import Batch, Detector
from raydetect.errors import RaydetectError
from raydetect.worker.collect import ImageSource


class TrainingDiverged(RaydetectError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, slots=True)
class ImageCache:
    """Decoded training images in a file, so that every epoch can read them in its own order.

    Attributes:
        images_NHWC: uint8, memory-mapped.
        rows: row of every key.
        labels: label of every key, None unknown.
    """

    images_NHWC: np.ndarray
    rows: dict[str, int]
    labels: dict[str, int | None]

    def batch(self, keys: list[str], epoch: int, device: torch.device) -> Batch:
        """The images of `keys`, in that order."""
        images_BHWC = self.images_NHWC[[self.rows[key] for key in keys]]
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).to(device)
        labels = [self.labels[key] or 0 for key in keys]
        return Batch(images_BCHW, keys, labels=labels, epoch=epoch)


def fill_cache(images: ImageSource, keys: Collection[str], folder: Path, tick: Callable[[int], None]) -> ImageCache:
    """Decodes the images of `keys` once into one file below `folder`."""
    shape = (len(keys), *images.image_size, 3)
    pixels_NHWC = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    rows: dict[str, int] = {}
    labels: dict[str, int | None] = {}
    for pairs in images.chunks(keys):
        for member, pixels in pairs:
            if pixels.image_HWC is not None and member.key not in rows:
                pixels_NHWC[len(rows)] = pixels.image_HWC
                labels[member.key] = member.label
                rows[member.key] = len(rows)
        tick(len(pairs))
    return ImageCache(pixels_NHWC, rows, labels)


def train(
    detector: Detector,
    images: ImageSource,
    keys: Collection[str],
    tick_read: Callable[[int], None],
    tick_epoch: Callable[[int], None],
) -> list[float]:
    """Trains to the end and returns the mean loss of every epoch.

    Args:
        detector: with weights loaded.
        images: the source.
        keys: images to train on.
        tick_read: told how many images were decoded.
        tick_epoch: told of every epoch that is done.

    Raises:
        TrainingDiverged: a loss is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="raydetect-") as folder:
        cache = fill_cache(images, keys, Path(folder), tick_read)
        plan = detector.begin_training(len(cache.rows))
        losses = []
        for epoch in range(plan.epochs):
            order = shuffled(list(cache.rows), detector.seed, epoch)
            losses.append(_epoch(detector, cache, order, epoch, plan.optimizer, plan.batch_size, plan.drop_last))
            if plan.scheduler is not None:
                plan.scheduler.step()
            tick_epoch(1)
    detector.end_training()
    return losses


def _epoch(
    detector: Detector,
    cache: ImageCache,
    order: list[str],
    epoch: int,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    drop_last: bool,
) -> float:
    total = 0.0
    steps = max(1, len(order) // batch_size) if drop_last else -(-len(order) // batch_size)
    for step in range(steps):
        batch = cache.batch(order[step * batch_size : (step + 1) * batch_size], epoch, detector.device)
        loss = detector.training_loss(batch)
        value = loss.item()
        if not np.isfinite(value):
            raise TrainingDiverged(
                f"the loss became {value} in epoch {epoch + 1}. Lower the learning rate or check the images."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += value
    return total / steps
