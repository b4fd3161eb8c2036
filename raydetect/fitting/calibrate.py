"""Scores held-out normal images: p-values, the thresholds of images and pixels and the heatmap scale follow."""

from collections.abc import Callable, Iterable

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
    """Scores images on every worker and gathers all scores, and the highest pixel of every map.

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
    scored_M2: list[tuple[float, float]] = []  # image score, highest pixel
    ends = torch.full((2,), -torch.inf, dtype=torch.float64)  # (-minimum, maximum) of all maps
    for keys in rounds:
        for scored in score_batches(detector, cache.decoded(keys), batch_size):
            map_HW = scored.anomaly_map()
            here = torch.tensor([-float(np.nanmin(map_HW)), float(np.nanmax(map_HW))])
            scored_M2.append((scored.image_score, float(here[1])))
            ends = torch.maximum(ends, here.double()) if scored.is_finite else torch.full_like(ends, torch.inf)
            on_progress(1)
    gathered_M2 = torch.cat(group.gather(torch.tensor(scored_M2, dtype=torch.float64).reshape(-1, 2)))
    ends = group.max(ends)
    if not len(gathered_M2):
        raise CalibrationError("there is no usable image to calibrate on. Add normal images.")
    if not (torch.isfinite(gathered_M2).all() and torch.isfinite(ends).all()):
        raise CalibrationError(
            "a held-out normal image has a score that is not finite; check the weights and parameters."
        )
    low, high = -float(ends[0]), float(ends[1])
    scores, peaks = gathered_M2.sort(dim=0).values.T.tolist()
    return Calibration(
        scores=tuple(scores), map_low=low, map_high=high, map_peaks=tuple(peaks) if localises(detector) else ()
    )
