"""Detectors kept warm in one process: single images now, chunks of an archive meanwhile, by the same Scorer as jobs."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from raydetect.artifact_record import ArtifactRecord
from raydetect.config import digest
from raydetect.detectors._base import Detector
from raydetect.fleet_record import ArtifactIndex, ArtifactRef
from raydetect.records import Answer, Chunk, Member
from raydetect.spec import Heatmaps, ScoreSpec
from raydetect.storage import Storage
from raydetect.worker.artifact import Artifact, StoredDetectors
from raydetect.worker.score import ChunkResult, Scorer
from raydetect.worker.turns import Turns

SCORERS_KEPT = 8


class SharedDetectors:
    """The detectors of one index, each in memory once however many scorers use it.

    A detector is loaded while nothing is scored: to cut a backbone, torch.fx replaces how modules are called, for all
    threads of the process.
    """

    def __init__(self, index: ArtifactIndex, storage: Storage, turns: Turns) -> None:
        """Loads nothing yet."""
        self._turn = turns.online
        self._stored = StoredDetectors(index, storage)
        self._detectors: weakref.WeakValueDictionary[ArtifactRef, Detector] = weakref.WeakValueDictionary()
        self._records: dict[ArtifactRef, ArtifactRecord] = {}
        self._lock = threading.Lock()

    @property
    def index(self) -> ArtifactIndex:
        """Answers which artifact scores which category."""
        return self._stored.index

    def load(self, ref: ArtifactRef) -> Artifact:
        """The artifact of a ref of the index.

        Raises:
            ArtifactError: it is missing or damaged, or was replaced since the index was read.
        """
        with self._lock:
            detector = self._detectors.get(ref)
            if detector is not None:
                return Artifact(detector, self._records[ref])
            with self._turn:
                found = self._stored.load(ref)
            self._detectors[ref], self._records[ref] = found.detector, found.record
            return found


@dataclass(slots=True)
class Warm:
    """One artifact or fleet at work: scorers of several rules around the same detectors."""

    detectors: SharedDetectors
    device: str
    turns: Turns
    _scorers: OrderedDict[str, Scorer] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, members: Sequence[Member], heatmaps: Sequence[Heatmaps], spec: ScoreSpec) -> list[Answer]:
        """Scores single images, which go before the chunks of archives.

        Args:
            members: encoded images.
            heatmaps: when each gets one.
            spec: the rules; see `gateway.rules`.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit `flag`.
        """
        chunk = Chunk(0, 0, True, tuple(members))
        result = self._scorer(spec, self.turns.online).score_chunk(chunk, heatmaps)
        return [Answer(replace(row, chunk=""), result.pictures.get(i)) for i, row in enumerate(result.rows)]

    def warm_up(self, spec: ScoreSpec) -> None:
        """Loads an ordinary artifact, so that the first image does not wait for it; of a fleet nothing.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit `flag`.
        """
        self._scorer(spec, self.turns.online)

    def score_chunk(self, chunk: Chunk, spec: ScoreSpec) -> ChunkResult:
        """Scores a chunk of an archive, while no single image waits.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit `flag`.
            BadMemberError: an image is bad and the source says `on_bad_member: fail`.
        """
        return self._scorer(spec, self.turns.bulk).score_chunk(chunk)

    def _scorer(self, spec: ScoreSpec, door: AbstractContextManager[object]) -> Scorer:
        name = digest(spec)
        with self._lock:
            found = self._scorers.pop(name, None)
            if found is None:
                if len(self._scorers) == SCORERS_KEPT:
                    self._scorers.popitem(last=False)
                found = Scorer(self.detectors, spec, self.device, door)
            self._scorers[name] = found
            return found
