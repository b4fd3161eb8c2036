"""Selects the images to flag in a whole archive: Benjamini-Hochberg on a histogram of conformal p-values.

The threshold is the largest p-value t with t <= level * (images at or below t) / images; images at or below it are
flagged. Conformal p-values of one calibration are positively dependent (PRDS), as the proof requires, so the expected
share of normal images among the flagged ones is at most the level times the share of normal images, where the
expectation includes the draw of the calibration images. A calibration of M scores gives M + 1 different p-values, so
the histogram is exact.

Source: Benjamini and Hochberg, "Controlling the false discovery rate", JRSS B 57 (1995); Bates et al., "Testing for
outliers with conformal p-values", Annals of Statistics 51 (2023), theorem 2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Discovery:
    """The images flagged in an archive, and the estimate behind it.

    Attributes:
        level: allowed expected share of normal images among the flagged ones (false discovery rate).
        tested: number of images with a p-value.
        p_threshold: images with a p-value of at most this are flagged; None = no image is flagged.
        flagged: number of flagged images.
        expected_false: `tested * p_threshold`, the expected number of images at or below the threshold if all were
            normal. Divided by `flagged` it is at most the level.
        needed_held_out: if no image is flagged although some have the smallest p-value of all possible ones, the number
            of held-out images with which these would be; 0 otherwise, since a larger calibration lowers no other.
    """

    level: float
    tested: int
    p_threshold: float | None
    flagged: int
    expected_false: float
    needed_held_out: int = 0

    @property
    def false_share(self) -> float:
        """The estimated false discovery rate, which the procedure keeps at or below the level."""
        return self.expected_false / self.flagged if self.flagged else 0.0


def discover(counts: Mapping[float, int], level: float, held_out: int) -> Discovery:
    """Applies the Benjamini-Hochberg procedure.

    Args:
        counts: number of images by p-value.
        level: in (0, 1).
        held_out: number of held-out images; for several calibrations that of the largest, as only its smallest p-value
            is certain to be above all of its scores.
    """
    tested = sum(counts.values())
    seen, flagged, threshold = 0, 0, None
    for p_value in sorted(counts):
        seen += counts[p_value]
        if p_value * tested <= level * seen * (1.0 + ROUNDING):
            threshold, flagged = p_value, seen
    if threshold is not None:
        return Discovery(level, tested, threshold, flagged, threshold * tested)
    needed = 0
    if counts and min(counts) * (held_out + 1) <= 1.0 + ROUNDING:
        at_best = counts[min(counts)]
        needed = math.ceil(tested / (level * at_best) * (1.0 - ROUNDING)) - 1
    return Discovery(level, tested, None, 0, 0.0, needed)
