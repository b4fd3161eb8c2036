"""Keeps detectors loaded in one process, to score single images and archive chunks with the same Scorer as jobs."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from raydetect.artifacts.fleet import ArtifactIndex, ArtifactRef
from raydetect.artifacts.record import ArtifactRecord
from raydetect.artifacts.store import Artifact, StoredDetectors
from raydetect.config import Heatmaps, ScoreSpec
from raydetect.config.validation import digest
from raydetect.detectors._base import Detector
from raydetect.records import Answer, Chunk, Member
from raydetect.scoring.device_queue import DeviceQueue
from raydetect.scoring.scorer import ChunkResult, Scorer
from raydetect.storage import Storage

SCORERS_KEPT = 8


class SharedDetectors:
    """The detectors of one index, each loaded once and shared by its categories and by all scorers of a device."""

    def __init__(self, index: ArtifactIndex, storage: Storage) -> None:
        """Creates the cache; nothing is loaded yet."""
        self._stored = StoredDetectors(index, storage)
        self._detectors: weakref.WeakValueDictionary[ArtifactRef, Detector] = weakref.WeakValueDictionary()
        self._records: dict[ArtifactRef, ArtifactRecord] = {}
        self._lock = threading.Lock()

    @property
    def index(self) -> ArtifactIndex:
        """Maps each category to the artifact that scores it."""
        return self._stored.index

    def load(self, ref: ArtifactRef) -> Artifact:
        """Returns the artifact of a ref in the index.

        Raises:
            ArtifactError: it is missing or damaged, or was replaced since the index was read.
        """
        with self._lock:
            name = self.index.detector_of(ref)
            detector = self._detectors.get(name)
            if detector is not None:
                return Artifact(detector, self._record(ref))
            artifact = self._stored.load(ref)
            self._detectors[name], self._records[ref] = artifact.detector, artifact.record
            return artifact

    def record_of(self, ref: ArtifactRef) -> ArtifactRecord:
        """Returns the record alone, of an artifact whose detector is loaded already.

        Raises:
            ArtifactError: it is missing or damaged, or was replaced since the index was read.
        """
        with self._lock:
            return self._record(ref)

    def _record(self, ref: ArtifactRef) -> ArtifactRecord:
        if ref not in self._records:
            self._records[ref] = self._stored.record_of(ref)
        return self._records[ref]


@dataclass(slots=True)
class ScorerPool:
    """An artifact or fleet loaded for scoring: one scorer per job spec, all sharing the same detectors."""

    detectors: SharedDetectors
    queue: DeviceQueue
    _scorers: OrderedDict[str, Scorer] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, members: Sequence[Member], heatmaps: Sequence[Heatmaps], spec: ScoreSpec) -> list[Answer]:
        """Scores single images, ahead of archive chunks.

        Args:
            members: encoded images.
            heatmaps: heatmap setting of each image.
            spec: the scoring settings; see `gateway.single_images`.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit `flag`.
        """
        chunk = Chunk(0, 0, True, tuple(members))
        result = self._scorer(spec, online=True).score_chunk(chunk, heatmaps)
        return [Answer(replace(row, chunk=""), result.pictures.get(i)) for i, row in enumerate(result.rows)]

    def warm_up(self, spec: ScoreSpec) -> None:
        """Loads the detector if there is only one, so that the first image does not wait for it; else nothing.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit `flag`.
        """
        self._scorer(spec, online=True)

    def score_chunk(self, chunk: Chunk, spec: ScoreSpec) -> ChunkResult:
        """Scores a chunk of an archive when no single image is waiting.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit `flag`.
            BadMemberError: an image is bad and the source has `on_bad_member: fail`.
        """
        return self._scorer(spec, online=False).score_chunk(chunk)

    def _scorer(self, spec: ScoreSpec, online: bool) -> Scorer:
        name = digest(spec)
        with self._lock:
            scorer = self._scorers.pop(name, None)
            if scorer is None:
                if len(self._scorers) == SCORERS_KEPT:
                    self._scorers.popitem(last=False)
                scorer = Scorer(self.detectors, spec, self.queue, online)
            self._scorers[name] = scorer
            return scorer
