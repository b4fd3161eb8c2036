"""Applies the manifest's decision on flags (`flag.fdr`) to rows and receipts that were written before it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydetect.records import Part, Receipt

NEEDED = ("p_value", "category")
REGIONS = ("regions", "regions_left_out", "close_up_uris")


@dataclass(frozen=True, slots=True)
class ArchiveFlags:
    """Decision on flags over the whole archive.

    Attributes:
        p_threshold: rows with a p-value of at most this are flagged; None: no row is.
        thresholds: the same limit as an image score, by category; under the key None for a run without a fleet.
    """

    p_threshold: float | None
    thresholds: Mapping[str | None, float | None]

    def apply(self, table: pa.Table) -> pa.Table:
        """Fills in `flagged` and `threshold`, and removes the regions and close-ups of images that are not flagged.

        Rows without a p-value keep null.

        Args:
            table: rows with the columns `NEEDED` and any other columns of the results.
        """
        limit = -1.0 if self.p_threshold is None else self.p_threshold
        flagged = pc.less_equal(table["p_value"], pa.scalar(limit, pa.float64()))
        if "flagged" in table.column_names:
            table = _with(table, "flagged", flagged)
        table = flagged_regions(table, flagged)
        if "threshold" in table.column_names:
            thresholds = [
                None if p_value is None else self._threshold(category)
                for p_value, category in zip(table["p_value"].to_pylist(), table["category"].to_pylist(), strict=True)
            ]
            table = _with(table, "threshold", pa.array(thresholds, pa.float64()))
        return table

    def apply_to_receipt(self, receipt: Receipt) -> Receipt:
        """Fills in the number of flagged rows of every part."""
        return replace(receipt, parts=tuple(replace(part, flagged=self._count(part)) for part in receipt.parts))

    def _count(self, part: Part) -> int:
        if self.p_threshold is None:
            return 0
        return sum(count for p_value, count in part.p_counts.items() if p_value <= self.p_threshold)

    def _threshold(self, category: str | None) -> float | None:
        return self.thresholds[None] if None in self.thresholds else self.thresholds.get(category)


def flagged_regions(table: pa.Table, flagged: pa.ChunkedArray) -> pa.Table:
    """The rows without the regions and close-ups of images that are not flagged.

    Args:
        table: rows with any columns of the results.
        flagged: of each row; null = not flagged.
    """
    for name in REGIONS:
        if name in table.column_names:
            column = table[name]
            kept = pc.if_else(pc.fill_null(flagged, False), column, pa.scalar(None, column.type))
            table = _with(table, name, kept)
    return table


def archive_flags(manifest: Mapping[str, Any] | None) -> ArchiveFlags | None:
    """Returns the decision of a manifest; None if rows are flagged individually or the run is not finished."""
    fdr = None if manifest is None else manifest.get("fdr")
    if fdr is None:
        return None
    limit = fdr["threshold"]
    return ArchiveFlags(fdr["p_threshold"], limit["categories"] if isinstance(limit, Mapping) else {None: limit})


def _with(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    index = table.column_names.index(name)
    return table.set_column(index, table.schema.field(name), column)
