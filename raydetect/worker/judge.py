"""A loaded detector with what its calibration makes of scores; and the few of a fleet that stay loaded."""

import gc
import threading
from collections import OrderedDict

import numpy as np
import torch

from raydetect.artifact_record import Calibration
from raydetect.fleet_record import ArtifactRef
from raydetect.metrics.conformal import p_values, threshold_for
from raydetect.spec import FlagSpec
from raydetect.worker.artifact import Artifact, DetectorSource


class Decision:
    """p-values, threshold and flags of image scores under one calibration and one flag rule."""

    def __init__(self, flag: FlagSpec, calibration: Calibration) -> None:
        """Precomputes the threshold.

        Raises:
            SpecError: the calibration is too small for `flag.alpha`.
        """
        self._scores = np.asarray(calibration.scores, dtype=np.float64)
        self._is_left_open = flag.fdr is not None
        if flag.smallest_p is None:
            assert flag.threshold is not None
            self._threshold = flag.threshold
        else:
            self._threshold = threshold_for(self._scores, flag.smallest_p[1], flag.smallest_p[0])

    @property
    def threshold(self) -> float | None:
        """Scores from here on are flagged; None when the whole archive decides."""
        return None if self._is_left_open else self._threshold

    def of(self, image_score: float) -> tuple[float, bool | None]:
        """(p-value, flagged) of one image score; flagged is None when the whole archive decides."""
        p_value = float(p_values(self._scores, np.asarray([image_score]))[0])
        return p_value, None if self._is_left_open else self.may_flag(image_score)

    def may_flag(self, image_score: float) -> bool:
        """Whether an image is flagged, or may be: with `fdr` no p-value above the level ever is."""
        return image_score >= self._threshold


class Judge:
    """One artifact at work: its detector on the device, its decision rule and the scale of its heatmaps."""

    def __init__(self, artifact: Artifact, flag: FlagSpec, device: torch.device) -> None:
        """Moves the detector to the device.

        Raises:
            SpecError: the calibration is too small for `flag.alpha`.
        """
        calibration = artifact.record.calibration
        self.digest = artifact.record.digest
        self.image_size = artifact.record.image_size
        self.detector = artifact.detector.to(device)
        self.decision = Decision(flag, calibration)
        self.map_low, self.map_high = calibration.map_scale()


class Judges:
    """Loads judges when they are needed and keeps those used last.

    Threads may share it. A judge that a thread still uses when it is dropped stays in memory until that thread is
    done with it.
    """

    def __init__(self, source: DetectorSource, flag: FlagSpec, device: torch.device, limit: int) -> None:
        """Loads what scores images without a category: an ordinary artifact at once, of a fleet nothing yet.

        Args:
            source: of the artifacts.
            flag: the job's rule.
            device: of the detectors.
            limit: how many stay loaded, at least 1.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit the rule.
        """
        self._source, self._flag, self._device, self._limit = source, flag, device, limit
        self._kept: OrderedDict[ArtifactRef, Judge] = OrderedDict()
        self._lock = threading.Lock()
        alone = source.index.for_category(None)
        if alone is not None:
            self.get(alone)

    def get(self, ref: ArtifactRef) -> Judge:
        """The judge of an artifact; drops the least recently used one before it loads one too many.

        Raises:
            ArtifactError: the artifact is missing, damaged or was replaced.
        """
        with self._lock:
            found = self._kept.get(ref)
            if found is None:
                if len(self._kept) == self._limit:
                    self._kept.popitem(last=False)
                    gc.collect()  # the traced graph of a backbone refers to itself, and would hold its weights for long
                found = Judge(self._source.load(ref), self._flag, self._device)
                self._kept[ref] = found
            self._kept.move_to_end(ref)
            return found
