"""Mergeable counts and distributions of a night, a few kilobytes, kept to compare other nights with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydetect.metrics.histogram import Histogram
from raydetect.records import OK

PICTURE = ("brightness", "sharpness", "size")
DISTRIBUTIONS = ("score", *PICTURE)


@dataclass(slots=True)
class Statistics:
    """Counts and distributions of a night's images.

    Attributes:
        measure: the column used as `score`: image_score, or p_value for a fleet, whose scores cannot be compared.
        distributions: of `score`, `brightness`, `sharpness` and `size` (width times height in px).
    """

    measure: str
    images: int = 0
    bad: int = 0
    flagged: int = 0
    distributions: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in DISTRIBUTIONS})

    @property
    def scored(self) -> int:
        """Images with a score."""
        return self.images - self.bad

    def add(self, table: pa.Table) -> None:
        """Adds the rows of one part."""
        scored = table.filter(pc.equal(table["status"], OK))
        self.images += table.num_rows
        self.bad += table.num_rows - scored.num_rows
        self.flagged += int(pc.sum(pc.cast(scored["flagged"], pa.int64())).as_py() or 0)
        size = pc.multiply(pc.cast(scored["width"], pa.int64()), pc.cast(scored["height"], pa.int64()))
        columns = {
            "score": scored[self.measure],
            "brightness": scored["brightness"],
            "sharpness": scored["sharpness"],
            "size": size,
        }
        for name, column in columns.items():
            self.distributions[name].add(np.asarray(column.drop_null().to_numpy(), dtype=np.float64))

    def merge(self, other: "Statistics") -> None:
        """Adds the counts of another night."""
        self.images += other.images
        self.bad += other.bad
        self.flagged += other.flagged
        for name, found in other.distributions.items():
            self.distributions[name].merge(found)

    def plain(self) -> dict[str, Any]:
        """Converts to JSON types."""
        counts = {"measure": self.measure, "images": self.images, "bad": self.bad, "flagged": self.flagged}
        return counts | {"distributions": {name: found.plain() for name, found in self.distributions.items()}}

    @classmethod
    def of_plain(cls, body: Mapping[str, Any]) -> "Statistics":
        """Restores statistics from `plain`.

        Raises:
            ValueError, KeyError, TypeError: `body` is not such an object.
        """
        found = {name: Histogram.of_plain(body["distributions"][name]) for name in DISTRIBUTIONS}
        return cls(str(body["measure"]), int(body["images"]), int(body["bad"]), int(body["flagged"]), found)
