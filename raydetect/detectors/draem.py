"""DRAEM: one network repairs images with simulated defects, a second one segments the defects from both images.

The second network learns to recognise defects from image and repair, so no examples of real defects are needed.

Source: Zavrtanik, Kristan and Skocaj, "DRAEM - A discriminatively trained reconstruction embedding for surface anomaly
detection", ICCV 2021, arXiv 2108.07610; where the paper is silent, the authors' code ("code" below).
Differs from the paper: without `textures`, defects use procedural textures instead of the DTD data set; of `textures`,
at most 1,000 are used, where the code uses all 5,640 of DTD; the saturation of textures is scaled by a factor, and
their autocontrast stretches all values, where the code first cuts 0 to 20 % at either end; an epoch uses every image
once, where the code samples with replacement; the last epoch is used.

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

from raydetect.blocks.augment.synthesis import blend, perlin_mask, rotated, uniform
from raydetect.blocks.augment.textures import Textures, varied
from raydetect.blocks.networks.losses import focal_loss, ssim_loss
from raydetect.blocks.networks.unet import UpConvolution, convolutions, cropped, keyed_init, normal_init, padded
from raydetect.blocks.precision import in_float32
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._textures import load_textures

RECONSTRUCTION, SEGMENTATION = "reconstruction", "segmentation"
RECONSTRUCTION_WIDTHS = (1, 2, 4, 8, 8)  # per level, in base widths
SEGMENTATION_WIDTHS = (1, 2, 4, 8, 8, 8)
UP_WIDTHS = (8, 4, 2, 1, 1)
MULTIPLE = 2 ** (len(SEGMENTATION_WIDTHS) - 1)
MILESTONES = (400 / 700, 600 / 700)
LEAST_OPACITY = 0.1
MAX_TURN = 45
FOCAL_GAMMA = 2.0


class DRAEM(NetworkDetector):
    """Segmentation of the regions that a reconstruction network repairs."""

    info = DetectorInfo(
        title="DRAEM",
        paper="arXiv:2108.07610",
        venue="ICCV 2021",
        summary="a network trained on simulated defects segments what a reconstruction repairs",
        published="MVTec AD: 98.0 image AUROC, 97.3 pixel AUROC (paper, tables 1-2)",
    )
    phases = ("train",)
    smoke: ClassVar = {
        "image_size": (64, 64),
        "base_width": 8,
        "anomalous_ratio": 0.9,
        "turned_ratio": 0.0,
        "epochs": 40,
        "learning_rate": 2e-3,
        "smoothing_px": 5,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of DRAEM."""

        textures: Annotated[
            str | None,
            Field(
                description="folder or archive of texture images for defects, such as DTD (sec. 4), of which at most "
                "1,000 are used; none = procedural textures"
            ),
        ] = None
        base_width: Annotated[
            int,
            Field(
                ge=2,
                multiple_of=2,
                description="channels of the reconstruction's first level; the segmentation has half (code)",
            ),
        ] = 128
        anomalous_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of images given a simulated defect (code)")
        ] = 0.5
        turned_ratio: Annotated[
            float,
            Field(ge=0, le=1, description="share of images rotated first (code), by up to 45 degrees (sec. 4)"),
        ] = 0.3
        ssim_weight: Annotated[float, Field(ge=0, description="lambda of the SSIM loss (eq. 2; value: code)")] = 1.0
        epochs: Annotated[int, Field(ge=1, description="passes over the images (sec. 4)")] = 700
        batch_size: Annotated[int, Field(ge=1, description="images per step (code)")] = 8
        learning_rate: Annotated[
            float, Field(gt=0, description="of Adam; divided by 10 after 4/7 and 6/7 of the epochs (sec. 4)")
        ] = 1e-4
        smoothing_px: Annotated[
            int,
            Field(
                ge=1,
                description="side of the mean filter, odd; the image score is the maximum of the filtered map (eq. 6; "
                "value for images of 256 px: code)",
            ),
        ] = 21

        def __post_init__(self) -> None:
            if self.smoothing_px % 2 == 0:
                raise ValueError(f"smoothing_px {self.smoothing_px} must be odd, so that the filter has a centre")

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self._textures = Textures()

    def load_weights(self) -> str:
        """Reads the textures."""
        if self.params.textures is None:
            return "from scratch"
        images, source = load_textures(self.params.textures, self.params.image_size)
        self._textures = Textures(images)
        return f"from scratch, {source}"

    def make_networks(self) -> dict[str, nn.Module]:
        """Both networks, initialised from the seed."""
        with keyed_init(self.seed, "draem"):
            networks: dict[str, nn.Module] = {
                RECONSTRUCTION: ReconstructionNet(self.params.base_width),
                SEGMENTATION: SegmentationNet(self.params.base_width // 2),
            }
            for network in networks.values():
                normal_init(network)
        return networks

    def begin_training(self, num_images: int) -> TrainingPlan:
        """New networks, optimised by Adam."""
        self.is_fitted = False
        both = nn.ModuleDict(self.make_networks())
        both.to(self.device).to(memory_format=torch.channels_last).train()
        self.networks = dict(both.items())
        optimizer = torch.optim.Adam(both.parameters(), lr=self.params.learning_rate, fused=True)
        milestones = [share * self.params.epochs for share in MILESTONES]
        return TrainingPlan(
            both,
            optimizer,
            self.params.epochs,
            self.params.batch_size,
            rate=lambda done: 0.1 ** sum(done >= milestone for milestone in milestones),
        )

    def prepare_image(self, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        """See `_simulated`."""
        return self._simulated(image_3HW.float() / 255, keyed_generator(self.seed, "draem", key, epoch))

    def training_loss(self, piece: Batch) -> Tensor:
        """L2 and SSIM losses of the repaired images, focal loss of the masks (eqs. 2-4)."""
        images, damaged, masks = piece.prepared
        repaired, anomalous = self._forward(damaged)
        loss = F.mse_loss(repaired, images) + self.params.ssim_weight * ssim_loss(repaired, images)
        return loss + focal_loss(anomalous, masks, FOCAL_GAMMA)

    def end_training(self) -> None:
        """Freezes both networks."""
        self.freeze()

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """The probability map; the image score is the maximum of its local means (eq. 6)."""
        self.require_fitted()
        map_BHW = self._forward(images_BCHW.float() / 255)[1]
        side = self.params.smoothing_px
        means = F.avg_pool2d(map_BHW[:, None], side, 1, side // 2)
        return Scores(means.flatten(1).amax(1), map_BHW)

    def _simulated(self, image_3HW: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The image, a copy with or without a simulated defect, and the defect's mask (sec. 3.3)."""
        size_px = (image_3HW.shape[-2], image_3HW.shape[-1])
        if uniform(0, 1, generator) < self.params.turned_ratio:
            image_3HW = rotated(image_3HW, uniform(-MAX_TURN, MAX_TURN, generator))
        if uniform(0, 1, generator) >= self.params.anomalous_ratio:
            return image_3HW, image_3HW, torch.zeros(size_px)
        texture = varied(self._textures.draw(size_px, generator), generator)
        mask = perlin_mask(size_px, generator)
        damaged = blend(image_3HW, texture, mask, uniform(LEAST_OPACITY, 1, generator))
        return image_3HW, damaged, mask.float()

    def _forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Repaired images and anomaly probabilities, float32 (B, H, W)."""
        wide = padded(images_B3HW, MULTIPLE).contiguous(memory_format=torch.channels_last)
        repaired = self.run(self.networks[RECONSTRUCTION], wide)
        logits_B2HW = self.run(self.networks[SEGMENTATION], torch.cat([repaired, wide], 1))
        size_px = images_B3HW.shape[-2:]
        return cropped(repaired, size_px), cropped(logits_B2HW.softmax(1)[:, 1], size_px)


def _encoder(in_channels: int, widths: Sequence[int]) -> nn.ModuleList:
    """Double convolutions for every level; max-pooling halves the size between levels."""
    return nn.ModuleList(
        convolutions(above, width, width) for above, width in zip((in_channels, *widths), widths, strict=False)
    )


def _levels(blocks: nn.ModuleList, images: Tensor) -> list[Tensor]:
    """Features of all levels, shallowest first."""
    found = [blocks[0](images)]
    for block in list(blocks)[1:]:
        found.append(block(F.max_pool2d(found[-1], 2)))
    return found


class ReconstructionNet(nn.Module):
    """Encoder and decoder without skip connections (sec. 3.1; widths and blocks: code)."""

    def __init__(self, base_width: int) -> None:
        """Builds the network."""
        super().__init__()
        self.down = _encoder(3, [base_width * n for n in RECONSTRUCTION_WIDTHS])
        self.up = nn.ModuleList(
            nn.Sequential(UpConvolution(width, width), convolutions(width, width, next_width))
            for width, next_width in pairwise(base_width * n for n in UP_WIDTHS)
        )
        self.last = nn.Conv2d(base_width, 3, 3, padding=1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Repaired images; the output is linear."""
        found = _levels(self.down, images_B3HW)[-1]
        for up in self.up:
            found = up(found)
        return in_float32(self.last, found)


class SegmentationNet(nn.Module):
    """A U-Net over the repaired and the input image (sec. 3.2; widths and blocks: code)."""

    def __init__(self, base_width: int) -> None:
        """Builds the network."""
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
        return in_float32(self.last, found)
