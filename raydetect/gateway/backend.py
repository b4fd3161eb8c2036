"""The interface between the endpoints and what scores: this process, or Ray Serve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raydetect.artifacts.fleet import ArtifactIndex, read_index, read_records
from raydetect.artifacts.record import ArtifactRecord
from raydetect.config import FlagSpec, Heatmaps, ScoreSpec, ServedSpec
from raydetect.errors import RaydetectError
from raydetect.metrics.conformal import threshold_for
from raydetect.planning.plan import check_flag
from raydetect.records import Answer, Member
from raydetect.storage import Storage, normalise_uri


class Busy(RaydetectError):
    """The request cannot be handled right now; the same request may succeed shortly."""


class TooMany(Busy):
    """The server is at one of its limits."""


@dataclass(frozen=True, slots=True)
class Served:
    """The version of a detector that is being served.

    Attributes:
        name: the name used in requests.
        index: the index of its artifact.
        flag: when an image is flagged.
        facts: the fields of `schemas.DetectorAnswer`.
    """

    name: str
    index: ArtifactIndex
    flag: FlagSpec
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunState:
    """State of a run that is not in its ledger: `running`, `finished`, `failed` or `cancelled`, and why."""

    uri: str
    state: str
    error: str = ""


class Backend(Protocol):
    """Scores images, serves detectors and runs archives. Methods may be called concurrently."""

    async def served(self) -> Mapping[str, Served]:
        """Returns the served detectors by name."""

    async def answer(self, served: Served, members: Sequence[Member], heatmaps: Sequence[Heatmaps]) -> Sequence[Answer]:
        """Scores images, in order.

        Raises:
            Busy: nothing can score them right now.
        """

    async def replace(self, name: str, artifact: str) -> Served:
        """Serves another artifact under a name; the old one keeps scoring until the new one is loaded.

        Raises:
            ArtifactError, SpecError: it cannot be served; the old one stays.
        """

    async def start(self, spec: ScoreSpec) -> RunState:
        """Plans and starts a run; does nothing if the same run is already in progress.

        Raises:
            RaydetectError: it cannot be started.
            TooMany: the limit of concurrent runs is reached.
        """

    async def runs(self) -> Mapping[str, RunState]:
        """Returns the runs since the server started, by results directory."""

    async def cancel(self, uri: str) -> bool:
        """Stops a run after its chunks in flight; keeps what is committed. Returns False if no run is in progress."""

    async def ready(self) -> bool:
        """Whether a request can be scored now."""


def load_served(name: str, served: ServedSpec, storage: Storage) -> Served:
    """Reads the records of an artifact and checks that its calibration is large enough.

    Raises:
        ArtifactError, SpecError: it cannot be served.
    """
    index = read_index(normalise_uri(served.artifact), storage)
    records = read_records(index, storage)
    check_flag(records, served.flag)
    return Served(name, index, served.flag, _facts(name, index, records, served.flag))


def _facts(
    name: str, index: ArtifactIndex, records: Mapping[str | None, ArtifactRecord], flag: FlagSpec
) -> dict[str, Any]:
    first = next(iter(records.values()))
    return {
        "name": name,
        "algorithm": str(first.body["detector"]),
        "artifact": index.digest,
        "image_size": list(first.image_size),
        "threshold": None if index.categories else _threshold(first, flag),
        "alpha": _alpha(records, flag),
        "held_out": min(len(record.calibration.scores) for record in records.values()),
        "categories": list(index.categories),
        "weights": str(first.body.get("weights", "")).rpartition("/")[2],
    }


def _alpha(records: Mapping[str | None, ArtifactRecord], flag: FlagSpec) -> float | None:
    """The level of p-values; in a fleet, the largest of a category."""
    levels = [flag.smallest_p(len(record.calibration.scores)) for record in records.values()]
    return max((level for _, level in filter(None, levels)), default=None)


def _threshold(record: ArtifactRecord, flag: FlagSpec) -> float | None:
    scores = np.asarray(record.calibration.scores)
    smallest_p = flag.smallest_p(len(scores))
    return flag.threshold if smallest_p is None else threshold_for(scores, smallest_p[1])
