"""Puts the members of an ensemble on a common scale, by some of the held-out normal images.

They are other images than those that set the threshold: a score that was scaled by an image is not exchangeable with
the score of a new one, and p-values would no longer be honest.
"""

from collections.abc import Callable

import numpy as np
import torch

from raydetect.blocks.group import Group
from raydetect.detectors._base import Detector
from raydetect.detectors._ensemble import Ensemble, Scale
from raydetect.errors import SpecError
from raydetect.worker.cache import ImageCache
from raydetect.worker.calibrate import CalibrationError
from raydetect.worker.holdout import choose_images
from raydetect.worker.preprocess import Pixels
from raydetect.worker.score import score_batches

MOST_IMAGES, LEAST_IMAGES = 64, 2  # a median over 64 images is within a sixth of a deviation


def choose_scaling(keys: list[str], seed: int, group: Group) -> tuple[list[str], list[str]]:
    """(those that set the scale, those that set the threshold) among this worker's held-out images.

    By keyed hash: at most half of all workers' images and at most `MOST_IMAGES` set the scale.

    Raises:
        SpecError: there are too few.
    """
    total = int(group.sum(torch.tensor([len(keys)]))[0])
    count = min(MOST_IMAGES, total // 2)
    if count < LEAST_IMAGES:
        raise SpecError(
            f"an ensemble needs at least {2 * LEAST_IMAGES} held-out normal images, some for the scale of its members "
            f"and others for the threshold; there are {total}. Add images or raise holdout_ratio."
        )
    chosen = set(choose_images(keys, count, seed, group, "scale"))
    return sorted(chosen), [key for key in keys if key not in chosen]


def set_scales(
    ensemble: Ensemble, cache: ImageCache, keys: list[str], batch_size: int, group: Group, tick: Callable[[int], None]
) -> None:
    """Every member scores the images of `keys` on every worker; the scores of all make its scale.

    Raises:
        CalibrationError: a member's score is not finite, or the same for all images.
    """
    scales = []
    for spec, member in zip(ensemble.params.members, ensemble.members, strict=True):
        measured_M3 = torch.cat(group.gather(_measure(member, cache, keys, batch_size, tick)))
        if not torch.isfinite(measured_M3).all():
            raise CalibrationError(f"{spec.name}: a held-out normal image has a score that is not finite.")
        scale = Scale.of(measured_M3)
        if scale.spread <= 0 or (member.info.localises and scale.map_spread <= 0):
            raise CalibrationError(
                f"{spec.name}: scores all held-out normal images alike, so nothing tells its scale. Leave it out of "
                "the ensemble, or add normal images that differ."
            )
        scales.append(scale)
    ensemble.scales = tuple(scales)


def _measure(
    member: Detector, cache: ImageCache, keys: list[str], batch_size: int, tick: Callable[[int], None]
) -> torch.Tensor:
    """Image score, median pixel and highest pixel of every image, (M, 3) float64."""
    pixels = (Pixels(cache.pixels([key])[0]) for key in keys)
    rows = []
    for scored in score_batches(member, pixels, batch_size):
        rows.append((scored.image_score, float(np.median(scored.anomaly_map_HW)), float(scored.anomaly_map_HW.max())))
        tick(1)
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
