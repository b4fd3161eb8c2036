"""Split-conformal p-values and thresholds from scores of held-out normal images.

Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005), sec. 2; for anomaly detection
Bates et al., "Testing for outliers with conformal p-values", Annals of Statistics 51 (2023), eq. 2.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from raydetect.config import USUAL_LEVEL
from raydetect.errors import SpecError

ROUNDING = 1e-9


def p_values(calibration_M: np.ndarray, scores_N: np.ndarray) -> np.ndarray:
    """(1 + number of calibration scores >= s) / (M + 1) for every score s.

    Under exchangeability a normal image has p <= a with probability at most a.

    Args:
        calibration_M: scores of held-out normal images, ascending.
        scores_N: scores to judge.

    Returns:
        float64 in (0, 1], shape (N,).
    """
    at_least_N = len(calibration_M) - np.searchsorted(calibration_M, scores_N, side="left")
    return (1.0 + at_least_N) / (len(calibration_M) + 1.0)


def p_value(calibration: Sequence[float], score: float) -> float:
    """The same for one score, without arrays; `calibration` is ascending."""
    return (1.0 + len(calibration) - bisect_left(calibration, score)) / (len(calibration) + 1.0)


def required_size(alpha: float) -> int:
    """The smallest number of calibration images for which a p-value can be <= alpha."""
    return max(1, math.ceil((1.0 - ROUNDING) / alpha) - 1)


def usual_level_text(calibrated: int, which: str = "") -> str:
    """Says at which p-value images are flagged by default; "" if it is the usual level.

    Args:
        calibrated: number of images that the detector was calibrated on.
        which: what follows the number of images.
    """
    level = 1.0 / (calibrated + 1)
    if level <= USUAL_LEVEL:
        return ""
    return (
        f"images are flagged at {100 * level:.2g} % by default, not at {100 * USUAL_LEVEL:g} %, for which "
        f"{required_size(USUAL_LEVEL)} normal images are needed to calibrate on; there are {calibrated:,}{which}"
    )


def threshold_for(calibration_M: np.ndarray, alpha: float, setting: str = "flag.alpha") -> float:
    """The threshold t such that a score is >= t exactly when its p-value is <= alpha.

    It is the float just above the (k+1)-th largest calibration score, where k is the number of calibration scores
    that may be at least as large as a flagged one.

    Args:
        calibration_M: scores of held-out normal images, ascending.
        alpha: share of normal images that may be flagged, in (0, 1).
        setting: its name in the job file, for the message.

    Raises:
        SpecError: too few calibration images for this alpha.
    """
    size = len(calibration_M)
    allowed = math.floor(alpha * (size + 1) * (1.0 + ROUNDING)) - 1
    if allowed < 0:
        raise SpecError(
            f"{setting} = {alpha} needs at least {required_size(alpha)} held-out normal images, but the artifact "
            f"has {size}. Raise alpha to {math.ceil(1000 / (size + 1)) / 1000}, calibrate on more images (a fit or "
            "`raydetect calibrate`), or decide by a threshold of scores (flag.threshold)."
        )
    if allowed >= size:
        return -math.inf
    return float(np.nextafter(calibration_M[size - 1 - allowed], np.inf))
