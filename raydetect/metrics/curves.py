"""AUROC, average precision, F1-max and FPR at 95 % TPR from binned counts, each with proven bounds.

Binning loses the order of the scores within a bin. Every value treats the scores of a bin as ties, and for any order
within the bins the exact value lies in [low, high]. If every bin holds a single value (`ScoreBins.shift` 0), all three
are the exact value.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raydetect.metrics.score_bins import ScoreBins, aligned

TPR = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """The value of a metric; the exact value lies in [low, high]."""

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Maximum distance of the exact value from `value`; 0 if `value` is exact."""
        return max(self.value - self.low, self.high - self.value)


def ranking_figures(normal: ScoreBins, anomalous: ScoreBins, columns: tuple[int, int] = (0, 0)) -> dict[str, Estimate]:
    """Computes every metric of RANKING.

    Args:
        normal: scores of normal items.
        anomalous: scores of anomalous items.
        columns: the column of counts to use of each.

    Raises:
        ValueError: a class is missing.
    """
    counts_B2 = aligned([normal, anomalous], list(columns))
    found = {name: figure(counts_B2[:, 0], counts_B2[:, 1]) for name, figure in RANKING.items()}
    if max(normal.shift, anomalous.shift) == 0:
        return {name: Estimate(f.value, f.value, f.value) for name, f in found.items()}
    return found


def auroc_of(normal_B: np.ndarray, anomalous_B: np.ndarray) -> Estimate:
    """Probability that an anomalous item outranks a normal one; pairs in one bin count half, 0 or 1 in the bounds.

    Args:
        normal_B: counts by bin, highest scores first.
        anomalous_B: counts of the same bins.

    Raises:
        ValueError: a class is missing.
    """
    negatives, positives = _totals(normal_B, anomalous_B)
    below_B = negatives - np.cumsum(normal_B, dtype=np.float64)
    together = float(np.sum(anomalous_B * normal_B.astype(np.float64)))
    won, pairs = float(np.sum(anomalous_B * below_B)), negatives * positives
    return Estimate((won + together / 2) / pairs, won / pairs, (won + together) / pairs)


def average_precision_of(normal_B: np.ndarray, anomalous_B: np.ndarray) -> Estimate:
    """Sum over bins of precision times the step in recall.

    In a bin with p true and n false positives, after H true and F false ones, the precision is at most
    (H + p) / (H + p + F) at every true positive, and at least (H + i) / (H + i + F + n) at the i-th; the sum of the
    latter is bounded by its integral.

    Raises:
        ValueError: a class is missing.
    """
    _, positives = _totals(normal_B, anomalous_B)
    some_B = anomalous_B > 0
    step = anomalous_B[some_B].astype(np.float64)
    hits = np.cumsum(anomalous_B, dtype=np.float64)[some_B]
    false = np.cumsum(normal_B, dtype=np.float64)[some_B]
    value = np.sum(step * hits / (hits + false))
    high = np.sum(step * hits / (hits + false - normal_B[some_B]))
    before = np.maximum(hits - step + false, 1e-9)  # 0 only where `false` is 0, and the term vanishes
    low = np.sum(step - false * np.log1p(step / before))
    return Estimate(float(value / positives), float(low / positives), float(high / positives))


def f1_max_of(normal_B: np.ndarray, anomalous_B: np.ndarray) -> Estimate:
    """Largest F1 over thresholds at bin edges; a threshold inside a bin may give a larger one.

    Raises:
        ValueError: a class is missing.
    """
    _, positives = _totals(normal_B, anomalous_B)
    hits, false = np.cumsum(anomalous_B, dtype=np.float64), np.cumsum(normal_B, dtype=np.float64)
    value = float(np.max(2 * hits / (hits + false + positives)))
    high = float(np.max(2 * hits / (hits + false - normal_B + positives)))
    return Estimate(value, value, high)


def fpr_at_tpr_of(normal_B: np.ndarray, anomalous_B: np.ndarray) -> Estimate:
    """False positive rate at the highest threshold that catches at least 95 % of the anomalous items.

    Raises:
        ValueError: a class is missing.
    """
    negatives, positives = _totals(normal_B, anomalous_B)
    index = int(np.searchsorted(np.cumsum(anomalous_B), TPR * positives * (1 - 1e-12)))
    false = np.cumsum(normal_B, dtype=np.float64)[index]
    return Estimate(float(false / negatives), float((false - normal_B[index]) / negatives), float(false / negatives))


RANKING: dict[str, Callable[[np.ndarray, np.ndarray], Estimate]] = {
    "auroc": auroc_of,
    "ap": average_precision_of,
    "f1_max": f1_max_of,
    "fpr_at_95_tpr": fpr_at_tpr_of,
}


def _totals(normal_B: np.ndarray, anomalous_B: np.ndarray) -> tuple[float, float]:
    negatives, positives = float(normal_B.sum()), float(anomalous_B.sum())
    if not negatives or not positives:
        lacking = "normal" if not negatives else "anomalous"
        raise ValueError(f"there is nothing {lacking}, and ranking metrics are undefined for one class. Add some.")
    return negatives, positives
