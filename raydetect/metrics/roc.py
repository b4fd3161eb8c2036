"""Ranking metrics of scores against labels, exact with ties."""

import numpy as np


def auroc(labels_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the ROC curve: the probability that an anomalous item outranks a normal one, ties counting half.

    Exact (Mann-Whitney U by average ranks); sorts, so O(N log N).

    Args:
        labels_N: 0 normal, 1 anomalous.
        scores_N: finite, higher = more anomalous.

    Raises:
        ValueError: a class is missing, the lengths differ, or a score is not finite.
    """
    labels_N, scores_N = checked(labels_N, scores_N)
    positives = int(labels_N.sum())
    negatives = len(labels_N) - positives
    rank_sum = float(_average_ranks(scores_N)[labels_N == 1].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def _average_ranks(scores_N: np.ndarray) -> np.ndarray:
    """Ranks from 1, ascending; ties get their mean rank. scipy.stats has this, but takes half a second to import."""
    _, index_N, counts_U = np.unique(scores_N, return_inverse=True, return_counts=True)
    mean_U: np.ndarray = np.cumsum(counts_U) - (counts_U - 1) / 2
    return mean_U[index_N]


def average_precision(labels_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Sum over thresholds of precision times the step in recall; tied scores share one threshold.

    Args:
        labels_N: 0 normal, 1 anomalous.
        scores_N: finite, higher = more anomalous.

    Raises:
        ValueError: a class is missing, the lengths differ, or a score is not finite.
    """
    labels_N, scores_N = checked(labels_N, scores_N)
    order = np.argsort(-scores_N, kind="stable")
    ranked_N, sorted_N = labels_N[order], scores_N[order]
    ends = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
    hits = np.cumsum(ranked_N)[ends]
    precision = hits / (ends + 1)
    return float(np.sum(precision * np.diff(hits, prepend=0)) / labels_N.sum())


def checked(labels_N: np.ndarray, scores_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Validates labels and scores; returns them as int64 and float64.

    Raises:
        ValueError: a class is missing, the lengths differ, or a score is not finite.
    """
    labels_N = np.asarray(labels_N).astype(np.int64).ravel()
    scores_N = np.asarray(scores_N, dtype=np.float64).ravel()
    if len(labels_N) != len(scores_N):
        raise ValueError(f"{len(labels_N)} labels and {len(scores_N)} scores; give one label for each score.")
    if set(np.unique(labels_N)) != {0, 1}:
        raise ValueError("labels must contain both 0 and 1; ranking metrics are undefined for one class.")
    if not np.isfinite(scores_N).all():
        raise ValueError("a score is NaN or infinite. Exclude failed images by their status.")
    return labels_N, scores_N
