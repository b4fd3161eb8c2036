"""The largest F1 score over all thresholds."""

import numpy as np

from raydetect.metrics.roc import checked


def best_f1(labels_N: np.ndarray, scores_N: np.ndarray) -> tuple[float, float]:
    """Largest F1 over all thresholds, and its threshold: `score >= threshold` is anomalous.

    Exact: every score is tried; among equal F1 the highest threshold is returned. The threshold is chosen with the
    labels: it describes these scores and is not a calibration.

    Args:
        labels_N: 0 normal, 1 anomalous.
        scores_N: finite, higher = more anomalous.

    Returns:
        (F1, threshold).

    Raises:
        ValueError: a class is missing, the lengths differ, or a score is not finite.
    """
    labels_N, scores_N = checked(labels_N, scores_N)
    order = np.argsort(-scores_N, kind="stable")
    sorted_N = scores_N[order]
    ends = np.flatnonzero(np.append(np.diff(sorted_N) != 0, True))
    hits = np.cumsum(labels_N[order])[ends]
    f1 = 2.0 * hits / (ends + 1 + labels_N.sum())
    best = int(np.argmax(f1))
    return float(f1[best]), float(sorted_N[ends[best]])
