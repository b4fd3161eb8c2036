"""Random rotations of training images.

Shapes: C channels, H W pixels.
"""

from torch import Tensor

from raydetect.blocks.backbones.vision import transforms
from raydetect.blocks.seeding import keyed_unit


def randomly_turned(image_CHW: Tensor, max_degrees: float, seed: int, *key: str | int) -> Tensor:
    """The image rotated about its centre by up to `max_degrees` in either direction.

    The angle is determined by the seed and the key, such as an image's and the epoch's. Pixels are those of the nearest
    neighbour, outside the image 0, as by torchvision's RandomRotation.
    """
    return transforms.rotate(image_CHW, max_degrees * (2 * keyed_unit(seed, "turn", *key) - 1))
