"""RIAD: a U-Net paints in what grid-like masks took out of an image; where it fails to, the image is not normal.

Every pixel is taken out once: the cells of a grid are dealt to disjoint sets, each set is painted in from all others.

Source: Zavrtanik, Kristan and Skocaj, "Reconstruction by inpainting for visual anomaly detection", Pattern Recognition
112 (2021) 107706.
Differs from the paper: its authors published no code, so widths, batch size and weight decay are those of the public
implementation by plutoyuxie; losses are taken on images in [0, 1], for which the constants of SSIM and GMS are made;
GMS repeats the edge pixel instead of leaving the border out, and smoothing averages over the pixels that are there;
masks of scoring are drawn once by the seed, so that a score can be repeated. No validation split stops the training.

Shapes: B images, S sets, C channels, H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from raydetect.blocks.anomaly_map import upsample
from raydetect.blocks.backbone import Backbone
from raydetect.blocks.losses import msgms_loss, msgms_maps, ssim_loss
from raydetect.blocks.seeding import keyed_generator
from raydetect.blocks.unet import convolutions, cropped, keyed_init, padded
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import load_backbone
from raydetect.errors import SpecError

ENCODER, UNET = "encoder", "unet"
WIDTHS = (1, 2, 4, 8, 8)  # of the plain U-Net's levels, in base widths
PROBE_PX = 256
MILESTONE = 250 / 300


class RIAD(NetworkDetector):
    """Gradient dissimilarity between an image and its inpainting, over several cell sizes."""

    info = DetectorInfo(
        title="RIAD",
        paper="doi:10.1016/j.patcog.2020.107706",
        venue="Pattern Recognition 2021",
        summary="a U-Net fails to paint in what was masked where an image is not normal",
        published="MVTec AD: 91.7 image AUROC, 94.2 pixel AUROC (paper, tables 1-2)",
    )
    phases = ("train",)
    smoke: ClassVar = {
        "image_size": (64, 64),
        "grid_size": (4, 8),
        "base_width": 8,
        "epochs": 8,
        "learning_rate": 3e-3,
        "smoothing_px": 5,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of RIAD."""

        grid_size: Annotated[
            int | tuple[int, ...],
            Field(description="cell size k of the masks in px; of several, each image is masked with one (sec. 3)"),
        ] = (2, 4, 8, 16)
        num_sets: Annotated[int, Field(ge=2, description="disjoint sets S that the cells are dealt to (sec. 3)")] = 3
        backbone: Annotated[
            str | None,
            Field(description="a pretrained, frozen encoder in place of the U-Net's own; none = the paper's U-Net"),
        ] = None
        layers: Annotated[
            tuple[str, ...], Field(min_length=1, description="levels of the backbone, shallowest first")
        ] = ("layer1", "layer2", "layer3")
        weights: Annotated[
            str, Field(description='of the backbone: "imagenet", "random", or a path or URL of a weights file')
        ] = "imagenet"
        base_width: Annotated[int, Field(ge=1, description="channels of the first level; deeper ones double")] = 64
        ssim_weight: Annotated[float, Field(ge=0, description="lambda of the SSIM loss (sec. 3)")] = 1.0
        msgms_weight: Annotated[float, Field(ge=0, description="lambda of the MSGMS loss (sec. 3)")] = 1.0
        epochs: Annotated[int, Field(ge=1, description="passes over the images (sec. 4)")] = 300
        batch_size: Annotated[int, Field(ge=1, description="images per step, each with all its sets")] = 4
        learning_rate: Annotated[
            float, Field(gt=0, description="of Adam; a tenth of it after 5/6 of the epochs (sec. 4)")
        ] = 1e-4
        weight_decay: Annotated[float, Field(ge=0, description="of Adam")] = 1e-5
        smoothing_px: Annotated[int, Field(ge=1, description="side of the mean filter of the map, odd (sec. 3)")] = 21

        def __post_init__(self) -> None:
            if not self.cell_sizes() or min(self.cell_sizes()) < 1:
                raise ValueError(f"grid_size {self.grid_size} needs cells of at least 1 px")
            if 2 * max(self.cell_sizes()) > min(self.image_size):
                raise ValueError(f"grid_size {self.grid_size} leaves fewer than two cells along {self.image_size} px")
            if self.smoothing_px % 2 == 0:
                raise ValueError(f"smoothing_px {self.smoothing_px} must be odd, so that the filter has a centre")
            if self.backbone is None and (self.weights, self.layers) != ("imagenet", ("layer1", "layer2", "layer3")):
                raise ValueError("weights and layers are those of a backbone; name one or leave them out")

        def cell_sizes(self) -> tuple[int, ...]:
            """All cell sizes."""
            return (self.grid_size,) if isinstance(self.grid_size, int) else self.grid_size

    params: Params

    def load_weights(self) -> str:
        """Loads the backbone, if there is one."""
        self.networks = {}
        if self.params.backbone is None:
            return "from scratch"
        words = self.params.backbone, self.params.layers, self.params.weights, self.seed
        encoder, said = load_backbone(*words)
        self.networks[ENCODER] = encoder.freeze().to(self.device)
        return said

    def make_networks(self) -> dict[str, nn.Module]:
        """The U-Net, initialised by the seed, and the backbone of random weights."""
        width = self.params.base_width
        with keyed_init(self.seed, "riad"):
            if self.params.backbone is None:
                return {UNET: InpaintingNet([width * n for n in WIDTHS], [2, 2, 2, 2])}
            encoder = Backbone(self.params.backbone, self.params.layers, self.seed)
            with torch.no_grad():
                levels = encoder.eval()(torch.zeros(1, 3, PROBE_PX, PROBE_PX))
            sizes = [PROBE_PX, *(level.shape[-1] for level in levels)]
            factors = [above // below for above, below in pairwise(sizes)]
            return {ENCODER: encoder, UNET: InpaintingNet([width, *(x.shape[1] for x in levels)], factors, own=1)}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A fresh U-Net under Adam."""
        self.is_fitted = False
        unet = self.make_networks()[UNET].to(self.device).to(memory_format=torch.channels_last).train()
        self.networks[UNET] = unet
        rate, decay = self.params.learning_rate, self.params.weight_decay
        optimizer = torch.optim.Adam(unet.parameters(), lr=rate, weight_decay=decay, fused=True)
        milestone = MILESTONE * self.params.epochs
        return TrainingPlan(
            unet,
            optimizer,
            self.params.epochs,
            self.params.batch_size,
            rate=lambda done: 1.0 if done < milestone else 0.1,
        )

    def training_loss(self, piece: Batch) -> Tensor:
        """L2 + SSIM + MSGMS of images and their inpaintings; each image is masked with one random cell size."""
        size_px = (piece.images_BCHW.shape[-2], piece.images_BCHW.shape[-1])
        sizes = self.params.cell_sizes()
        masks = []
        for key in piece.keys:
            generator = keyed_generator(self.seed, "riad", key, piece.epoch)
            cell_px = sizes[int(torch.randint(len(sizes), (), generator=generator))]
            masks.append(disjoint_masks(size_px, cell_px, self.params.num_sets, generator))
        images = piece.images_BCHW.float() / 255
        painted = self._painted(images, torch.stack(masks).to(images.device))
        loss = F.mse_loss(painted, images) + self.params.ssim_weight * ssim_loss(painted, images)
        return loss + self.params.msgms_weight * msgms_loss(painted, images)

    def end_training(self) -> None:
        """Freezes the U-Net."""
        self.freeze()

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """The smoothed dissimilarity, averaged over cell sizes; the image score is its maximum (sec. 3)."""
        self.require_fitted()
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if 2 * max(self.params.cell_sizes()) > min(size_px):
            raise SpecError(
                f"riad: images of {size_px[0]} x {size_px[1]} px have fewer than two cells of "
                f"{max(self.params.cell_sizes())} px. Give larger images or a smaller grid_size."
            )
        images = images_BCHW.float() / 255
        maps = []
        for cell_px in self.params.cell_sizes():
            generator = keyed_generator(self.seed, "riad", "score", cell_px)
            masks = disjoint_masks(size_px, cell_px, self.params.num_sets, generator).to(images.device)
            painted = self._painted(images, masks.expand(len(images), -1, -1, -1))
            alike = [upsample(scale, size_px) for scale in msgms_maps(painted, images)]
            maps.append(1 - torch.stack(alike).mean(0))
        map_BHW = torch.stack(maps).mean(0)
        side = self.params.smoothing_px
        map_BHW = F.avg_pool2d(map_BHW[:, None], side, 1, side // 2, count_include_pad=False)[:, 0]
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)

    def _painted(self, images_B3HW: Tensor, masks_BSHW: Tensor) -> Tensor:
        """Every pixel from the set that leaves it out (sec. 3), in [0, 1]; masks are True where a pixel is left out."""
        count = masks_BSHW.shape[1]
        hidden = ((2 * images_B3HW - 1)[:, None] * ~masks_BSHW[:, :, None]).flatten(0, 1)
        net = self.networks[UNET]
        assert isinstance(net, InpaintingNet)
        wide = padded(hidden, net.multiple).contiguous(memory_format=torch.channels_last)
        levels = []
        if ENCODER in self.networks:
            with torch.no_grad(), torch.autocast(wide.device.type, enabled=False):
                levels = self.networks[ENCODER](127.5 * (wide + 1))
        painted = cropped(net(wide, levels), images_B3HW.shape[-2:]).unflatten(0, (-1, count))
        return ((painted.float() + 1) / 2 * masks_BSHW[:, :, None]).sum(1)


def disjoint_masks(size_px: tuple[int, int], cell_px: int, num_sets: int, generator: Generator) -> Tensor:
    """The cells of a grid dealt at random to sets of equal size, (S, H, W) bool: True where a set leaves a pixel out.

    Cells at the right and lower border are cut where the size is no multiple of `cell_px`.

    Source: RIAD, sec. 3.
    """
    rows, columns = (-(-size // cell_px) for size in size_px)
    set_hw = (torch.randperm(rows * columns, generator=generator) % num_sets).view(rows, columns)
    set_HW = set_hw.repeat_interleave(cell_px, 0).repeat_interleave(cell_px, 1)
    return cropped(set_HW, size_px) == torch.arange(num_sets)[:, None, None]


class InpaintingNet(nn.Module):
    """The U-Net: levels go down by strided convolutions, or are given, and up by transposed ones with skips.

    Attributes:
        multiple: of which the input's height and width must be.
    """

    def __init__(self, widths: Sequence[int], factors: Sequence[int], own: int | None = None) -> None:
        """Builds it.

        Args:
            widths: channels of every level, shallowest first.
            factors: how much smaller each level is than the one above it.
            own: levels that the net makes itself, the first among them; none = all.
        """
        super().__init__()
        self.multiple = math.prod(factors)
        own = len(widths) if own is None else own
        self.down = nn.ModuleList([convolutions(3, widths[0], widths[0])])
        for above, width in pairwise(widths[:own]):
            self.down.append(_halving(above, width))
        self.grow, self.merge = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(factors))):
            width, factor = widths[i], factors[i]
            side, edge = 2 * factor + factor % 2, (factor + 1) // 2  # so that sizes grow by the factor exactly
            self.grow.append(nn.ConvTranspose2d(widths[i + 1], width, side, factor, edge))
            self.merge.append(convolutions(2 * width, width, width))
        self.last = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, images_B3HW: Tensor, given: Sequence[Tensor] = ()) -> Tensor:
        """Images in [-1, 1] from images in [-1, 1] with zeros where they are hidden; `given` are the deeper levels."""
        levels = [images_B3HW]
        for down in self.down:
            levels.append(down(levels[-1]))
        levels = [*levels[1:], *given]
        found = levels.pop()
        for grow, merge in zip(self.grow, self.merge, strict=True):
            found = merge(torch.cat([grow(found), levels.pop()], 1))
        return torch.tanh(self.last(found))


def _halving(in_channels: int, width: int) -> nn.Sequential:
    """A 4 x 4 convolution of stride 2 and a 3 x 3 one, each with batch norm and ReLU."""
    strided = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
    return nn.Sequential(strided, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *convolutions(width, width))
