"""Collects keyed rows: one forward pass of the detector over each image of a worker."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import PAD_KEY, FitState
from raydetect.detectors._base import Batch, Detector, PatchGrid
from raydetect.fitting.image_cache import ImageCache


def collect(
    detector: Detector,
    cache: ImageCache,
    keys: list[str],
    batch_size: int,
    group: Group,
    max_bytes: int,
    on_progress: Callable[[int], None],
    all_patches: bool = False,
) -> FitState:
    """Collects the rows of the images in `keys` on this worker.

    Every forward pass has exactly `batch_size` images (zero-padded), so an image gives the same rows for any number
    of workers. Patches that no looked-at pixel depends on are left out, unless `all_patches`: members of an ensemble
    need them if its image scores do not come from maps.
    """
    state, kept = FitState(group, max_bytes), _kept_patches(detector, cache, all_patches)
    for part, batch in padded_batches(cache, keys, batch_size, detector.device):
        with torch.inference_mode():
            state.add(batch.keys, detector.collect(batch), kept(part))
        on_progress(len(part))
    return state


def padded_batches(
    cache: ImageCache, keys: list[str], batch_size: int, device: torch.device
) -> Iterator[tuple[list[str], Batch]]:
    """Yields the keys of a batch, and the batch, padded with zeros and PAD_KEY to `batch_size` images."""
    for start in range(0, len(keys), batch_size):
        part = keys[start : start + batch_size]
        images_BHWC = np.zeros((batch_size, *cache.shape), dtype=np.uint8)
        images_BHWC[: len(part)] = cache.pixels(part)
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).to(device)
        yield part, Batch(images_BCHW, [*part, *[PAD_KEY] * (batch_size - len(part))])


def _kept_patches(
    detector: Detector, cache: ImageCache, all_patches: bool
) -> Callable[[list[str]], Mapping[str, Tensor]]:
    """Returns the rows to keep of inputs, by name, bool (B, R).

    These are the patches that have, within the reach of their score, a pixel that is looked at.
    """
    if all_patches or not cache.preprocess.view.ignores:
        return lambda keys: {}
    grids = detector.patch_grids()

    def kept(keys: list[str]) -> Mapping[str, Tensor]:
        looked_BHW = torch.from_numpy(cache.looked(keys)).float()
        return {name: near_patches(looked_BHW, grid) for name, grid in grids.items()}

    return kept


def near_patches(looked_BHW: Tensor, grid: PatchGrid) -> Tensor:
    """Patches with a pixel that is looked at within the reach of their score, bool (B, R).

    Args:
        looked_BHW: float32, 1 = looked at.
        grid: R = height * width patches, row by row.
    """
    around = 2 * grid.reach_px + 1
    reached_BHW = F.max_pool2d(looked_BHW, (1, around), 1, (0, grid.reach_px))
    reached_BHW = F.max_pool2d(reached_BHW, (around, 1), 1, (grid.reach_px, 0))
    return F.adaptive_max_pool2d(reached_BHW, (grid.height, grid.width)).flatten(1) > 0
