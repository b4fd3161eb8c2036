"""Slow pooling of feature pyramids to patch embeddings of a given width."""

import math

import numpy as np


def adaptive_means(values_K: np.ndarray, dims: int) -> np.ndarray:
    """Element i is the mean of the values from floor(i K / D) to ceil((i + 1) K / D), exclusive."""
    count = len(values_K)
    return np.array(
        [values_K[i * count // dims : math.ceil((i + 1) * count / dims)].mean() for i in range(dims)], np.float64
    )


def pooled_patch_embeddings(levels: list[np.ndarray], dims: int) -> np.ndarray:
    """Pools each level position by position, then all levels together; (B, h, w, D) in float64."""
    batch, _, height, width = levels[0].shape
    grids = []
    for level in levels:
        rows, columns = level.shape[2:]
        padded = np.pad(level.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
        grid = np.empty((batch, rows, columns, dims))
        for b in range(batch):
            for r in range(rows):
                for c in range(columns):
                    grid[b, r, c] = adaptive_means(padded[b, :, r : r + 3, c : c + 3].ravel(), dims)
        grids.append(resized(resized(grid, 1, height), 2, width))
    both = np.stack(grids, 3).reshape(batch, height, width, -1)
    return np.apply_along_axis(adaptive_means, 3, both, dims)


def resized(grid: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Linear interpolation of one axis between pixel centres, constant beyond the outermost ones."""
    positions = (np.arange(length) + 0.5) * grid.shape[axis] / length - 0.5
    return np.apply_along_axis(lambda line: np.interp(positions, np.arange(len(line)), line), axis, grid)
