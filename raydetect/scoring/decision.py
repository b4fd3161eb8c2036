"""A loaded detector with the decision rule from its calibration, and a cache of a fleet's loaded detectors."""

import gc
import threading
from collections import OrderedDict

import numpy as np
import torch

from raydetect.artifacts.fleet import ArtifactRef
from raydetect.artifacts.record import Calibration
from raydetect.artifacts.store import Artifact, DetectorSource
from raydetect.config import FlagSpec
from raydetect.metrics.conformal import p_values, threshold_for


class Decision:
    """Computes p-values, threshold and flags of image scores for one calibration and one flag rule."""

    def __init__(self, flag: FlagSpec, calibration: Calibration) -> None:
        """Computes the threshold.

        Raises:
            SpecError: the calibration is too small for `flag.alpha`.
        """
        self._scores = np.asarray(calibration.scores, dtype=np.float64)
        self._is_deferred = flag.fdr is not None
        if flag.smallest_p is None:
            assert flag.threshold is not None
            self._threshold = flag.threshold
        else:
            self._threshold = threshold_for(self._scores, flag.smallest_p[1], flag.smallest_p[0])

    @property
    def threshold(self) -> float | None:
        """The lowest score that is flagged; None if flags depend on the whole archive (`fdr`)."""
        return None if self._is_deferred else self._threshold

    def of(self, image_score: float) -> tuple[float, bool | None]:
        """(p-value, flagged) of one image score; flagged is None if it depends on the whole archive."""
        p_value = float(p_values(self._scores, np.asarray([image_score]))[0])
        return p_value, None if self._is_deferred else self.may_flag(image_score)

    def may_flag(self, image_score: float) -> bool:
        """Whether an image is flagged or, with `fdr`, may be: a p-value above the level is never flagged."""
        return image_score >= self._threshold


class LoadedDetector:
    """An artifact loaded for scoring: its detector on the device, its decision rule and its heatmap scale."""

    def __init__(self, artifact: Artifact, flag: FlagSpec, device: torch.device) -> None:
        """Moves the detector to the device and computes the decision rule.

        Raises:
            SpecError: the calibration is too small for `flag.alpha`.
        """
        calibration = artifact.record.calibration
        self.digest = artifact.record.digest
        self.preprocess = artifact.record.preprocess
        self.detector = artifact.detector.to(device)
        self.decision = Decision(flag, calibration)
        self.map_low, self.map_high = calibration.map_scale()


class DetectorCache:
    """Loads detectors on demand and keeps the most recently used ones.

    Thread-safe. An evicted detector stays in memory until no thread uses it any more.
    """

    def __init__(self, source: DetectorSource, flag: FlagSpec, device: torch.device, limit: int) -> None:
        """Loads the detector for images without a category, if there is one; a fleet's detectors are loaded later.

        Args:
            source: source of the artifacts.
            flag: the job's flag rule.
            device: device of the detectors.
            limit: maximum number of loaded detectors, at least 1.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit the rule.
        """
        self._source, self._flag, self._device, self._limit = source, flag, device, limit
        self._kept: OrderedDict[ArtifactRef, LoadedDetector] = OrderedDict()
        self._lock = threading.Lock()
        default = source.index.for_category(None)
        if default is not None:
            self.get(default)

    def get(self, ref: ArtifactRef) -> LoadedDetector:
        """Returns the detector of an artifact; at the limit, evicts the least recently used one before loading.

        Raises:
            ArtifactError: the artifact is missing, damaged or was replaced.
        """
        with self._lock:
            detector = self._kept.get(ref)
            if detector is None:
                if len(self._kept) == self._limit:
                    self._kept.popitem(last=False)
                    gc.collect()  # the traced graph of a backbone is a reference cycle that would keep its weights
                detector = LoadedDetector(self._source.load(ref), self._flag, self._device)
                self._kept[ref] = detector
            self._kept.move_to_end(ref)
            return detector
