"""A detector loaded with its decision rule and heatmap scale, and a cache of a fleet's loaded detectors.

Categories that share a detector have it in memory once, each with a decision rule and heatmap scale of its own.
"""

import gc
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial
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
        """Loads the detector if there is only one; detectors of the categories of a fleet are loaded later.

        Args:
            source: source of the artifacts.
            flag: the job's flag rule.
            queue: the device; detectors are loaded on its thread, so that nothing is scored meanwhile: to truncate a
                backbone, torch.fx patches module calls in all threads of the process.
            limit: maximum number of loaded detectors, at least 1; one that categories share counts once.
            max_regions: regions of a row, at most.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit the rule.
        """
        self._source, self._flag, self._queue, self._limit = source, flag, queue, limit
        self._max_regions = max_regions
        self._kept: OrderedDict[ArtifactRef, dict[ArtifactRef, LoadedDetector]] = OrderedDict()  # by `detector_of`
        self._users: Counter[ArtifactRef] = Counter()
        self._changed = threading.Condition()
        index = source.index
        only = next(iter(index.categories.values())) if index.is_shared else index.for_category(None)
        if only is not None:
            self.use(only, lambda loaded: None)

    def use(self, ref: ArtifactRef, work: Callable[[LoadedDetector], T]) -> T:
        """Calls `work` with the detector of an artifact; see `use_all`."""
        return self.use_all([ref], lambda found: work(found[ref]))

    def use_all(self, refs: Collection[ArtifactRef], work: Callable[[Mapping[ArtifactRef, LoadedDetector]], T]) -> T:
        """Calls `work` with one detector, as it is loaded for each of the artifacts that share it.

        A thread uses one detector at a time. At the limit, the least recently used detector that is not in use is
        evicted first. `work` must not keep the detector.

        Args:
            refs: artifacts of the index with the same detector (`ArtifactIndex.detector_of`), at least one.
            work: called with the loaded detector of each artifact.

        Raises:
            ArtifactError: an artifact is missing, damaged or was replaced.
        """
        name = self._source.index.detector_of(next(iter(refs)))
        self._acquire(name, refs)
        try:
            return work({ref: self._kept[name][ref] for ref in refs})
        finally:
            with self._changed:
                self._users[name] -= 1
                self._changed.notify_all()

    def _acquire(self, name: ArtifactRef, refs: Collection[ArtifactRef]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: name in self._kept or len(self._kept) < self._limit or self._unused())
            if name not in self._kept and len(self._kept) == self._limit:
                del self._kept[self._unused()[0]]
                gc.collect()  # the traced graph of a backbone is a reference cycle that would keep its weights
            loaded = self._kept.get(name, {})
            for ref in refs:
                if ref not in loaded:
                    sharing = next(iter(loaded.values()), None)
                    loaded[ref] = self._queue.online(partial(self._loaded, ref, sharing)).result()
            self._kept[name] = loaded
            self._kept.move_to_end(name)
            self._users[name] += 1

    def _loaded(self, ref: ArtifactRef, sharing: LoadedDetector | None) -> LoadedDetector:
        """Loads an artifact, or only its record if another one with the same detector is loaded."""
        if sharing is None:
            artifact = self._source.load(ref)
        else:
            artifact = Artifact(sharing.detector, self._source.record_of(ref))
        return LoadedDetector(artifact, self._flag, self._max_regions, self._queue.device)

    def _unused(self) -> list[ArtifactRef]:
        return [name for name in self._kept if not self._users[name]]
