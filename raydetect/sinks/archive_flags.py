"""What the manifest decided for a whole archive (`flag.fdr`), told to rows and parts that were written before it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydetect.records import Part, Receipt

NEEDED = ("p_value", "category")


@dataclass(frozen=True, slots=True)
class ArchiveFlags:
    """Which rows of a run are flagged when the whole archive decides.

    Attributes:
        p_threshold: flagged are rows whose p-value is at most this; None = none is.
        thresholds: the same as an image score, by category; for a run without a fleet under None.
    """

    p_threshold: float | None
    thresholds: Mapping[str | None, float | None]

    def decided(self, table: pa.Table) -> pa.Table:
        """The rows with `flagged` and `threshold` filled in; rows without a p-value keep null.

        Args:
            table: has the columns of `NEEDED`, and any others of the results.
        """
        if "flagged" in table.column_names:
            limit = -1.0 if self.p_threshold is None else self.p_threshold
            table = _with(table, "flagged", pc.less_equal(table["p_value"], pa.scalar(limit, pa.float64())))
        if "threshold" in table.column_names:
            found = [
                None if p_value is None else self._threshold(category)
                for p_value, category in zip(table["p_value"].to_pylist(), table["category"].to_pylist(), strict=True)
            ]
            table = _with(table, "threshold", pa.array(found, pa.float64()))
        return table

    def receipt(self, receipt: Receipt) -> Receipt:
        """The same with the number of flagged rows in every part."""
        return replace(receipt, parts=tuple(replace(part, flagged=self._count(part)) for part in receipt.parts))

    def _count(self, part: Part) -> int:
        if self.p_threshold is None:
            return 0
        return sum(count for p_value, count in part.p_counts.items() if p_value <= self.p_threshold)

    def _threshold(self, category: str | None) -> float | None:
        return self.thresholds[None] if None in self.thresholds else self.thresholds.get(category)


def archive_flags(manifest: Mapping[str, Any] | None) -> ArchiveFlags | None:
    """What a manifest decided; None where rows are flagged by themselves, or the run is not finished."""
    fdr = None if manifest is None else manifest.get("fdr")
    if fdr is None:
        return None
    told = fdr["threshold"]
    return ArchiveFlags(fdr["p_threshold"], told["categories"] if isinstance(told, Mapping) else {None: told})


def _with(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), column)
