"""Slow, simple code for MemSeg's memory and attention: position by position in float64."""

import math

import numpy as np


def recalled(levels: list[np.ndarray], memories: list[np.ndarray], num_neighbors: int) -> list[np.ndarray]:
    """Memory read-out for one image: at every position, the softmax-weighted mean of the nearest memories.

    Args:
        levels: (C, h, w) features per level.
        memories: (M, h, w, C) memory per level.
        num_neighbors: number of nearest memories.
    """
    distances = [
        sum(float(((a.transpose(1, 2, 0) - m[i]) ** 2).mean()) for a, m in zip(levels, memories, strict=True))
        for i in range(len(memories[0]))
    ]
    nearest = sorted(range(len(distances)), key=lambda i: distances[i])[:num_neighbors]
    found = []
    for level, memory in zip(levels, memories, strict=True):
        out = np.empty_like(level)
        for r, c in np.ndindex(*level.shape[1:]):
            squares = [((level[:, r, c] - memory[i, r, c]) ** 2).sum() for i in nearest]
            weights = np.exp([(min(squares) - s) / math.sqrt(len(level)) for s in squares])
            rows = [memory[i, r, c] for i in nearest]
            out[:, r, c] = sum(w * row for w, row in zip(weights / weights.sum(), rows, strict=True))
        found.append(out)
    return found


def coordinate_attention(
    features: np.ndarray, squeeze: np.ndarray, shift: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Coordinate attention of one (C, h, w), line by line, with batch norm folded into `squeeze` and `shift`.

    Args:
        features: (C, h, w).
        squeeze: (R, C) matrix of the shared 1 x 1 convolution.
        shift: (R,) bias of that convolution.
        rows: (C, R + 1) matrix for the row factors, bias last.
        columns: (C, R + 1) matrix for the column factors.
    """

    def factor(mean: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        hidden = squeeze @ mean + shift
        hidden = hidden * np.clip(hidden + 3, 0, 6) / 6
        return 1 / (1 + np.exp(-(matrix[:, :-1] @ hidden + matrix[:, -1])))

    found = features.copy()
    for r in range(features.shape[1]):
        found[:, r, :] *= factor(features[:, r, :].mean(1), rows)[:, None]
    for c in range(features.shape[2]):
        found[:, :, c] *= factor(features[:, :, c].mean(1), columns)[:, None]
    return found
