"""Turned hues against torchvision, to the bit."""

import pytest
import torch

from raydetect.blocks.augment.hue import turned_hue
from raydetect.blocks.backbones.vision import transforms
from raydetect.blocks.seeding import keyed_generator


@pytest.mark.parametrize("levels", [2, 8, 255, 1 << 20])  # few levels have many greys and equal channels
@pytest.mark.parametrize("turn", [-0.5, -0.31, -0.1, 0.0, 1 / 6, 0.07, 0.5])
def test_hues_are_torchvisions_to_the_bit(levels: int, turn: float) -> None:
    image_3HW = (torch.rand(3, 67, 41, generator=keyed_generator(0, "hue", levels)) * levels).round() / levels
    assert torch.equal(turned_hue(image_3HW, turn), transforms.adjust_hue(image_3HW, turn))


def test_a_third_of_a_turn_moves_the_channels_on_and_grey_stays() -> None:
    image_3HW = torch.tensor([[[1.0, 0.2, 0.5]], [[0.0, 0.9, 0.5]], [[0.0, 0.4, 0.5]]])
    torch.testing.assert_close(turned_hue(image_3HW, 1 / 3), image_3HW.roll(1, 0))
