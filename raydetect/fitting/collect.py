"""Collects keyed rows: one forward pass of the detector over each image of a worker."""

from collections.abc import Callable

import numpy as np
import torch

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import PAD_KEY, FitState
from raydetect.detectors._base import Batch, Detector
from raydetect.fitting.image_cache import ImageCache


def collect(
    detector: Detector,
    cache: ImageCache,
    keys: list[str],
    batch_size: int,
    group: Group,
    max_bytes: int,
    on_progress: Callable[[int], None],
) -> FitState:
    """Collects the rows of the images in `keys` on this worker.

    Every forward pass has exactly `batch_size` images (zero-padded), so an image gives the same rows for any number
    of workers.
    """
    state = FitState(group, max_bytes)
    for start in range(0, len(keys), batch_size):
        part = keys[start : start + batch_size]
        images_BHWC = np.zeros((batch_size, *cache.shape), dtype=np.uint8)
        images_BHWC[: len(part)] = cache.pixels(part)
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).to(detector.device)
        padded = [*part, *[PAD_KEY] * (batch_size - len(part))]
        with torch.inference_mode():
            state.add(padded, detector.collect(Batch(images_BCHW, padded)))
        on_progress(len(part))
    return state
