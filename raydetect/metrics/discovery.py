"""Benjamini-Hochberg on conformal p-values, from a histogram of them: which images to flag in a whole archive.

The largest p-value t with t <= level * (images at or below t) / images is the threshold; images at or below it are
flagged. Conformal p-values of one calibration are positively dependent in the way that the proof needs, so the
expected share of normal images among the flagged ones is at most the level times the share of normal images, over the
draw of the calibration images too. A calibration of M scores gives M + 1 different p-values, so the histogram is exact.

Source: Benjamini and Hochberg, "Controlling the false discovery rate", JRSS B 57 (1995); Bates et al., "Testing for
outliers with conformal p-values", Annals of Statistics 51 (2023), theorem 2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Discovery:
    """What is flagged in an archive, and the number that backs it.

    Attributes:
        level: share of normal images among the flagged ones that is allowed, on average.
        tested: images with a p-value.
        p_threshold: flagged are those with a p-value of at most this; None = none is flagged.
        flagged: how many.
        expected_false: `tested * p_threshold`: how many images would be expected at or below the threshold if all were
            normal. Over `flagged` it is at most the level.
        needed_held_out: held-out images with which those of the smallest p-value would be flagged, when none is;
            0 otherwise.
    """

    level: float
    tested: int
    p_threshold: float | None
    flagged: int
    expected_false: float
    needed_held_out: int = 0

    @property
    def false_share(self) -> float:
        """The estimate of the false discovery rate that the procedure holds at or below the level."""
        return self.expected_false / self.flagged if self.flagged else 0.0


def discover(counts: Mapping[float, int], level: float) -> Discovery:
    """Flags by Benjamini-Hochberg.

    Args:
        counts: how many images have which p-value.
        level: in (0, 1).
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
    if counts:
        at_best = counts[min(counts)]
        needed = math.ceil(tested / (level * at_best) * (1.0 - ROUNDING)) - 1
    return Discovery(level, tested, None, 0, 0.0, needed)
