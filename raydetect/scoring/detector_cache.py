"""A detector loaded with its decision rule and heatmap scale, and a cache of a fleet's loaded detectors."""

import gc
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch

from raydetect.artifacts.fleet import ArtifactRef
from raydetect.artifacts.region_threshold import RegionThreshold
from raydetect.artifacts.store import Artifact, DetectorSource
from raydetect.config import FlagSpec
from raydetect.scoring.decision import DecisionRule
from raydetect.scoring.device_queue import DeviceQueue

T = TypeVar("T")


class LoadedDetector:
    """An artifact loaded for scoring: its detector on the device, its thresholds and its heatmap scale."""

    def __init__(self, artifact: Artifact, flag: FlagSpec, max_regions: int, device: torch.device) -> None:
        """Moves the detector to the device and computes the thresholds of images and pixels.

        Raises:
            SpecError: the calibration is too small for `flag.alpha`.
        """
        calibration = artifact.record.calibration
        self.digest = artifact.record.digest
        self.preprocess = artifact.record.preprocess
        self.detector = artifact.detector.to(device)
        self.decision = DecisionRule(flag, calibration)
        self.region_threshold = RegionThreshold.of(calibration, flag, max_regions).value
        self.map_low, self.map_high = calibration.map_scale()


class DetectorCache:
    """Loads detectors on demand and keeps the most recently used ones.

    Thread-safe. No more than `limit` detectors are in memory, so a thread that needs another one waits until one of
    them is not in use.
    """

    def __init__(
        self, source: DetectorSource, flag: FlagSpec, queue: DeviceQueue, limit: int, max_regions: int = 0
    ) -> None:
        """Loads the detector for images without a category, if there is one; a fleet's detectors are loaded later.

        Args:
            source: source of the artifacts.
            flag: the job's flag rule.
            queue: the device; detectors are loaded on its thread, so that nothing is scored meanwhile: to truncate a
                backbone, torch.fx patches module calls in all threads of the process.
            limit: maximum number of loaded detectors, at least 1.
            max_regions: regions of a row, at most.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit the rule.
        """
        self._source, self._flag, self._queue, self._limit = source, flag, queue, limit
        self._max_regions = max_regions
        self._kept: OrderedDict[ArtifactRef, LoadedDetector] = OrderedDict()
        self._users: Counter[ArtifactRef] = Counter()
        self._changed = threading.Condition()
        default = source.index.for_category(None)
        if default is not None:
            self.use(default, lambda loaded: None)

    def use(self, ref: ArtifactRef, work: Callable[[LoadedDetector], T]) -> T:
        """Calls `work` with the detector of an artifact; a thread uses one detector at a time.

        At the limit, the least recently used detector that is not in use is evicted first. `work` must not keep the
        detector.

        Raises:
            ArtifactError: the artifact is missing, damaged or was replaced.
        """
        self._acquire(ref)
        try:
            return work(self._kept[ref])
        finally:
            with self._changed:
                self._users[ref] -= 1
                self._changed.notify_all()

    def _acquire(self, ref: ArtifactRef) -> None:
        with self._changed:
            self._changed.wait_for(lambda: ref in self._kept or len(self._kept) < self._limit or self._unused())
            if ref not in self._kept:
                self._load(ref)
            self._kept.move_to_end(ref)
            self._users[ref] += 1

    def _load(self, ref: ArtifactRef) -> None:
        if len(self._kept) == self._limit:
            del self._kept[self._unused()[0]]
            gc.collect()  # the traced graph of a backbone is a reference cycle that would keep its weights
        self._kept[ref] = self._queue.online(lambda: self._loaded(ref)).result()

    def _loaded(self, ref: ArtifactRef) -> LoadedDetector:
        return LoadedDetector(self._source.load(ref), self._flag, self._max_regions, self._queue.device)

    def _unused(self) -> list[ArtifactRef]:
        return [ref for ref in self._kept if not self._users[ref]]
