"""RIAD: a U-Net inpaints masked grid cells of an image; regions it reconstructs poorly are anomalous.

Every pixel is masked once: the cells of a grid are split into disjoint sets, and each set is inpainted from the others.

Source: Zavrtanik, Kristan and Skocaj, "Reconstruction by inpainting for visual anomaly detection", Pattern Recognition
112 (2021) 107706.
Differs from the paper: its authors published no code, so widths, batch size and weight decay follow the public
implementation by plutoyuxie; losses use images in [0, 1], which the constants of SSIM and GMS assume; GMS replicates
edge pixels instead of excluding the border, and smoothing averages over valid pixels only; scoring masks are drawn once
from the seed, so scores are reproducible. There is no early stopping on a validation split.
Differs from that implementation: its losses use images in [-1, 1], so its L2 loss weighs four times as much and the
constants of SSIM and GMS are relatively smaller; it draws one cell size per batch, blurs by a 3x3 median before GMS,
weighs the map of cell size k by k squared, and smooths the map by a Gaussian of 7 px.

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

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.device_constants import kept_on_device
from raydetect.blocks.maps.anomaly_map import upsample
from raydetect.blocks.networks.losses import msgms_loss, msgms_maps, ssim_loss
from raydetect.blocks.networks.unet import convolutions, cropped, keyed_init, padded
from raydetect.blocks.precision import in_float32
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan, UsedIf
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import load_backbone
from raydetect.errors import SpecError

ENCODER, UNET = "encoder", "unet"
WIDTHS = (1, 2, 4, 8, 8)  # per level of the plain U-Net, in base widths
PROBE_PX = 256
MILESTONE = 250 / 300


class RIAD(NetworkDetector):
    """Gradient dissimilarity between an image and its inpainting, averaged over cell sizes."""

    info = DetectorInfo(
        title="RIAD",
        paper="doi:10.1016/j.patcog.2020.107706",
        venue="Pattern Recognition 2021",
        summary="a U-Net inpaints masked regions and fails where an image is anomalous",
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
            Field(description="cell size k of the masks in px; if several, one is drawn per image (sec. 3.1)"),
        ] = (2, 4, 8, 16)
        num_sets: Annotated[int, Field(ge=2, description="number of disjoint sets S of cells (sec. 3.1)")] = 3
        backbone: Annotated[
            str | None,
            Field(description="pretrained frozen encoder replacing the U-Net's own; none = the paper's U-Net"),
        ] = None
        layers: Annotated[
            tuple[str, ...],
            Field(min_length=1, description="levels of the backbone, shallowest first"),
            UsedIf("backbone", unless=(None,)),
        ] = ("layer1", "layer2", "layer3")
        weights: Annotated[
            str,
            Field(description='of the backbone: "imagenet", "random", or a path or URL of a weights file'),
            UsedIf("backbone", unless=(None,)),
        ] = "imagenet"
        base_width: Annotated[int, Field(ge=1, description="channels of the first level; deeper levels double it")] = 64
        ssim_weight: Annotated[float, Field(ge=0, description="lambda of the SSIM loss (eq. 5)")] = 1.0
        msgms_weight: Annotated[float, Field(ge=0, description="lambda of the MSGMS loss (eq. 5)")] = 1.0
        epochs: Annotated[int, Field(ge=1, description="passes over the images (sec. 4.1)")] = 300
        batch_size: Annotated[int, Field(ge=1, description="images per step, each with all of its sets")] = 4
        learning_rate: Annotated[
            float, Field(gt=0, description="of Adam; divided by 10 after 5/6 of the epochs (sec. 4.1)")
        ] = 1e-4
        weight_decay: Annotated[float, Field(ge=0, description="of Adam")] = 1e-5
        smoothing_px: Annotated[int, Field(ge=1, description="side of the mean filter of the map, odd (eq. 6)")] = 21

        def __post_init__(self) -> None:
            if not self.cell_sizes() or min(self.cell_sizes()) < 1:
                raise ValueError(f"grid_size {self.grid_size} needs cells of at least 1 px")
            if 2 * max(self.cell_sizes()) > min(self.image_size):
                raise ValueError(f"grid_size {self.grid_size} leaves fewer than two cells along {self.image_size} px")
            if self.smoothing_px % 2 == 0:
                raise ValueError(f"smoothing_px {self.smoothing_px} must be odd, so that the filter has a centre")

        def cell_sizes(self) -> tuple[int, ...]:
            """All cell sizes."""
            return (self.grid_size,) if isinstance(self.grid_size, int) else self.grid_size

    params: Params

    def load_weights(self) -> str:
        """Loads the backbone, if any."""
        self.networks = {}
        if self.params.backbone is None:
            return "from scratch"
        p = self.params
        encoder, source = load_backbone(self.params.backbone, p.layers, p.weights, self.seed, p.precision)
        self.networks[ENCODER] = encoder.freeze().to(self.device)
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """The U-Net, initialised from the seed, and the backbone, if any, with random weights."""
        width = self.params.base_width
        with keyed_init(self.seed, "riad"):
            if self.params.backbone is None:
                return {UNET: InpaintingNet([width * n for n in WIDTHS], [2, 2, 2, 2])}
            encoder = Backbone(self.params.backbone, self.params.layers, self.seed, precision=self.params.precision)
            with torch.no_grad():
                levels = encoder.eval()(torch.zeros(1, 3, PROBE_PX, PROBE_PX))
            sizes = [PROBE_PX, *(level.shape[-1] for level in levels)]
            factors = [above // below for above, below in pairwise(sizes)]
            return {ENCODER: encoder, UNET: InpaintingNet([width, *(x.shape[1] for x in levels)], factors, own=1)}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A new U-Net, optimised by Adam."""
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
        """L2 + SSIM + MSGMS losses of the inpaintings, with a random cell size per image (eq. 5)."""
        size_px = (piece.images_BCHW.shape[-2], piece.images_BCHW.shape[-1])
        sizes = self.params.cell_sizes()
        masks = []
        for key in piece.keys:
            generator = keyed_generator(self.seed, "riad", key, piece.epoch)
            cell_px = sizes[int(torch.randint(len(sizes), (), generator=generator))]
            masks.append(disjoint_masks(size_px, cell_px, self.params.num_sets, generator))
        images = piece.images_BCHW.float() / 255
        inpainted = self._painted(images, torch.stack(masks).to(images.device))
        loss = F.mse_loss(inpainted, images) + self.params.ssim_weight * ssim_loss(inpainted, images)
        return loss + self.params.msgms_weight * msgms_loss(inpainted, images)

    def end_training(self) -> None:
        """Freezes the U-Net."""
        self.freeze()

    @property
    def scores_by_map(self) -> bool:
        """Yes."""
        return True

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Smoothed dissimilarity, averaged over cell sizes (eq. 6); the image score is its maximum (sec. 3.3)."""
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
            masks = _scoring_masks(images.device, size_px, cell_px, self.params.num_sets, self.seed)
            inpainted = self._painted(images, masks.expand(len(images), -1, -1, -1))
            similarity = [upsample(scale, size_px) for scale in msgms_maps(inpainted, images)]
            maps.append(1 - torch.stack(similarity).mean(0))
        map_BHW = torch.stack(maps).mean(0)
        side = self.params.smoothing_px
        map_BHW = F.avg_pool2d(map_BHW[:, None], side, 1, side // 2, count_include_pad=False)[:, 0]
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)

    def _painted(self, images_B3HW: Tensor, masks_BSHW: Tensor) -> Tensor:
        """Inpainted images in [0, 1], each pixel from the set that masks it (eq. 1); masks are True where masked."""
        count = masks_BSHW.shape[1]
        hidden = ((2 * images_B3HW - 1)[:, None] * ~masks_BSHW[:, :, None]).flatten(0, 1)
        net = self.networks[UNET]
        assert isinstance(net, InpaintingNet)
        wide = padded(hidden, net.multiple).contiguous(memory_format=torch.channels_last)
        levels = []
        if ENCODER in self.networks:
            with torch.no_grad():
                levels = self.networks[ENCODER](127.5 * (wide + 1))
        inpainted = cropped(self.run(net, wide, levels), images_B3HW.shape[-2:]).unflatten(0, (-1, count))
        return ((inpainted.float() + 1) / 2 * masks_BSHW[:, :, None]).sum(1)


def disjoint_masks(size_px: tuple[int, int], cell_px: int, num_sets: int, generator: Generator) -> Tensor:
    """Randomly splits the cells of a grid into sets of equal size, (S, H, W) bool: True where a set masks a pixel.

    Cells at the right and bottom border are cropped if the size is not a multiple of `cell_px`.

    Source: RIAD, sec. 3.1.
    """
    rows, columns = (-(-size // cell_px) for size in size_px)
    set_hw = (torch.randperm(rows * columns, generator=generator) % num_sets).view(rows, columns)
    set_HW = set_hw.repeat_interleave(cell_px, 0).repeat_interleave(cell_px, 1)
    return cropped(set_HW, size_px) == torch.arange(num_sets)[:, None, None]


@kept_on_device
def _scoring_masks(size_px: tuple[int, int], cell_px: int, num_sets: int, seed: int) -> Tensor:
    """The sets that all images are scored with."""
    return disjoint_masks(size_px, cell_px, num_sets, keyed_generator(seed, "riad", "score", cell_px))


class InpaintingNet(nn.Module):
    """A U-Net: strided convolutions or given levels as encoder, transposed convolutions with skips as decoder.

    Attributes:
        multiple: the input's height and width must be multiples of it.
    """

    def __init__(self, widths: Sequence[int], factors: Sequence[int], own: int | None = None) -> None:
        """Builds the network.

        Args:
            widths: channels of every level, shallowest first.
            factors: downsampling factor of each level relative to the previous one.
            own: number of levels computed by the network itself, starting with the first; None = all.
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
            side, edge = 2 * factor + factor % 2, (factor + 1) // 2  # upsamples by exactly the factor
            self.grow.append(nn.ConvTranspose2d(widths[i + 1], width, side, factor, edge))
            self.merge.append(convolutions(2 * width, width, width))
        self.last = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, images_B3HW: Tensor, given: Sequence[Tensor] = ()) -> Tensor:
        """Inpaints images in [-1, 1], masked with zeros; returns [-1, 1]. `given` are the deeper levels, if any."""
        levels = [images_B3HW]
        for down in self.down:
            levels.append(down(levels[-1]))
        levels = [*levels[1:], *given]
        found = levels.pop()
        for grow, merge in zip(self.grow, self.merge, strict=True):
            found = merge(torch.cat([grow(found), levels.pop()], 1))
        return torch.tanh(in_float32(self.last, found))


def _halving(in_channels: int, width: int) -> nn.Sequential:
    """A 4 x 4 convolution of stride 2 and a 3 x 3 one, each with batch norm and ReLU."""
    strided = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
    return nn.Sequential(strided, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *convolutions(width, width))
