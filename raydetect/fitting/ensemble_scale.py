"""Puts the members of an ensemble on a common scale, from some of the held-out normal images.

These images do not set the threshold as well: the score of an image that set the scale is not exchangeable with the
score of a new one, and p-values would no longer be valid.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from raydetect.blocks.coresets.group import Group
from raydetect.detectors._base import Detector
from raydetect.detectors._ensemble import Ensemble, Scale
from raydetect.errors import SpecError
from raydetect.fitting.calibrate import CalibrationError
from raydetect.fitting.holdout import choose_images
from raydetect.fitting.image_cache import ImageCache
from raydetect.scoring.batches import score_batches

MOST_IMAGES, LEAST_IMAGES = 64, 2  # a median of 64 has a standard error of a sixth of a deviation


def scaling_size(held_out: int) -> int:
    """Number of held-out images that set the scale: at most half of them."""
    return min(MOST_IMAGES, held_out // 2)


def choose_scaling(keys: list[str], seed: int, group: Group) -> tuple[list[str], list[str]]:
    """Splits this worker's held-out images into (those that set the scale, those that set the threshold).

    The split is by keyed hash: at most half of all workers' images and at most `MOST_IMAGES` set the scale.

    Raises:
        SpecError: there are too few held-out images.
    """
    total = int(group.sum(torch.tensor([len(keys)]))[0])
    count = scaling_size(total)
    if count < LEAST_IMAGES:
        raise SpecError(
            f"an ensemble needs at least {2 * LEAST_IMAGES} held-out normal images, some to scale its members and "
            f"others to set the threshold; there are {total}. Add images or raise holdout_ratio."
        )
    chosen = set(choose_images(keys, count, seed, group, "scale"))
    return sorted(chosen), [key for key in keys if key not in chosen]


def set_scales(
    ensemble: Ensemble,
    cache: ImageCache,
    keys: list[str],
    batch_size: int,
    group: Group,
    on_progress: Callable[[int], None],
) -> None:
    """Sets each member's scale from its scores of the images in `keys` on all workers.

    Raises:
        CalibrationError: a member's score is not finite, or is the same for all images.
    """
    scales = []
    for spec, member in zip(ensemble.params.members, ensemble.members, strict=True):
        measured_M3 = torch.cat(
            group.gather(_measure(member, cache, keys, batch_size, ensemble.scores_by_map, on_progress))
        )
        if not torch.isfinite(measured_M3).all():
            raise CalibrationError(f"{spec.name}: a held-out normal image has a score that is not finite.")
        scale = Scale.of(measured_M3)
        if scale.spread <= 0 or (member.info.localises and scale.map_spread <= 0):
            raise CalibrationError(
                f"{spec.name}: scores all held-out normal images the same, so its scale is undefined. Remove it from "
                "the ensemble, or add normal images that differ."
            )
        scales.append(scale)
    ensemble.scales = tuple(scales)


def _measure(
    member: Detector,
    cache: ImageCache,
    keys: list[str],
    batch_size: int,
    by_map: bool,
    on_progress: Callable[[int], None],
) -> torch.Tensor:
    """Image score, median and maximum of the anomaly map for every image, (M, 3) float64."""
    rows = []
    for scored in score_batches(member, cache.decoded(keys), batch_size, by_map=by_map):
        map_HW = scored.anomaly_map()
        middle, highest = (np.nanmedian(map_HW), np.nanmax(map_HW)) if scored.is_finite else (math.nan, math.nan)
        rows.append((scored.image_score, float(middle), float(highest)))
        on_progress(1)
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
