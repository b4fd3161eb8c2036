"""DRAEM: one network repairs images with simulated defects, a second one finds the defects by comparing the two.

The second learns from the difference of both what a defect is, so it need not be known how real ones look.

Source: Zavrtanik, Kristan and Skocaj, "DRAEM - A discriminatively trained reconstruction embedding for surface anomaly
detection", ICCV 2021, arXiv 2108.07610; where the paper is silent, its code.
Differs from the paper: the learning rate falls as in the code (the paper: to a tenth after 400 and 600 epochs); without
`textures`, defects are made of procedural textures instead of the DTD data set; saturation of textures changes by a
factor; an epoch sees every image once instead of drawing as many with replacement.

Shapes: B images, C channels, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from raydetect.blocks.losses import focal_loss, ssim_loss
from raydetect.blocks.seeding import keyed_generator
from raydetect.blocks.synthesis import blend, perlin_mask, turned, uniform
from raydetect.blocks.textures import Textures, varied
from raydetect.blocks.unet import UpConvolution, convolutions, cropped, keyed_init, normal_init, padded
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._textures import load_textures

RECONSTRUCTION, SEGMENTATION = "reconstruction", "segmentation"
RECONSTRUCTION_WIDTHS = (1, 2, 4, 8, 8)
SEGMENTATION_WIDTHS = (1, 2, 4, 8, 8, 8)
UP_WIDTHS = (8, 4, 2, 1, 1)
MULTIPLE = 2 ** (len(SEGMENTATION_WIDTHS) - 1)
LEAST_OPACITY = 0.1
MAX_TURN = 45
FOCAL_GAMMA = 2.0
SMOOTHING_PX = 21


class DRAEM(NetworkDetector):
    """Segmentation of what a reconstruction repaired."""

    info = DetectorInfo(
        title="DRAEM",
        paper="arXiv:2108.07610",
        venue="ICCV 2021",
        summary="a network learns on simulated defects to find them by what a reconstruction repairs",
        published="MVTec AD: 98.0 image AUROC, 97.3 pixel AUROC (paper, tables 1-2)",
    )
    phases = ("train",)
    smoke: ClassVar = {
        "image_size": (64, 64),
        "base_width": 16,
        "anomalous_ratio": 0.9,
        "turned_ratio": 0.0,
        "epochs": 20,
        "batch_size": 4,
        "learning_rate": 2e-3,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of DRAEM."""

        textures: Annotated[
            str | None,
            Field(
                description="folder or archive of images that defects are made of, such as DTD (sec. 4); none = "
                "procedural textures"
            ),
        ] = None
        base_width: Annotated[
            int,
            Field(
                ge=2,
                multiple_of=2,
                description="channels of the reconstruction's first level, twice those of the segmentation's (code)",
            ),
        ] = 128
        anomalous_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of images that get a simulated defect (code)")
        ] = 0.5
        turned_ratio: Annotated[
            float,
            Field(ge=0, le=1, description="share of images that are turned first (code), by up to 45 degrees (sec. 4)"),
        ] = 0.3
        epochs: Annotated[int, Field(ge=1, description="passes over the images (sec. 4)")] = 700
        batch_size: Annotated[int, Field(ge=1, description="images per step (sec. 4)")] = 8
        learning_rate: Annotated[
            float,
            Field(gt=0, description="of Adam (sec. 4); a fifth of it after 0.8, again after 0.9 of the epochs (code)"),
        ] = 1e-4

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Keeps the parameters."""
        super().__init__(params, seed)
        self.textures = Textures()

    def load_weights(self) -> str:
        """Reads the textures."""
        if self.params.textures is None:
            return "from scratch"
        images, said = load_textures(self.params.textures, self.params.image_size)
        self.textures = Textures(images)
        return f"from scratch, {said}"

    def make_networks(self) -> dict[str, nn.Module]:
        """Both networks, initialised by the seed."""
        with keyed_init(self.seed, "draem"):
            networks: dict[str, nn.Module] = {
                RECONSTRUCTION: ReconstructionNet(self.params.base_width),
                SEGMENTATION: SegmentationNet(self.params.base_width // 2),
            }
            for network in networks.values():
                normal_init(network)
        return networks

    def begin_training(self, num_images: int) -> TrainingPlan:
        """Fresh networks under Adam."""
        self.is_fitted = False
        self.networks = {
            name: network.to(self.device).to(memory_format=torch.channels_last).train()
            for name, network in self.make_networks().items()
        }
        both = nn.ModuleDict(self.networks)
        optimizer = torch.optim.Adam(both.parameters(), lr=self.params.learning_rate, fused=True)
        first, second = 0.8 * self.params.epochs, 0.9 * self.params.epochs

        def rate(done: float) -> float:
            return 0.2 ** ((done >= first) + (done >= second))

        return TrainingPlan(both, optimizer, self.params.epochs, self.params.batch_size, rate)

    def training_loss(self, piece: Batch) -> Tensor:
        """L2 and SSIM of the repaired images, focal loss of the masks (secs. 3.1-3.2)."""
        words = zip(piece.images_BCHW.float() / 255, piece.keys, strict=True)
        made = [self._simulated(image, keyed_generator(self.seed, "draem", key, piece.epoch)) for image, key in words]
        images, damaged, masks = (torch.stack(parts) for parts in zip(*made, strict=True))
        repaired, anomalous = self._forward(damaged)
        loss = F.mse_loss(repaired.float(), images) + ssim_loss(repaired, images)
        return loss + focal_loss(anomalous, masks, FOCAL_GAMMA)

    def end_training(self) -> None:
        """Freezes both networks."""
        self.freeze()

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """The map of probabilities; the image score is the maximum of its 21 x 21 means (sec. 3.4)."""
        self.require_fitted()
        map_BHW = self._forward(images_BCHW.float() / 255)[1]
        means = F.avg_pool2d(map_BHW[:, None], SMOOTHING_PX, 1, SMOOTHING_PX // 2)
        return Scores(means.flatten(1).amax(1), map_BHW)

    def _simulated(self, image_3HW: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The image, the same with a defect or without, and the mask of the defect (sec. 3.3)."""
        size_px = (image_3HW.shape[-2], image_3HW.shape[-1])
        if uniform(0, 1, generator) < self.params.turned_ratio:
            image_3HW = turned(image_3HW, uniform(-MAX_TURN, MAX_TURN, generator))
        if uniform(0, 1, generator) >= self.params.anomalous_ratio:
            return image_3HW, image_3HW, torch.zeros(size_px, device=image_3HW.device)
        texture = varied(self.textures.draw(size_px, generator), generator).to(image_3HW.device)
        mask = perlin_mask(size_px, generator).to(image_3HW.device)
        damaged = blend(image_3HW, texture, mask, opacity=uniform(LEAST_OPACITY, 1, generator))
        return image_3HW, damaged, mask.float()

    def _forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Repaired images and the probability of being anomalous, float32 (B, H, W)."""
        wide = padded(images_B3HW, MULTIPLE).contiguous(memory_format=torch.channels_last)
        repaired = self.networks[RECONSTRUCTION](wide)
        logits_B2HW = self.networks[SEGMENTATION](torch.cat([repaired, wide], 1))
        size_px = images_B3HW.shape[-2:]
        return cropped(repaired, size_px), cropped(logits_B2HW.float().softmax(1)[:, 1], size_px)


def _encoder(in_channels: int, widths: Sequence[int]) -> nn.ModuleList:
    """Double convolutions of every level; the levels halve by max-pooling."""
    blocks = nn.ModuleList()
    for width in widths:
        blocks.append(convolutions(in_channels, width, width))
        in_channels = width
    return blocks


def _levels(blocks: nn.ModuleList, images: Tensor) -> list[Tensor]:
    """Features of all levels, shallowest first."""
    found = [blocks[0](images)]
    for block in list(blocks)[1:]:
        found.append(block(F.max_pool2d(found[-1], 2)))
    return found


class ReconstructionNet(nn.Module):
    """Encoder and decoder without skips (fig. 3; widths and blocks as in the code)."""

    def __init__(self, base_width: int) -> None:
        """Builds it."""
        super().__init__()
        widths = [base_width * n for n in RECONSTRUCTION_WIDTHS]
        self.down = _encoder(3, widths)
        self.up = nn.ModuleList()
        for width, next_width in pairwise(base_width * n for n in UP_WIDTHS):
            self.up.append(nn.Sequential(UpConvolution(width, width), convolutions(width, width, next_width)))
        self.last = nn.Conv2d(base_width, 3, 3, padding=1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Repaired images; the output is linear."""
        found = _levels(self.down, images_B3HW)[-1]
        for up in self.up:
            found = up(found)
        return self.last(found)


class SegmentationNet(nn.Module):
    """A U-Net over the repaired and the given image (fig. 4; widths and blocks as in the code)."""

    def __init__(self, base_width: int) -> None:
        """Builds it."""
        super().__init__()
        widths = [base_width * n for n in SEGMENTATION_WIDTHS]
        self.down = _encoder(6, widths)
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        below = widths[-1]
        for skip, width in zip(widths[-2::-1], (base_width * n for n in UP_WIDTHS), strict=True):
            self.up.append(UpConvolution(below, width))
            self.merge.append(convolutions(width + skip, width, width))
            below = width
        self.last = nn.Conv2d(base_width, 2, 3, padding=1)

    def forward(self, images_B6HW: Tensor) -> Tensor:
        """Logits (B, 2, H, W): normal, anomalous."""
        levels = _levels(self.down, images_B6HW)
        found = levels.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            found = merge(torch.cat([up(found), levels.pop()], 1))
        return self.last(found)
