"""The threshold of the pixels that belong to regions, by the conformal rule on the peaks of anomaly maps."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydetect.artifacts.record import MAX_FLOAT32, Calibration
from raydetect.config import USUAL_LEVEL, FlagSpec
from raydetect.config.validation import to_plain
from raydetect.metrics.conformal import threshold_for


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionThreshold:
    """From which anomaly map value on a pixel belongs to a region.

    Attributes:
        value: the lowest such value, a float32; None if rows have no regions.
        level: the largest share of normal images, on average over the draw of the held-out ones, with a pixel that
            high; None if rows have no regions.
        note: why rows have no regions, or why the level is not the one that was asked for; else "".
    """

    value: float | None = None
    level: float | None = None
    note: str = ""

    @classmethod
    def of(cls, calibration: Calibration, flag: FlagSpec, max_regions: int) -> "RegionThreshold":
        """Computes the threshold t such that a normal image has a pixel >= t with probability at most the level.

        The level is `flag.alpha`, so that of normal images no more have regions than are flagged. Without one, and with
        `flag.threshold` and `flag.fdr`, which say nothing about a single normal image, it is 0.01. If M held-out images
        are too few for that level, it is the smallest that they allow, 1 / (M + 1). Since rows have regions only where
        an image is flagged or may be, the share of normal images whose rows have some is smaller still.

        Args:
            calibration: of the detector.
            flag: the job's flag rule.
            max_regions: regions of a row, at most.
        """
        if not max_regions:
            return cls(note="none, since sink.max_regions is 0")
        if flag.nothing:
            return cls(note="none, since images were scored with `flag: none`")
        if calibration.map_peaks is None:
            return cls(
                note="none, since the artifact is of an older version and has no peaks of anomaly maps; `raydetect "
                "calibrate` adds them"
            )
        if not calibration.map_peaks:
            return cls(note="none, since the detector does not localise")
        wanted = USUAL_LEVEL if flag.alpha is None else flag.alpha
        smallest = 1.0 / (len(calibration.map_peaks) + 1)
        level = max(wanted, smallest)
        note = ""
        if level > wanted:
            note = (
                f"level {level:.4g} instead of {wanted:g}, the smallest with {len(calibration.map_peaks):,} held-out "
                "images"
            )
        value = threshold_for(np.asarray(calibration.map_peaks), level)
        return cls(value=_float32_from(value), level=level, note=note)

    def plain(self) -> dict[str, Any]:
        """The entry for `run.json` and the manifest."""
        return dict(to_plain(self))


def _float32_from(value: float) -> float:
    """The smallest float32 that is at least `value`, so that maps compare alike in float32 and in float64."""
    nearest = np.float32(max(value, -MAX_FLOAT32))
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))
