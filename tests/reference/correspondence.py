"""Slow correspondences between feature pyramids, position by position in float64."""

import numpy as np

Levels = list[np.ndarray]  # (C, h, w), finest first


def described(levels: Levels) -> np.ndarray:
    """(h, w, D): for each position of the finest grid, the features of the cells that contain it."""
    height, width = levels[0].shape[1:]
    rows = cells_of([level.shape[1] for level in levels])
    columns = cells_of([level.shape[2] for level in levels])
    grid = np.empty((height, width, sum(len(level) for level in levels)))
    for row in range(height):
        for column in range(width):
            cells = zip(levels, rows[row], columns[column], strict=True)
            grid[row, column] = np.concatenate([level[:, r, c] for level, r, c in cells])
    return grid


def cells_of(sizes: list[int]) -> list[list[int]]:
    """For each position on one axis of the finest level, its cell at each level.

    As with strides, a coarse cell contains a whole number of finer cells, the last one possibly fewer. If no number
    fits, the coarse level is stretched over the finer one.
    """
    found = []
    for position in range(sizes[0]):
        cells, used = [position], sizes[0]
        inside = position
        for size in sizes[1:]:
            number = 1
            while number * size < used:
                number += 1
            if len({i // number for i in range(used)}) == size:
                inside, used = inside // number, size
                cells.append(inside)
            else:
                cells.append(int((inside + 0.5) * size / used))
        found.append(cells)
    return found


def nearest_squares(image: Levels, others: list[Levels], reach: float | None = None) -> np.ndarray:
    """Squared distance of each position to the nearest one in other images; `reach` in cells along both axes."""
    grid = described(image)
    galleries = [described(other) for other in others]
    found = np.empty(grid.shape[:2])
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            best = np.inf
            for gallery in galleries:
                square = ((gallery - grid[row, column]) ** 2).sum(2)
                if reach is not None:
                    rows, columns = np.indices(square.shape)
                    far = np.maximum(abs(rows - row), abs(columns - column)) > reach
                    square = np.where(far, np.inf, square)
                best = min(best, square.min())
            found[row, column] = best
    return found
