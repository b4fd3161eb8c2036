"""Nearest positions of feature pyramids, exact, without ever writing the concatenated features.

Shapes: B images, K images of the gallery that are searched, C channels, h w feature grid, L levels, finest first,
R rows of a level, P finest rows of a query, Q rows of a gallery image.

A position of the finest grid is described by every level's feature there: its own, and those of the coarser cells that
it lies in. The squared distance of two such descriptions is the sum over levels of the cells' squared distances D_l,
so that the smallest over an image is a nested minimum,

    min_q sum_l D_l(p, q) = min_{q_L} ( D_L + ... min_{q_2 in q_3} ( D_2 + min_{q_1 in q_2} D_1 ) ),

and every level is multiplied at its own resolution alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from raydetect.blocks.product import product

BLOCK_ROWS = 256  # finest rows of a query that are compared together
GALLERY_ROWS = 4096  # with so many finest rows of the gallery, of one image or more: 4 MB

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class PyramidLayout:
    """The order in which the cells of a pyramid are searched.

    A level's rows are (children of a cell, cells of the next level in its own order), so that those of one cell lie a
    fixed step apart. A cell at the border that lacks a child has another one twice, which changes no minimum.

    Attributes:
        grids: (h, w) of every level, finest first.
        order_R: for every level, the cell (row * w + column) of each row.
        children: for every level but the last, how many rows each row of the next level has.
        place_P: the row of every cell of the finest grid.
    """

    grids: tuple[Grid, ...]
    order_R: tuple[Tensor, ...]
    children: tuple[int, ...]
    place_P: Tensor

    @staticmethod
    @lru_cache(maxsize=64)
    def of(grids: tuple[Grid, ...]) -> "PyramidLayout":
        """The layout of a pyramid with these grids, finest first.

        A level whose cells do not hold a whole number of the finer level's is repeated on the finer grid, by centres.
        """
        with torch.inference_mode(False):
            return _layout(grids)

    def rows(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps (B, C, h, w), finest first, as rows (B, R, C) in order, float32."""
        found = []
        for level, order_R in zip(levels, self.order_R, strict=True):
            rows_BPC = level.float().flatten(2).transpose(1, 2)
            found.append(rows_BPC[:, order_R.to(level.device)].contiguous())
        return found

    def to_grid(self, values_R: Tensor) -> Tensor:
        """Values of the finest level's rows on its grid, (h, w)."""
        return values_R[self.place_P.to(values_R.device)].view(self.grids[0])


def _layout(grids: tuple[Grid, ...]) -> PyramidLayout:
    used, cells, ratios = [grids[0]], [_cells(grids[0], grids[0])], []
    for grid in grids[1:]:
        pairs = [_fitted(finer, size) for finer, size in zip(used[-1], grid, strict=True)]
        ratios.append((pairs[0][0], pairs[1][0]))
        used.append((pairs[0][1], pairs[1][1]))
        cells.append(_cells(grid, used[-1]))
    orders = [torch.arange(used[-1][0] * used[-1][1])]
    for finer, coarser, ratio in zip(used[-2::-1], used[:0:-1], ratios[::-1], strict=True):
        orders.append(_children(orders[-1], finer, coarser, ratio))
    orders = [cell[order] for cell, order in zip(cells, orders[::-1], strict=True)]
    place_P = torch.full((len(cells[0]),), len(orders[0]))
    place_P.scatter_reduce_(0, orders[0], torch.arange(len(orders[0])), "amin")
    return PyramidLayout(grids, tuple(orders), tuple(rows * columns for rows, columns in ratios), place_P)


def _fitted(finer: int, size: int) -> tuple[int, int]:
    """(fine cells in a coarse one, coarse cells used) along one axis; 1 and the finer size where none fits."""
    ratio = -(-finer // size)
    return (ratio, size) if -(-finer // ratio) == size else (1, finer)


def _cells(grid: Grid, used: Grid) -> Tensor:
    """The cell of `grid` in which the centre of each cell of `used` lies."""
    row, column = (
        ((torch.arange(many) * 2 + 1) * few).div(2 * many, rounding_mode="floor")
        for few, many in zip(grid, used, strict=True)
    )
    return (row[:, None] * grid[1] + column).flatten()


def _children(parents_R: Tensor, finer: Grid, coarser: Grid, ratio: Grid) -> Tensor:
    """Cells of the finer grid: for each child in turn, that of every parent."""
    row, column = parents_R // coarser[1], parents_R % coarser[1]
    found = [
        (row * ratio[0] + down).clamp_max(finer[0] - 1) * finer[1] + (column * ratio[1] + right).clamp_max(finer[1] - 1)
        for down in range(ratio[0])
        for right in range(ratio[1])
    ]
    return torch.cat(found)


class PyramidGallery:
    """Pyramids of many images, of which a few are searched for each query.

    Attributes:
        levels_NRC: rows of every level as `PyramidLayout.rows` gives them, finest first.
        layout: of the images.
    """

    def __init__(self, levels_NRC: Sequence[Tensor], layout: PyramidLayout) -> None:
        """Keeps the rows, not copied, and the squared length of each."""
        self.levels_NRC, self.layout = tuple(levels_NRC), layout
        self._squares_NR = [level.square().sum(2) for level in self.levels_NRC]

    def to(self, device: torch.device) -> "PyramidGallery":
        """This gallery on another device; itself when it is there already."""
        if self.levels_NRC[0].device == device:
            return self
        return PyramidGallery([level.to(device) for level in self.levels_NRC], self.layout)

    def nearest(
        self, query_RC: Sequence[Tensor], layout: PyramidLayout, images_K: Sequence[int], reach: float | None = None
    ) -> Tensor:
        """Squared distance of every position of an image to the nearest position of some images of the gallery.

        Exact up to float32 products. It holds BLOCK_ROWS times GALLERY_ROWS distances, or times one image's rows.

        Args:
            query_RC: the image's rows of every level, finest first.
            layout: of the image.
            images_K: the images of the gallery that are searched.
            reach: only positions that are at most so many cells away along rows and along columns; None = all. The
                grids of image and gallery are then the same.

        Returns:
            square_hw: on the image's finest grid.
        """
        num_coarse = len(layout.order_R[-1])
        step = max(1, BLOCK_ROWS * num_coarse // len(layout.order_R[0]))
        found = []
        for start in range(0, num_coarse, step):
            cells = slice(start, min(start + step, num_coarse))
            block = [_cut(rows, num_coarse, cells) for rows in query_RC]
            far_PQ = None
            if reach is not None:
                far_PQ = _far(_cut(layout.order_R[0], num_coarse, cells), self.layout, reach).to(query_RC[0].device)
            found.append(self._nearest_of_block(block, layout, images_K, far_PQ).view(-1, cells.stop - cells.start))
        return layout.to_grid(torch.cat(found, 1).flatten())

    def _nearest_of_block(
        self, block: Sequence[Tensor], layout: PyramidLayout, images_K: Sequence[int], far_PQ: Tensor | None
    ) -> Tensor:
        doubled = [-2.0 * rows for rows in block]
        best_P = torch.full((len(block[0]),), torch.inf, device=block[0].device)
        step = max(1, GALLERY_ROWS // self.levels_NRC[0].shape[1])
        for start in range(0, len(images_K), step):
            images = list(images_K[start : start + step])
            parts = [
                product(rows, level[images].flatten(0, 1), squares[images].flatten())
                for rows, level, squares in zip(doubled, self.levels_NRC, self._squares_NR, strict=True)
            ]
            if far_PQ is not None:
                parts[0].view(len(far_PQ), len(images), -1).masked_fill_(far_PQ[:, None], torch.inf)
            torch.minimum(best_P, _nested_minimum(parts, len(images), self.layout), out=best_P)
        squares = [rows.square().sum(1) for rows in block]
        total_P = squares[-1]
        for square_P, count in zip(squares[-2::-1], layout.children[::-1], strict=True):
            total_P = (square_P.view(count, -1) + total_P).flatten()
        return (best_P + total_P).clamp_min_(0)


def _cut(rows_R: Tensor, num_coarse: int, cells: slice) -> Tensor:
    """The rows of a level that lie in a run of the coarsest cells."""
    return rows_R.view(-1, num_coarse, *rows_R.shape[1:])[:, cells].flatten(0, 1)


def _nested_minimum(parts: Sequence[Tensor], images: int, its: PyramidLayout) -> Tensor:
    """The minimum at the top of the file for every finest row, from each level's own values (R, images * Q)."""
    total_PQ = parts[0]
    for part_RQ, children in zip(parts[1:], its.children, strict=True):
        least_PQ = total_PQ.view(len(total_PQ), images, children, -1).amin(2)
        total_PQ = (least_PQ.view(-1, *part_RQ.shape) + part_RQ).view(len(total_PQ), -1)
    return total_PQ.amin(1)


def _far(cells_P: Tensor, other: PyramidLayout, reach: float) -> Tensor:
    """Which positions of the other image are more than `reach` cells away along rows or columns, (P, Q)."""
    width = other.grids[0][1]
    cells_Q = other.order_R[0]
    rows = (cells_P // width)[:, None] - cells_Q // width
    columns = (cells_P % width)[:, None] - cells_Q % width
    return torch.maximum(rows.abs(), columns.abs()) > reach
