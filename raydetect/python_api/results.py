"""The results of one pass over images in Python: of every image its score, p-value, label, map and regions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from raydetect.errors import SpecError
from raydetect.python_api.optional_packages import optional
from raydetect.records import AnomalousRegion

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Result:
    """What a detector found in one image.

    Attributes:
        image: its URI; its position in what was given for arrays and PIL images.
        score: raw image score, higher = more anomalous.
        p_value: conformal, in (0, 1]; see `Scoring.p_values`.
        label: 1 = anomalous, 0 = not.
        height: of the upright image in px.
        width: likewise.
        regions: where an image with label 1 is anomalous, highest peak first, as in a job's rows; none for other
            images, and none if the detector does not localise.
        regions_left_out: how many other regions there are.
        map: anomaly map (height, width), float32, NaN where the view does not look; None if maps were not kept.
    """

    image: str | int
    score: float
    p_value: float
    label: int
    height: int
    width: int
    regions: tuple[AnomalousRegion, ...] = ()
    regions_left_out: int = 0
    map: np.ndarray | None = field(default=None, repr=False, compare=False)


class Results(Sequence[Result]):
    """The results of all images, in the order in which they were given: a sequence of `Result`.

    Attributes:
        threshold: the lowest image score with label 1.
    """

    def __init__(self, rows: Sequence[Result], threshold: float) -> None:
        """Keeps the rows."""
        self._rows = tuple(rows)
        self.threshold = threshold

    @overload
    def __getitem__(self, index: int) -> Result: ...

    @overload
    def __getitem__(self, index: slice) -> "Results": ...

    def __getitem__(self, index: "int | slice") -> "Result | Results":
        if isinstance(index, slice):
            return Results(self._rows[index], self.threshold)
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<{len(self)} results, {int(self.labels.sum())} anomalous: score >= {self.threshold:.6g}>"

    @property
    def scores(self) -> np.ndarray:
        """Raw image scores (N,) float32, as `predict_proba` returns them."""
        return np.array([row.score for row in self._rows], dtype=np.float32)

    @property
    def p_values(self) -> np.ndarray:
        """Conformal p-values (N,) float64."""
        return np.array([row.p_value for row in self._rows], dtype=np.float64)

    @property
    def labels(self) -> np.ndarray:
        """Labels (N,) int64, 1 = anomalous."""
        return np.array([row.label for row in self._rows], dtype=np.int64)

    @property
    def maps(self) -> "np.ndarray | list[np.ndarray]":
        """Anomaly maps (N, H, W) float32, each at its image's original size; a list of arrays if sizes differ.

        Raises:
            SpecError: maps were not kept.
        """
        found = [row.map for row in self._rows if row.map is not None]
        if len(found) < len(self._rows):
            raise SpecError("maps: were not kept, since the call says maps=False. Leave that out.")
        return stacked(found)

    def to_frame(self) -> "pd.DataFrame":
        """A pandas DataFrame with one row per image and every field of `Result` but `map`; regions are lists of dicts.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = optional("pandas", "to_frame", "pip install pandas")
        names = [name for name in Result.__dataclass_fields__ if name != "map"]
        columns: dict[str, Any] = {name: [getattr(row, name) for row in self._rows] for name in names}
        columns |= {"score": self.scores, "p_value": self.p_values, "label": self.labels}
        columns["regions"] = [[asdict(region) for region in row.regions] for row in self._rows]
        frame: pd.DataFrame = pandas.DataFrame(columns)
        return frame


def stacked(maps: Sequence[np.ndarray]) -> "np.ndarray | list[np.ndarray]":
    """The maps as one array (N, H, W), or as a list if their sizes differ."""
    return np.stack(maps) if len({found.shape for found in maps}) == 1 else list(maps)
