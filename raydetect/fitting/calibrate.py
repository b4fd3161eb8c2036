"""Scores held-out normal images: p-values, the thresholds of images and pixels and the heatmap scale follow.

All images set them together, or those of each category its own.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from raydetect.artifacts.record import Calibration
from raydetect.blocks.coresets.group import Group
from raydetect.detectors._base import Detector
from raydetect.detectors._ensemble import localises
from raydetect.errors import RaydetectError
from raydetect.fitting.image_cache import ImageCache
from raydetect.scoring.batches import score_batches


class CalibrationError(RaydetectError):
    """A held-out normal image has no finite score, so no threshold can be trusted."""


def calibrate(
    detector: Detector,
    cache: ImageCache,
    rounds: Iterable[list[str]],
    batch_size: int,
    group: Group,
    on_progress: Callable[[int], None],
) -> Calibration:
    """Scores images on every worker and gathers all scores, and the extremes of every map.

    Args:
        detector: fitted detector, or one that each round fits anew before it yields its images.
        cache: this worker's images.
        rounds: keys of images that the detector has not seen.
        batch_size: images in one forward pass.
        group: the workers.
        on_progress: called with the number of images scored since the last call.

    Raises:
        CalibrationError: there are no images, or a score is not finite.
    """
    return calibrate_each(detector, cache, rounds, batch_size, group, on_progress, ())[None]


def calibrate_each(
    detector: Detector,
    cache: ImageCache,
    rounds: Iterable[list[str]],
    batch_size: int,
    group: Group,
    on_progress: Callable[[int], None],
    categories: Sequence[str],
) -> dict[str | None, Calibration]:
    """As `calibrate`, for each category by its own images; they may share a batch, on which no score depends.

    Args:
        detector: see `calibrate`, as for the others.
        cache: likewise.
        rounds: likewise; every image has one of the categories.
        batch_size: likewise.
        group: likewise.
        on_progress: likewise.
        categories: names; none = all images together, under None.

    Raises:
        CalibrationError: a category has no images, or a score is not finite.
    """
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(categories or (None,))}
    category = cache.categories() if categories else {}
    scored_M4: list[tuple[float, float, float, float]] = []  # image score, highest and lowest pixel, category
    for keys in rounds:
        for scored in score_batches(detector, cache.decoded(keys), batch_size):
            map_HW = scored.anomaly_map()
            low = float(np.nanmin(map_HW)) if scored.is_finite else math.inf
            number = numbers[category.get(keys[scored.position])]
            scored_M4.append((scored.image_score, float(np.nanmax(map_HW)), low, number))
            on_progress(1)
    gathered_M4 = torch.cat(group.gather(torch.tensor(scored_M4, dtype=torch.float64).reshape(-1, 4)))
    found = {}
    for name, number in numbers.items():
        of = "" if name is None else f"category {name!r}: "
        mine_M3 = gathered_M4[gathered_M4[:, 3] == number, :3]
        if not len(mine_M3):
            raise CalibrationError(f"{of}there is no usable image to calibrate on. Add normal images.")
        if not torch.isfinite(mine_M3).all():
            raise CalibrationError(
                f"{of}a held-out normal image has a score that is not finite; check the weights and parameters."
            )
        found[name] = _calibration(mine_M3, localises(detector))
    return found


def _calibration(scored_M3: torch.Tensor, has_peaks: bool) -> Calibration:
    """From image score, highest and lowest pixel of each image."""
    scores, peaks, lows = scored_M3.sort(dim=0).values.T.tolist()
    return Calibration(
        scores=tuple(scores), map_low=lows[0], map_high=peaks[-1], map_peaks=tuple(peaks) if has_peaks else ()
    )
