"""The mean of keyed rows against numpy, and on several workers to the bit."""

import numpy as np
import torch

from raydetect.blocks.coresets import keyed_rows
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import KeyedRows
from raydetect.blocks.coresets.mean_rows import mean_rows
from tests.builders.group import together

IMAGES, ROWS, DIMS = 13, 700, 3


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale_I11 = 10.0 ** torch.arange(-6, 7)[:, None, None]
    return torch.randn(IMAGES, ROWS, DIMS, generator=generator) * scale_I11


def stored(group: Group, order: list[int]) -> KeyedRows:
    rows, values_IRD = KeyedRows(DIMS, group), values()
    for image in order[group.rank :: group.size]:
        rows.add(f"image-{image}", values_IRD[image])
    return rows


def test_it_is_the_mean_of_every_row() -> None:
    assert IMAGES * ROWS > keyed_rows.BLOCK_ROWS  # so that blocks end within images
    found = mean_rows(stored(Group(), list(range(IMAGES))), ROWS).numpy()
    largest = float(values().abs().max())
    np.testing.assert_allclose(found, values().double().numpy().mean(0), rtol=0, atol=largest * 2.0**-39)


def test_it_is_the_same_to_the_bit_in_any_order_and_on_any_number_of_workers() -> None:
    one = mean_rows(stored(Group(), list(range(IMAGES))), ROWS)
    backwards = list(range(IMAGES))[::-1]
    assert torch.equal(mean_rows(stored(Group(), backwards), ROWS), one)
    for size in (2, 3, 14):  # the last has a worker without images
        for other in together(size, lambda group: mean_rows(stored(group, backwards), ROWS)):
            assert torch.equal(other, one)


def test_rows_of_zeros_have_a_mean_of_zero() -> None:
    rows = KeyedRows(2, Group())
    rows.add("a", torch.zeros(3, 2))
    assert torch.equal(mean_rows(rows, 3), torch.zeros(3, 2, dtype=torch.float64))
