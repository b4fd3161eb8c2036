"""Plants simulated defects into a normal image, as training data in place of real defects.

Shapes: C channels (RGB), H W pixels.

Source: DRAEM (arXiv 2108.07610), sec. 3.3: a partly opaque texture where Perlin noise is high; MemSeg (arXiv
2205.00908), sec. 3.1: shuffled tiles of the image.
"""

import torch
from torch import Generator, Tensor

from raydetect.blocks.augment.synthesis import blend, perlin_mask, shuffled_tiles, uniform
from raydetect.blocks.augment.textures import procedural_texture

TILES = (8, 4)
OPACITY = (0.2, 1.0)
VISIBLE = 8.0  # of 255, mean over channels


def simulate_defect(image_CHW: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """A uint8 image with simulated defects, and their mask.

    Args:
        image_CHW: uint8; not modified.
        generator: CPU generator, the only source of randomness.

    Returns:
        simulated_CHW: uint8.
        mask_HW: bool, True where the change is visible; may be empty.
    """
    size_px = (image_CHW.shape[1], image_CHW.shape[2])
    mask_HW, share_CHW = perlin_mask(size_px, generator).to(image_CHW.device), image_CHW.float() / 255
    if uniform(0, 1, generator) < 0.5:
        source_CHW = procedural_texture(size_px, generator).to(share_CHW)
    else:
        source_CHW = shuffled_tiles(share_CHW, TILES, generator)
    blended_CHW = 255 * blend(share_CHW, source_CHW, mask_HW, uniform(*OPACITY, generator))
    simulated_CHW = blended_CHW.round().clamp(0, 255).to(torch.uint8)
    return simulated_CHW, (simulated_CHW.float() - image_CHW.float()).abs().mean(0) > VISIBLE
