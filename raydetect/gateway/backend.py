"""What the endpoints ask of whatever scores behind them: this process, or Ray Serve."""

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
    """Nothing could be tried just now; the same request may succeed in a moment."""


class TooMany(Busy):
    """As much is in hand as the server takes at a time."""


@dataclass(frozen=True, slots=True)
class Served:
    """The version of a detector that scores now.

    Attributes:
        name: that requests use.
        index: of its artifact.
        flag: when an image is flagged.
        facts: for people, as `bodies.DetectorAnswer` has them.
    """

    name: str
    index: ArtifactIndex
    flag: FlagSpec
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunState:
    """What a desk knows of a run beside the ledger: `running`, `finished`, `failed`, `cancelled`, and why."""

    uri: str
    state: str
    error: str = ""


class Backend(Protocol):
    """Scores, serves and runs. All methods may be called side by side."""

    async def served(self) -> Mapping[str, Served]:
        """Every served detector by name."""

    async def answer(self, served: Served, members: Sequence[Member], heatmaps: Sequence[Heatmaps]) -> Sequence[Answer]:
        """Scores images, in order.

        Raises:
            Busy: what scores them is not there just now.
        """

    async def replace(self, name: str, artifact: str) -> Served:
        """Serves another artifact under a name, once it is loaded; requests meanwhile are scored by the old one.

        Raises:
            ArtifactError, SpecError: it cannot be served; the old one stays.
        """

    async def start(self, spec: ScoreSpec) -> RunState:
        """Plans a run and begins it; one that runs already is left alone.

        Raises:
            RaydetectError: it cannot be begun.
            TooMany: of them run.
        """

    async def runs(self) -> Mapping[str, RunState]:
        """Runs since the server started, by results directory."""

    async def cancel(self, uri: str) -> bool:
        """Stops a run after the chunks in hand; what is committed stays. False: none runs there."""

    async def ready(self) -> bool:
        """Whether a request would be scored now."""


def load_served(name: str, served: ServedSpec, storage: Storage) -> Served:
    """Reads the records of a served artifact, and checks that its calibration is large enough.

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
        "alpha": flag.alpha,
        "held_out": min(len(record.calibration.scores) for record in records.values()),
        "categories": list(index.categories),
        "weights": str(first.body.get("weights", "")).rpartition("/")[2],
    }


def _threshold(record: ArtifactRecord, flag: FlagSpec) -> float | None:
    if flag.smallest_p is None:
        return flag.threshold
    return threshold_for(np.asarray(record.calibration.scores), flag.smallest_p[1])
