"""Slow, simple reference implementations for tests: loops and float64."""

import itertools
import math

import numpy as np


def nearest_rows(patches_ND: np.ndarray, bank_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to all bank rows, and index of the nearest row; from float64 differences."""
    distance = np.empty((len(patches_ND), len(bank_MD)))
    for n, patch in enumerate(patches_ND.astype(np.float64)):
        distance[n] = np.sqrt(((bank_MD.astype(np.float64) - patch) ** 2).sum(1))
    return distance, distance.argmin(1)


def farthest_first(points_NP: np.ndarray, count: int) -> list[int]:
    """Greedy k-center over integer points, with one pass per centre; ties go to the smaller row."""
    points = points_NP.astype(np.int64)
    chosen = [int((points**2).sum(1).argmax())]
    nearest = ((points - points[chosen[0]]) ** 2).sum(1)
    while len(chosen) < count:
        candidates = nearest.copy()
        candidates[chosen] = -1
        chosen.append(int(candidates.argmax()))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1))
    return chosen


def patch_embeddings(levels: list[np.ndarray]) -> np.ndarray:
    """3x3 means with zero padding (always over nine), deeper levels resized bilinearly to the first; (B, h, w, D)."""
    height, width = levels[0].shape[2:]
    parts = []
    for level in levels:
        batch, channels, rows, columns = level.shape
        pooled = np.zeros_like(level, dtype=np.float64)
        padded = np.pad(level.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
        for r in range(rows):
            for c in range(columns):
                pooled[:, :, r, c] = padded[:, :, r : r + 3, c : c + 3].sum((2, 3)) / 9
        grid = np.empty((batch, channels, height, width))
        for r in range(height):
            for c in range(width):
                grid[:, :, r, c] = _bilinear(pooled, (r + 0.5) * rows / height - 0.5, (c + 0.5) * columns / width - 0.5)
        parts.append(grid)
    return np.concatenate(parts, 1).transpose(0, 2, 3, 1)


def _bilinear(level: np.ndarray, row: float, column: float) -> np.ndarray:
    rows, columns = level.shape[2:]
    row, column = max(row, 0.0), max(column, 0.0)
    top, left = min(int(row), rows - 1), min(int(column), columns - 1)
    below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    down, across = row - top, column - left
    upper = level[:, :, top, left] * (1 - across) + level[:, :, top, right] * across
    lower = level[:, :, below, left] * (1 - across) + level[:, :, below, right] * across
    return upper * (1 - down) + lower * down


def reweighted(distance: float, to_neighbours: list[float]) -> float:
    """Equation 7 of PatchCore, as published."""
    return (1 - math.exp(distance) / sum(math.exp(d) for d in to_neighbours)) * distance


def p_value(calibration: list[float], score: float) -> float:
    """(1 + number of calibration scores >= score) / (M + 1)."""
    return (1 + sum(c >= score for c in calibration)) / (len(calibration) + 1)


def regions(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected regions of a mask by flood fill, with 8-connectivity."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = []
    while left:
        region, pending = set(), [left.pop()]
        while pending:
            y, x = pending.pop()
            region.add((y, x))
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    pending.append(near)
        found.append(region)
    return found


def aupro(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    """Mean region overlap at every threshold, integrated along the polyline through these points."""
    every = [
        [float(m[y, x]) for y, x in region] for m, mask in zip(maps, masks, strict=True) for region in regions(mask)
    ]
    normal = [float(v) for m, mask in zip(maps, masks, strict=True) for v in m[mask == 0]]
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for m in maps for v in m.ravel()}, reverse=True):
        rate = sum(v >= threshold for v in normal) / len(normal)
        points.append((rate, sum(sum(v >= threshold for v in r) / len(r) for r in every) / len(every)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < limit and x1 > x0:
            stop = min(x1, limit)
            end = y0 + (y1 - y0) * (stop - x0) / (x1 - x0)
            area += (stop - x0) * (y0 + end) / 2
    return area / limit
