"""The decision rule of a calibration: p-values, threshold and flags of image scores."""

import math

import numpy as np

from raydetect.artifacts.record import Calibration
from raydetect.config import FlagSpec
from raydetect.metrics.conformal import p_value, threshold_for


class DecisionRule:
    """Computes p-values, threshold and flags of image scores for one calibration and one flag rule."""

    def __init__(self, flag: FlagSpec, calibration: Calibration) -> None:
        """Computes the threshold.

        Raises:
            SpecError: the calibration is too small for `flag.alpha`.
        """
        self._scores = calibration.scores
        self._is_deferred = flag.fdr is not None or flag.nothing
        smallest_p = flag.smallest_p(len(self._scores))
        if smallest_p is None:
            self._threshold = math.inf if flag.threshold is None else flag.threshold
        else:
            self._threshold = threshold_for(np.asarray(self._scores), smallest_p[1], smallest_p[0])

    @property
    def threshold(self) -> float | None:
        """The lowest score that is flagged; None if rows are not flagged one by one (`fdr`, `flag: none`)."""
        return None if self._is_deferred else self._threshold

    def of(self, image_score: float) -> tuple[float, bool | None]:
        """(p-value, flagged) of one image score; flagged is None if it depends on the whole archive, or on nothing."""
        p = p_value(self._scores, image_score)
        return p, None if self._is_deferred else self.may_flag(image_score)

    def may_flag(self, image_score: float) -> bool:
        """Whether an image is flagged or, with `fdr`, may be: a p-value above the level is never flagged.

        With `flag: none`, no image is.
        """
        return image_score >= self._threshold
