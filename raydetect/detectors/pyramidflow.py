"""PyramidFlow: a volume-preserving flow over a Laplacian pyramid makes normal images alike; what differs is anomalous.

Pairs of normal images are trained to have equal latents, and an image is compared with the mean latent of the training
images. As no volume may shrink, the latents cannot become alike by vanishing.

Source: Lei et al., "PyramidFlow: High-Resolution Defect Contrastive Localization Using Pyramid Normalizing Flow", CVPR
2023, arXiv 2303.02595, and its official code (gasharper/PyramidFlow, autoFlow) where the paper is silent.
Differs from the paper: the last epoch is used instead of the best ones on test images; levels, volume norm and
augmentation are the same for all categories (official code: chosen by hand for each, without augmentation for objects);
the batch norms of the frozen backbone use their ImageNet statistics, where the official code lets them follow the
batches; a step takes disjoint pairs, which is the same for the paper's batch of two; an odd image is paired with the
first of its epoch instead of being left out; the mean latent is of the images that were fitted, in evaluation mode;
activations are stored rather than recomputed by inverting the flow.

Shapes: B images, P pairs, C channels, h w feature grid of a level, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.coresets.mean_rows import mean_rows
from raydetect.blocks.maps.anomaly_map import upsample
from raydetect.blocks.networks.flows import random_rotation
from raydetect.blocks.networks.laplacian import compose, decompose
from raydetect.blocks.networks.pyramid_couplings import PyramidCouplings
from raydetect.blocks.networks.unet import keyed_init
from raydetect.blocks.networks.volume_norm import VolumeNormKind
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import (
    Batch,
    Detector,
    DetectorInfo,
    ImageSize,
    ProgressCallback,
    Scores,
    TrainingPlan,
    UsedIf,
)
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import load_backbone
from raydetect.errors import SpecError

STEM, FLOW, TEMPLATE, LATENT = "stem", "flow", "template", "latent"
LAYER, STRIDE, WIDTH = "layer1", 4, 64  # of the ResNets
SIZE_PX, SIZE_WITH_BACKBONE_PX = (256, 256), (1024, 1024)
BETAS, EPSILON = (0.5, 0.9), 1e-4
MAX_GRADIENT_NORM = 1.0
PAIR = 2
WITH_BACKBONE, WITHOUT_BACKBONE = UsedIf("backbone", unless=(None,)), UsedIf("backbone", (None,))


class Widening(nn.Module):
    """Normalised pixels in more channels, by a fixed 1x1 convolution with orthonormal columns (official code)."""

    def __init__(self, channels: int, seed: int) -> None:
        """A random matrix."""
        super().__init__()
        mixing = random_rotation(channels, keyed_generator(seed, "stem")).matrix_CC[:, :3]
        self.weight = nn.Parameter(mixing[:, :, None, None].contiguous(), requires_grad=False)
        self.mean_C11: Tensor
        self.std_C11: Tensor
        self.register_buffer("mean_C11", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Features (B, C, H, W) of uint8 RGB images, as the only level."""
        return [nn.functional.conv2d((images_BCHW / 255.0 - self.mean_C11) / self.std_C11, self.weight)]


class Template(nn.Module):
    """The mean latent of the training images, a buffer for every level."""

    def __init__(self, channels: int, grids: Sequence[tuple[int, int]]) -> None:
        """Zeros."""
        super().__init__()
        for level, grid in enumerate(grids):
            self.register_buffer(f"{LATENT}{level}", torch.zeros(channels, *grid))

    def levels(self) -> list[Tensor]:
        """The mean of every level, (C, h, w), finest first."""
        return list(self.buffers())


class PyramidFlow(NetworkDetector):
    """Difference between an image's latent pyramid and the mean one."""

    info = DetectorInfo(
        title="PyramidFlow",
        paper="arXiv:2303.02595",
        venue="CVPR 2023",
        summary="a volume-preserving flow over a pyramid makes normal images alike; differences from their mean remain",
        published="MVTec AD: 96.0 pixel AUROC (paper; settings chosen per category, best epoch on test images); one "
        "model for all categories 70.2 image AUROC, 80.0 pixel AUROC, 47.5 PRO (ADer, arXiv:2406.03262)",
    )
    phases = ("train", "collect")
    smoke: ClassVar = {
        "backbone": None,
        "image_size": (64, 64),
        "channels": 8,
        "levels": 3,
        "stacks": 2,
        "kernel_size": 3,
        "epochs": 6,
        "batch_size": 8,
        "learning_rate": 2e-3,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of PyramidFlow."""

        image_size: Annotated[
            ImageSize,
            Field(
                description="(height, width) in px that images are resized to; (0, 0) = the paper's, (1024, 1024) "
                "with a backbone, (256, 256) without"
            ),
        ] = (0, 0)
        backbone: Annotated[
            Literal["resnet18", "resnet34"] | None,
            Field(description="frozen network up to layer1 whose features are transformed; none = the pixels are"),
        ] = "resnet18"
        weights: Annotated[
            str,
            Field(description='of the backbone: "imagenet", "random", or a path or URL of a weights file'),
            WITH_BACKBONE,
        ] = "imagenet"
        channels: Annotated[
            int, Field(ge=3, description="C without a backbone, whose width is 64 (official code)"), WITHOUT_BACKBONE
        ] = 16
        levels: Annotated[int, Field(ge=2, description="levels of the pyramid (official code, most categories)")] = 4
        stacks: Annotated[int, Field(ge=1, description="passes over all levels, each with its own couplings")] = 4
        kernel_size: Annotated[int, Field(ge=1, description="of the subnets' convolutions, odd (official code)")] = 7
        volume_norm: Annotated[
            VolumeNormKind,
            Field(
                description="log-scales have mean 0 over channel: the channels of a position (CVN); spatial: the "
                "positions of a channel (SVN; sec. 3.3)"
            ),
        ] = "channel"
        epochs: Annotated[int, Field(ge=1, description="passes over the images (official code)")] = 15
        batch_size: Annotated[
            int, Field(ge=2, multiple_of=2, description="images per step, two for each pair (appendix)")
        ] = 2
        learning_rate: Annotated[float, Field(gt=0, description="of Adam (appendix)")] = 2e-4
        weight_decay: Annotated[float, Field(ge=0, description="of Adam (appendix)")] = 1e-5

        def __post_init__(self) -> None:
            if self.kernel_size % 2 == 0:
                raise ValueError(f"kernel_size {self.kernel_size} must be odd, so that the kernel has a centre")
            own = SIZE_PX if self.backbone is None else SIZE_WITH_BACKBONE_PX
            size = self.image_size if any(self.image_size) else own
            smallest = self.stride() * 2 ** (self.levels - 1)
            if min(size) < 1 or any(side % smallest for side in size):
                raise ValueError(
                    f"image_size {list(size)} is not a multiple of {smallest} px, which levels = {self.levels} need"
                )
            object.__setattr__(self, "image_size", size)

        def stride(self) -> int:
            """Pixels per position of the finest level."""
            return 1 if self.backbone is None else STRIDE

    params: Params

    def load_weights(self) -> str:
        """Loads the backbone, if any."""
        p = self.params
        if p.backbone is None:
            self.networks = {STEM: Widening(p.channels, self.seed).to(self.device)}
            return "from scratch"
        backbone, source = load_backbone(p.backbone, (LAYER,), p.weights, self.seed, p.precision)
        self.networks = {STEM: backbone.freeze().to(self.device)}
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone or 1x1 convolution, couplings, and the mean latent."""
        p = self.params
        stem: nn.Module = (
            Widening(p.channels, self.seed)
            if p.backbone is None
            else Backbone(p.backbone, (LAYER,), self.seed, precision=p.precision)
        )
        return {STEM: stem, FLOW: self._flow(), TEMPLATE: Template(self._channels(), self._grids())}

    def _channels(self) -> int:
        return self.params.channels if self.params.backbone is None else WIDTH

    def _grids(self) -> list[tuple[int, int]]:
        """(h, w) of every level, finest first."""
        (height, width), stride = self.params.image_size, self.params.stride()
        return [(height // stride >> level, width // stride >> level) for level in range(self.params.levels)]

    def _flow(self) -> PyramidCouplings:
        p = self.params
        with keyed_init(self.seed, "pyramidflow"):
            return PyramidCouplings(self._channels(), self._grids(), p.stacks, p.kernel_size, p.volume_norm, self.seed)

    def begin_training(self, num_images: int) -> TrainingPlan:
        """New couplings, optimised by Adam.

        Raises:
            SpecError: a single image has no pair.
        """
        if num_images < PAIR:
            raise SpecError(
                f"pyramidflow: learns from pairs of images, and {num_images} is to be fitted. Add normal images."
            )
        self.is_fitted = False
        p = self.params
        flow = self._flow().to(self.device).train()
        self.networks[FLOW] = flow
        optimizer = torch.optim.Adam(
            flow.parameters(), lr=p.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=p.weight_decay, fused=True
        )
        return TrainingPlan(
            flow, optimizer, p.epochs, p.batch_size, images_per_item=PAIR, max_gradient_norm=MAX_GRADIENT_NORM
        )

    def training_loss(self, piece: Batch) -> Tensor:
        """Fourier loss of consecutive pairs, averaged over them (eq. 9)."""
        return fourier_loss(self._latents(piece.images_BCHW))

    def _latents(self, images_BCHW: Tensor) -> list[Tensor]:
        """z of every level, (B, C, h, w)."""
        with torch.no_grad():
            features_BChw = self.networks[STEM](images_BCHW)[0].contiguous()
            pyramid = decompose(features_BChw, self.params.levels)
        latents: list[Tensor] = self.run(self.networks[FLOW], pyramid)
        return latents

    def end_training(self) -> None:
        """Freezes the couplings; the mean latent is collected afterwards."""
        self.networks[FLOW].eval().requires_grad_(False)

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """The latents: for every level C * h rows of w values."""
        levels = enumerate(self._latents(batch.images_BCHW))
        return {f"{LATENT}{level}": z_BChw.flatten(1, 2) for level, z_BChw in levels}

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Stores the mean latent of the images of all workers."""
        template = Template(self._channels(), self._grids())
        for level, mean_Chw in enumerate(template.levels()):
            channels, height, width = mean_Chw.shape
            mean_RD = mean_rows(state.rows[f"{LATENT}{level}"], channels * height)
            mean_Chw.copy_(mean_RD.view(channels, height, width))
        self.networks[TEMPLATE] = template.to(self.device)
        self.freeze()

    @property
    def scores_by_map(self) -> bool:
        """Yes."""
        return True

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Differences from the mean latent, composed and averaged over channels; the score is their maximum (sec. 3.1).

        Raises:
            NotFittedError: the detector is not fitted.
            SpecError: the images are not of `image_size`; the mean latent has values per position.
        """
        self.require_fitted()
        self.require_size(images_BCHW)
        template = self.networks[TEMPLATE]
        assert isinstance(template, Template)
        latents = zip(self._latents(images_BCHW), template.levels(), strict=True)
        map_Bhw = compose([(z_BChw - mean_Chw).abs() for z_BChw, mean_Chw in latents]).mean(1)
        return Scores(map_Bhw.flatten(1).amax(1), upsample(map_Bhw, self.params.image_size))


def fourier_loss(latents: Sequence[Tensor]) -> Tensor:
    """Mean over pairs and frequencies of the spectrum's magnitude of their composed squared differences (eq. 9).

    Args:
        latents: z of every level, (2 P, C, h, w), finest first; each image follows its partner.
    """
    squares = [(z[0::PAIR] - z[1::PAIR]).square() for z in latents]
    return torch.fft.fft2(compose(squares).mean(1)).abs().mean()
