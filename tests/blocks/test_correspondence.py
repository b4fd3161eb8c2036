"""Nested minima over pyramids against every position compared with every other."""

import numpy as np
import pytest
import torch

from raydetect.blocks.search import correspondence
from raydetect.blocks.search.correspondence import PyramidGallery, PyramidLayout
from tests.reference.correspondence import nearest_squares

Grids = tuple[tuple[int, int], ...]
EVEN: Grids = ((8, 12), (4, 6), (2, 3))
ODD: Grids = ((9, 7), (5, 4), (3, 2))  # what strides of two make of an odd size
UNEVEN: Grids = ((6, 7), (4, 7), (4, 3))  # no whole number of cells in a coarser one
FLAT: Grids = ((5, 4), (5, 4), (5, 4))  # a vision transformer


def pyramids(count: int, grids: Grids, seed: int) -> list[torch.Tensor]:
    """(B, C, h, w) of every level, off centre as features after a ReLU are."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3 + 2 * i, *grid, generator=generator) + 1 for i, grid in enumerate(grids)]


def split(levels: list[torch.Tensor], number: int) -> list[np.ndarray]:
    return [level[number].double().numpy() for level in levels]


@pytest.mark.parametrize("grids", [EVEN, ODD, UNEVEN, FLAT, EVEN[:1]])
@pytest.mark.parametrize("other", [EVEN, ODD, UNEVEN, FLAT])
@pytest.mark.parametrize("block_rows", [1, 20, 4096])
def test_the_nested_minimum_is_the_minimum_over_all_positions(
    grids: Grids, other: Grids, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correspondence, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(correspondence, "GALLERY_ROWS", block_rows)
    other = other[: len(grids)]
    queries, stored = pyramids(2, grids, 0), pyramids(4, other, 1)
    layout, its = PyramidLayout.of(grids), PyramidLayout.of(other)
    gallery = PyramidGallery(its.rows(stored), its)
    rows = layout.rows(queries)
    for number, images in enumerate(([0], [3, 1, 2])):
        found = gallery.nearest([level[number] for level in rows], layout, torch.tensor(images))
        expected = nearest_squares(split(queries, number), [split(stored, image) for image in images])
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grids", [EVEN, ODD, FLAT])
@pytest.mark.parametrize("reach", [0, 1.5, 3])
def test_within_reach_only_near_positions_count(grids: Grids, reach: float) -> None:
    levels = pyramids(3, grids, 2)
    layout = PyramidLayout.of(grids)
    rows = layout.rows(levels)
    found = PyramidGallery(rows, layout).nearest([level[0] for level in rows], layout, torch.tensor([1, 2]), reach)
    expected = nearest_squares(split(levels, 0), [split(levels, 1), split(levels, 2)], reach)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grids", [EVEN, ODD, UNEVEN, FLAT])
def test_an_image_in_the_gallery_finds_itself(grids: Grids) -> None:
    layout = PyramidLayout.of(grids)
    rows = layout.rows(pyramids(3, grids, 4))
    found = PyramidGallery(rows, layout).nearest([level[1] for level in rows], layout, torch.tensor([0, 1]))
    assert found.shape == grids[0] and float(found.min()) >= 0 and float(found.max()) < 1e-4


def test_rows_hold_every_cell_and_go_back_to_their_grid() -> None:
    for grids in (EVEN, ODD, UNEVEN, FLAT):
        layout = PyramidLayout.of(grids)
        for order, grid in zip(layout.order_R, grids, strict=True):
            assert sorted(set(order.tolist())) == list(range(grid[0] * grid[1]))
        values = torch.arange(grids[0][0] * grids[0][1])
        assert torch.equal(layout.to_grid(values[layout.order_R[0]]), values.view(grids[0]))
