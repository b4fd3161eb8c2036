"""Selects the most anomalous images of a run, including some of every category, in bounded memory."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

PER_CATEGORY = 8
MAX_CATEGORIES = 256
OVERALL_SHARE = 0.7


@dataclass(slots=True)
class TopImages:
    """Keeps the rows to show in the gallery.

    Attributes:
        limit: number of rows to show.
        by_p_value: rank by p-value, then score, since raw scores of different detectors are not comparable.
    """

    limit: int
    by_p_value: bool = False
    _overall: list[dict[str, Any]] = field(default_factory=list)
    _by_category: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, scored: pa.Table) -> None:
        """Adds the scored rows of one part."""
        if not scored.num_rows or not self.limit:
            return
        for row in scored.take(pa.array(self._candidates(scored))).to_pylist():
            self._overall.append(row)
            name = row["category"] or ""
            if name in self._by_category or len(self._by_category) < MAX_CATEGORIES:
                self._by_category.setdefault(name, []).append(row)
        self._overall = self._top(self._overall, self.limit)
        self._by_category = {name: self._top(rows, PER_CATEGORY) for name, rows in self._by_category.items()}

    def rows(self) -> list[dict[str, Any]]:
        """The rows to show, most anomalous first.

        With several categories, the last rows are the most anomalous ones of each category in turn, so that one bad
        category does not hide the others.
        """
        if len(self._by_category) < 2:
            return list(self._overall)
        chosen = {row["key"]: row for row in self._overall[: int(self.limit * OVERALL_SHARE)]}
        for rank in range(PER_CATEGORY):
            for name in sorted(self._by_category):
                rows = self._by_category[name]
                if rank < len(rows) and len(chosen) < self.limit:
                    chosen.setdefault(rows[rank]["key"], rows[rank])
        for row in self._overall:
            if len(chosen) < self.limit:
                chosen.setdefault(row["key"], row)
        return sorted(chosen.values(), key=self._rank)

    def _candidates(self, scored: pa.Table) -> np.ndarray:
        """Indices of rows that may be shown: the top rows of the part and of each of its categories."""
        scores_N = scored["image_score"].to_numpy(zero_copy_only=False)
        p_values_N = scored["p_value"].cast(pa.float64()).to_numpy(zero_copy_only=False)
        order_N = np.lexsort((-scores_N, p_values_N)) if self.by_p_value else np.argsort(-scores_N, kind="stable")
        wanted = set(order_N[: self.limit].tolist())
        seen: dict[str | None, int] = {}
        categories = scored["category"].to_pylist()
        for index in order_N.tolist():
            name = categories[index]
            seen[name] = seen.get(name, 0) + 1
            if seen[name] <= PER_CATEGORY:
                wanted.add(index)
        return np.asarray(sorted(wanted), dtype=np.int64)

    def _top(self, rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        return sorted(rows, key=self._rank)[:count]

    def _rank(self, row: dict[str, Any]) -> tuple[float, float, str]:
        p_value = row["p_value"] if self.by_p_value and row["p_value"] is not None else 0.0
        return p_value, -row["image_score"], row["key"]
