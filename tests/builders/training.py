"""One step of a training without a trainer."""

from dataclasses import replace

import torch
from torch import Tensor

from raydetect.detectors._base import Batch, Detector


@torch.no_grad()
def prepared(detector: Detector, batch: Batch) -> Batch:
    """The batch with its prepared images."""
    draws = batch.draws or [0] * len(batch.keys)
    images = zip(batch.images_BCHW, batch.keys, draws, strict=True)
    found = [detector.prepare_image(image_3HW, key, batch.epoch, draw) for image_3HW, key, draw in images]
    return replace(batch, prepared=tuple(torch.stack(parts) for parts in zip(*found, strict=True)))


def loss_of(detector: Detector, batch: Batch) -> Tensor:
    """The loss of a batch."""
    return detector.training_loss(prepared(detector, batch))
