"""Scores of held-out normal images: what thresholds, p-values and the heatmap scale come from."""

from collections.abc import Callable, Collection

import numpy as np

from raydetect.artifact_record import Calibration
from raydetect.detectors._base import Detector
from raydetect.errors import RaydetectError
from raydetect.worker.collect import ImageSource
from raydetect.worker.score import score_batches


class CalibrationError(RaydetectError):
    """A held-out normal image has no finite score, so no threshold can be trusted."""


def calibrate(
    detector: Detector,
    images: ImageSource,
    keys: Collection[str] | None,
    batch_size: int,
    tick: Callable[[int], None],
) -> Calibration:
    """Scores the images of `keys` (all when None).

    Raises:
        CalibrationError: no image, or a score that is not finite.
    """
    scores: list[float] = []
    low, high = np.inf, -np.inf
    pixels = (pixels for pairs in images.chunks(keys) for _, pixels in pairs)
    for scored in score_batches(detector, pixels, batch_size):
        scores.append(scored.image_score)
        low = min(low, float(scored.anomaly_map_HW.min()))
        high = max(high, float(scored.anomaly_map_HW.max()))
        tick(1)
    if not scores:
        raise CalibrationError(f"{images.source.uri}: no usable image to calibrate on. Add normal images.")
    if not np.isfinite([*scores, low, high]).all():
        raise CalibrationError(
            "a held-out normal image has a score that is not finite; check the weights and parameters."
        )
    return Calibration(scores=tuple(sorted(scores)), map_low=low, map_high=high)
