"""Rotation against torchvision's, bit by bit."""

import pytest
import torch

from raydetect.blocks.backbones.vision import InterpolationMode, transforms
from raydetect.blocks.maps.rotation import rotated


@pytest.mark.parametrize("size_px", [(64, 64), (33, 50)])
@pytest.mark.parametrize("degrees", [0.0, -0.0, 1.0, -22.5, 37.3, 90.0, -90.0, 135.0, 180.0, -180.0, 360.0])
def test_rotation_equals_torchvisions_to_the_bit(size_px: tuple[int, int], degrees: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, *size_px), dtype=torch.uint8, generator=generator)
    slopes = torch.randn(2, 3, *size_px, generator=generator)
    for images in (pixels, slopes):
        assert torch.equal(rotated(images, degrees), transforms.rotate(images, degrees))
        bilinear = transforms.rotate(images, degrees, InterpolationMode.BILINEAR)
        assert torch.equal(rotated(images, degrees, "bilinear"), bilinear)
