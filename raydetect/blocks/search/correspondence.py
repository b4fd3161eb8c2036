"""Exact nearest positions of feature pyramids, without materialising the concatenated features.

Shapes: B images, K searched gallery images, C channels, h w feature grid, L levels, finest first,
R rows of a level, P finest rows of a query, Q rows of a gallery image.

A position of the finest grid is described by its own feature and those of the coarser cells that contain it. The
squared distance of two descriptors is the sum over levels of the cells' squared distances D_l, so the minimum over an
image is a nested minimum,

    min_q sum_l D_l(p, q) = min_{q_L} ( D_L + ... min_{q_2 in q_3} ( D_2 + min_{q_1 in q_2} D_1 ) ),

and each level is multiplied only at its own resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydetect.blocks.device_constants import kept_on_device
from raydetect.blocks.search.matrix_product import product

BLOCK_ROWS = 256  # finest query rows per block
GALLERY_ROWS = 4096  # finest gallery rows per block, from one or more images: 4 MB

CPU = torch.device("cpu")

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class PyramidLayout:
    """The row order used to search the cells of a pyramid.

    A level's rows are ordered as (child within a cell, cell of the next level in that level's order), so the children
    of one cell have a fixed stride. A border cell that lacks a child repeats another one, which changes no minimum.

    Attributes:
        grids: (h, w) of every level, finest first.
        order_R: for every level, the cell (row * w + column) of each row.
        children: for every level but the last, the number of rows per row of the next level.
        row_P: the row of every cell of the finest grid.
    """

    grids: tuple[Grid, ...]
    order_R: tuple[Tensor, ...]
    children: tuple[int, ...]
    row_P: Tensor

    @staticmethod
    def of(grids: tuple[Grid, ...], device: torch.device = CPU) -> "PyramidLayout":
        """The layout of a pyramid with these grids, finest first, on the device of the features.

        A level whose grid does not divide the finer one evenly is repeated on the finer grid, by cell centres.
        """
        return _layout(device, grids)

    def to(self, device: torch.device) -> "PyramidLayout":
        """This layout on a device."""
        order_R = tuple(order.to(device) for order in self.order_R)
        return PyramidLayout(self.grids, order_R, self.children, self.row_P.to(device))

    def rows(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps (B, C, h, w), finest first, as rows (B, R, C) in search order, float32."""
        found = []
        for level, order_R in zip(levels, self.order_R, strict=True):
            rows_BPC = level.float().flatten(2).transpose(1, 2)
            found.append(rows_BPC[:, order_R].contiguous())
        return found

    def to_grid(self, values_R: Tensor) -> Tensor:
        """Values of the finest level's rows, arranged on its grid (h, w)."""
        return values_R[self.row_P].view(self.grids[0])


@kept_on_device
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
    row_P = torch.full((len(cells[0]),), len(orders[0]))
    row_P.scatter_reduce_(0, orders[0], torch.arange(len(orders[0])), "amin")
    return PyramidLayout(grids, tuple(orders), tuple(rows * columns for rows, columns in ratios), row_P)


def _fitted(finer: int, size: int) -> tuple[int, int]:
    """(fine cells per coarse cell, coarse cells used) along one axis; (1, finer) if they do not divide evenly."""
    ratio = -(-finer // size)
    return (ratio, size) if -(-finer // ratio) == size else (1, finer)


def _cells(grid: Grid, used: Grid) -> Tensor:
    """The cell of `grid` that contains the centre of each cell of `used`."""
    row, column = (
        ((torch.arange(many) * 2 + 1) * few).div(2 * many, rounding_mode="floor")
        for few, many in zip(grid, used, strict=True)
    )
    return (row[:, None] * grid[1] + column).flatten()


def _children(parents_R: Tensor, finer: Grid, coarser: Grid, ratio: Grid) -> Tensor:
    """Cells of the finer grid: for each child index, the child of every parent."""
    row, column = parents_R // coarser[1], parents_R % coarser[1]
    found = [
        (row * ratio[0] + down).clamp_max(finer[0] - 1) * finer[1] + (column * ratio[1] + right).clamp_max(finer[1] - 1)
        for down in range(ratio[0])
        for right in range(ratio[1])
    ]
    return torch.cat(found)


class PyramidGallery:
    """Pyramids of many images, a few of which are searched per query.

    Attributes:
        levels_NRC: rows of every level as returned by `PyramidLayout.rows`, finest first.
        layout: layout of the images.
    """

    def __init__(self, levels_NRC: Sequence[Tensor], layout: PyramidLayout) -> None:
        """Stores the rows without copying, and their squared norms."""
        self.levels_NRC, self.layout = tuple(levels_NRC), layout
        self._squares_NR = [level.square().sum(2) for level in self.levels_NRC]

    def to(self, device: torch.device) -> "PyramidGallery":
        """This gallery on a device; returns itself if already there."""
        if self.levels_NRC[0].device == device:
            return self
        levels = [level.to(device) for level in self.levels_NRC]
        return PyramidGallery(levels, PyramidLayout.of(self.layout.grids, device))

    def nearest(
        self, query_RC: Sequence[Tensor], layout: PyramidLayout, images_K: Tensor, reach: float | None = None
    ) -> Tensor:
        """Squared distance of every position of an image to its nearest position in some gallery images.

        Exact up to float32 products. Holds BLOCK_ROWS x GALLERY_ROWS distances, or BLOCK_ROWS x one image's rows.

        Args:
            query_RC: the image's rows of every level, finest first.
            layout: layout of the image.
            images_K: indices of the gallery images to search, int64.
            reach: restrict to positions at most this many cells away along rows and columns; None = all. Requires
                equal grids of image and gallery.

        Returns:
            square_hw: squared distances on the image's finest grid.
        """
        num_coarse = len(layout.order_R[-1])
        step = max(1, BLOCK_ROWS * num_coarse // len(layout.order_R[0]))
        found = []
        for start in range(0, num_coarse, step):
            cells = slice(start, min(start + step, num_coarse))
            block = [_cut(rows, num_coarse, cells) for rows in query_RC]
            far_PQ = None
            if reach is not None:
                far_PQ = _far(_cut(layout.order_R[0], num_coarse, cells), self.layout, reach)
            found.append(self._nearest_of_block(block, layout, images_K, far_PQ).view(-1, cells.stop - cells.start))
        return layout.to_grid(torch.cat(found, 1).flatten())

    def _nearest_of_block(
        self, block: Sequence[Tensor], layout: PyramidLayout, images_K: Tensor, far_PQ: Tensor | None
    ) -> Tensor:
        doubled = [-2.0 * rows for rows in block]
        best_P = torch.full((len(block[0]),), torch.inf, device=block[0].device)
        step = max(1, GALLERY_ROWS // self.levels_NRC[0].shape[1])
        for images in images_K.split(step):
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
    """The rows of a level within a run of the coarsest cells."""
    return rows_R.view(-1, num_coarse, *rows_R.shape[1:])[:, cells].flatten(0, 1)


def _nested_minimum(parts: Sequence[Tensor], images: int, layout: PyramidLayout) -> Tensor:
    """The nested minimum (see the module docstring) per finest row, from each level's values (R, images * Q)."""
    total_PQ = parts[0]
    for part_RQ, children in zip(parts[1:], layout.children, strict=True):
        least_PQ = total_PQ.view(len(total_PQ), images, children, -1).amin(2)
        total_PQ = (least_PQ.view(-1, *part_RQ.shape) + part_RQ).view(len(total_PQ), -1)
    return total_PQ.amin(1)


def _far(cells_P: Tensor, other: PyramidLayout, reach: float) -> Tensor:
    """Mask of positions of the other image more than `reach` cells away along rows or columns, (P, Q)."""
    width = other.grids[0][1]
    cells_Q = other.order_R[0]
    rows = (cells_P // width)[:, None] - cells_Q // width
    columns = (cells_P % width)[:, None] - cells_Q % width
    return torch.maximum(rows.abs(), columns.abs()) > reach
