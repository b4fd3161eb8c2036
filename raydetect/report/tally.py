"""Sums, distributions and samples from one pass over the rows of a run, in constant memory."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydetect.metrics.histogram import Histogram
from raydetect.records import OK
from raydetect.report.timeline import Timeline
from raydetect.report.top_images import TopImages
from raydetect.sinks.ledger import Ledger, Totals
from raydetect.sinks.rows import read_rows

MAX_CATEGORIES, OTHERS = 2000, "(others)"
MAX_BAD_PER_STATUS = 40
COLUMNS = (
    "key", "image_uri", "status", "error", "width", "height", "brightness", "sharpness", "image_score", "p_value",
    "threshold", "flagged", "heatmap_uri", "artifact", "label", "category", "defect", "note", "regions",
    "regions_left_out", "close_up_uris",
)  # fmt: skip


@dataclass(slots=True)
class CategorySums:
    """Sums over the images of one category."""

    images: int = 0
    bad: int = 0
    flagged: int = 0
    labelled: int = 0
    anomalous: int = 0
    missed: int = 0
    false_alarms: int = 0
    highest: float = float("-inf")


@dataclass(slots=True)
class Tally:
    """Statistics of a run's rows for a report.

    Attributes:
        measure: column whose distribution is counted; the p-value for a fleet, since scores of different detectors are
            not comparable.
        distributions: histograms by label: 0, 1, or None if unknown.
        categories: sums by category, "" if there is none.
        top_images: the most anomalous images.
        bad: rows without a score, at most MAX_BAD_PER_STATUS per status.
        threshold: threshold of the run's only artifact; None for a fleet or before the first row.
    """

    measure: str
    top_images: TopImages
    totals: Totals = field(default_factory=Totals)
    timeline: Timeline = field(default_factory=Timeline)
    distributions: dict[int | None, Histogram] = field(default_factory=dict)
    categories: dict[str, CategorySums] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    threshold: float | None = None
    _bad_kept: Counter[str] = field(default_factory=Counter)

    def add(self, table: pa.Table) -> None:
        """Adds the rows of one part."""
        scored = table.filter(pc.equal(table["status"], OK))
        self._add_distributions(scored)
        self._add_categories(table)
        self.top_images.add(scored)
        if scored.num_rows < table.num_rows:
            self._add_bad(table.filter(pc.not_equal(table["status"], OK)))
        if self.threshold is None and self.measure == "image_score" and scored.num_rows:
            self.threshold = scored["threshold"][0].as_py()

    def _add_distributions(self, scored: pa.Table) -> None:
        values_N = floats(scored, self.measure)
        labels_N = floats(scored, "label")
        for label in (None, 0, 1):
            mine_N = np.isnan(labels_N) if label is None else labels_N == label
            if mine_N.any():
                self.distributions.setdefault(label, Histogram()).add(values_N[mine_N & np.isfinite(values_N)])

    def _add_categories(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        flagged_N = pc.fill_null(table["flagged"], False).to_numpy(zero_copy_only=False)
        decided_N = table["flagged"].is_valid().to_numpy(zero_copy_only=False)
        ok_N = pc.equal(table["status"], OK).to_numpy(zero_copy_only=False)
        labels_N, scores_N = floats(table, "label"), floats(table, "image_score")
        for name, mine_N in by_category(table):
            sums = self._sums(name)
            sums.images += int(mine_N.sum())
            sums.bad += int((mine_N & ~ok_N).sum())
            sums.flagged += int((mine_N & flagged_N).sum())
            counted_N = mine_N & ok_N
            sums.labelled += int((counted_N & ~np.isnan(labels_N)).sum())
            sums.anomalous += int((counted_N & (labels_N == 1)).sum())
            sums.missed += int((counted_N & (labels_N == 1) & decided_N & ~flagged_N).sum())
            sums.false_alarms += int((counted_N & (labels_N == 0) & flagged_N).sum())
            if counted_N.any():
                sums.highest = max(sums.highest, float(scores_N[counted_N].max()))

    def _sums(self, name: str) -> CategorySums:
        if name not in self.categories and len(self.categories) >= MAX_CATEGORIES:
            name = OTHERS
        return self.categories.setdefault(name, CategorySums())

    def _add_bad(self, bad: pa.Table) -> None:
        for row in bad.select(["key", "status", "error", "category"]).to_pylist():
            if self._bad_kept[row["status"]] < MAX_BAD_PER_STATUS:
                self._bad_kept[row["status"]] += 1
                self.bad.append({**row, "error": row["error"].removeprefix(f"{row['key']}: ")})


def tally(
    ledger: Ledger, run: Mapping[str, Any], pictures: int, also: Callable[[pa.Table], None] | None = None
) -> Tally:
    """Reads all committed rows once and tallies them.

    Args:
        ledger: ledger of the results directory.
        run: its `run.json`.
        pictures: number of most anomalous images to keep.
        also: called with the rows of each part, to compute other statistics in the same pass.

    Raises:
        StorageError: a record or part is missing or damaged.
    """
    measure = measure_of(run)
    row_tally = Tally(measure, TopImages(pictures, by_p_value=measure == "p_value"))
    shard = -1
    for receipt, _, table in read_rows(ledger, COLUMNS):
        if receipt.shard != shard:
            shard = receipt.shard
            row_tally.totals.add(receipt)
            row_tally.timeline.add(receipt)
        row_tally.add(table)
        if also is not None:
            also(table)
    return row_tally


def measure_of(run: Mapping[str, Any]) -> str:
    """The column that ranks images of a run: the p-value for a fleet, whose raw scores are not comparable."""
    return "p_value" if run["result"].get("categories") else "image_score"


def floats(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, with NaN for null."""
    column: np.ndarray = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return column


def by_category(table: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (category, mask of its rows), sorted by name; "" is no category."""
    column = pc.fill_null(table["category"], "").combine_chunks()
    encoded = pc.dictionary_encode(column)
    codes_N = encoded.indices.to_numpy(zero_copy_only=False)
    names = encoded.dictionary.to_pylist()
    for code in sorted(range(len(names)), key=lambda code: names[code]):
        yield names[code], codes_N == code
