"""RD++: a decoder rebuilds a pretrained teacher's features from a small code; where it fails, an image is anomalous.

Projectors between teacher and code are trained to undo simulated defects. `projector: false` is plain Reverse
Distillation.

Source: Tien et al., "Revisiting Reverse Distillation for Anomaly Detection", CVPR 2023 (RD++), and Deng and Li,
"Anomaly Detection via Reverse Distillation from One-Class Embedding", CVPR 2022, arXiv 2201.10703 (RD); where the
papers are silent, the authors' code ("code" below).
Differs from the papers: the optimal transport loss of RD++ is off by default, since it is constant in its code, where a
batch is compared with its own permutation; `ssot_weight` turns it on between the positions of two images. The last
epoch is used, where the code stops after 10 to 300 epochs by category and keeps the best on test images. A step takes
32 images at once instead of accumulating gradients of two batches of 16, so batch norms see 32. Every image has noise
of its own, where the code crops one field in a run. Maps are upsampled by pixel centres, not aligned corners.

Shapes: B images, C channels, h w feature grid, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from raydetect.blocks.augment.simplex_noise import simplex_texture
from raydetect.blocks.backbones.backbone import ALIASES, Backbone
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.maps.anomaly_map import smooth_upsampled
from raydetect.blocks.networks.reverse_resnet import MULTIPLE, RESNETS, Decoder, OneClassEmbedding, resnet_plan
from raydetect.blocks.networks.sinkhorn import sinkhorn_divergence
from raydetect.blocks.networks.unet import keyed_init
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import (
    Batch,
    Detector,
    DetectorInfo,
    Phase,
    ProgressCallback,
    Scores,
    TrainingPlan,
    UsedIf,
)
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import WeightsName, load_backbone
from raydetect.errors import SpecError

TEACHER, PROJECTOR, EMBEDDING, DECODER = "teacher", "projector", "embedding", "decoder"
LAYERS = ("layer1", "layer2", "layer3")
BETAS = (0.5, 0.999)
RECONSTRUCTION_WEIGHT, CONTRAST_WEIGHT, WEIGHT_SUM = 0.01, 0.1, 1.11
CONTRAST_MARGIN = 0.5
SMALLEST_PATCH, LARGEST_PATCH = 10 / 256, 1 / 8  # of the image's side
SSOT_BLUR = 0.2  # 0.05 in the code; at that, these clouds need thousands of iterations
LARGEST_COST = 2.0  # half the squared distance of opposite unit vectors
IMAGES = "images"


class ReverseDistillationPP(NetworkDetector):
    """Cosine distances between a teacher's features and their reconstruction."""

    info = DetectorInfo(
        title="RD++",
        paper="https://openaccess.thecvf.com/content/CVPR2023/html/"
        "Tien_Revisiting_Reverse_Distillation_for_Anomaly_Detection_CVPR_2023_paper.html",
        venue="CVPR 2023",
        summary="a decoder fails to rebuild a teacher's features from a compressed code where an image is anomalous",
        published="MVTec AD, WideResNet-50, best epoch on test images: 99.4 image AUROC, 98.3 pixel AUROC, 95.0 PRO "
        "(RD++ paper); projector: false 98.5, 97.8, 93.9 (RD paper, tables 1-2)",
    )
    phases: tuple[Phase, ...] = ("train",)
    smoke: ClassVar = {
        "image_size": (64, 64),
        "backbone": "resnet18",
        "epochs": 10,
        "batch_size": 20,
        "smoothing_sigma": 1.0,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of RD++ and RD."""

        backbone: Annotated[
            str, Field(description=f"teacher, which the decoder mirrors (RD, sec. 3.2): {', '.join(RESNETS)}")
        ] = "wide_resnet50_2"
        weights: WeightsName = "imagenet"
        projector: Annotated[
            bool, Field(description="true = RD++; false = Reverse Distillation, published with batch_size 16")
        ] = True
        projector_weight: Annotated[
            float,
            Field(ge=0, description="of the projector's losses (RD++; value: code)"),
            UsedIf("projector", (True,)),
        ] = 0.2
        ssot_weight: Annotated[
            float,
            Field(
                ge=0,
                description="of the optimal transport between two images among the projector's losses; RD++ states 1, "
                "which has no effect in its code",
            ),
            UsedIf("projector", (True,)),
        ] = 0.0
        ssot_partners: Annotated[
            int,
            Field(
                ge=2,
                description="normal images stored during the fit, from which a keyed draw chooses an image's partner",
            ),
            UsedIf("ssot_weight", unless=(0,)),
        ] = 64
        noise_strength: Annotated[
            float,
            Field(
                gt=0, description="of the simplex noise in simulated defects, for pixels in [0, 1], unclipped (code)"
            ),
            UsedIf("projector", (True,)),
        ] = 0.2
        epochs: Annotated[int, Field(ge=1, description="passes over the images (RD, sec. 4.1)")] = 200
        batch_size: Annotated[
            int, Field(ge=1, description="images per step; RD++ accumulates two batches of 16 (code), RD has 16")
        ] = 32
        learning_rate: Annotated[float, Field(gt=0, description="of Adam, for code and decoder (RD, sec. 4.1)")] = 5e-3
        projector_learning_rate: Annotated[
            float, Field(gt=0, description="of Adam, for the projectors (code)"), UsedIf("projector", (True,))
        ] = 1e-3
        smoothing_sigma: Annotated[float, Field(ge=0, description="of the Gaussian on the map, px (RD, sec. 4.1)")] = (
            4.0
        )

        def __post_init__(self) -> None:
            if any(size % MULTIPLE for size in self.image_size):
                raise ValueError(f"image_size {self.image_size} must be multiples of {MULTIPLE}")
            if ALIASES.get(self.backbone, self.backbone) not in RESNETS:
                raise ValueError(
                    f"backbone {self.backbone!r} has no mirrored decoder. Choose one of {', '.join(RESNETS)}"
                )

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self._partner_keys: list[str] = []
        self._partners_B3HW = torch.zeros(0)
        if self._uses_partners:
            self.phases = ("collect", "train")

    @property
    def _uses_partners(self) -> bool:
        return self.params.projector and self.params.ssot_weight > 0

    def load_weights(self) -> str:
        """Loads the teacher."""
        p = self.params
        teacher, source = load_backbone(p.backbone, LAYERS, p.weights, self.seed, p.precision)
        self.networks = {TEACHER: teacher.freeze().to(self.device)}
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """Teacher and trained parts, the latter initialised from the seed."""
        p = self.params
        return {TEACHER: Backbone(p.backbone, LAYERS, self.seed, precision=p.precision), **self._trained_parts()}

    def _trained_parts(self) -> dict[str, nn.Module]:
        plan = resnet_plan(self.params.backbone)
        with keyed_init(self.seed, "reverse_distillation"):
            parts: dict[str, nn.Module] = {EMBEDDING: OneClassEmbedding(plan), DECODER: Decoder(plan)}
        if self.params.projector:
            with keyed_init(self.seed, "reverse_distillation", PROJECTOR):
                parts[PROJECTOR] = Projectors(plan.widths)
        return parts

    def num_collected(self) -> int:
        """Number of possible partners."""
        return self.params.ssot_partners

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """The images themselves, one row of pixels per row; only with `ssot_weight`."""
        if not self._uses_partners:
            return super().collect(batch)
        return {IMAGES: batch.images_BCHW.permute(0, 2, 1, 3).flatten(2).float()}

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Keeps the images of all workers as partners until the training ends."""
        self.is_fitted = False
        rows = state.rows[IMAGES]
        self._partner_keys = rows.all_keys()
        if len(self._partner_keys) < 2:
            raise SpecError("reverse_distillation_pp: ssot_weight needs two images or more. Add images or set it to 0.")
        height, width = self.params.image_size
        stored = rows.all_rows().to(torch.uint8).view(-1, height, 3, width)
        self._partners_B3HW = stored.permute(0, 2, 1, 3).contiguous()
        on_progress(len(stored), len(stored))

    def begin_training(self, num_images: int) -> TrainingPlan:
        """New trained parts, optimised by Adam with a learning rate of its own for the projectors."""
        self.is_fitted = False
        p = self.params
        parts = nn.ModuleDict(self._trained_parts())
        parts.to(self.device).to(memory_format=torch.channels_last).train()
        self.networks |= dict(parts.items())
        rates = {DECODER: p.learning_rate, EMBEDDING: p.learning_rate, PROJECTOR: p.projector_learning_rate}
        groups = [{"params": list(part.parameters()), "lr": rates[name]} for name, part in parts.items()]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        return TrainingPlan(parts, optimizer, p.epochs, p.batch_size)

    def prepare_image(self, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        """A simulated defect to add to pixels in [0, 1], (3, H, W); nothing without projectors."""
        if not self.params.projector:
            return ()
        generator = keyed_generator(self.seed, "simplex", key, epoch, draw)
        size_px = (image_3HW.shape[-2], image_3HW.shape[-1])
        return (self.params.noise_strength * noise_patch(size_px, generator),)

    def training_loss(self, piece: Batch) -> Tensor:
        """Distillation (RD, eq. 3) and the projectors' losses (RD++, eq. 8; weights: code), means over images."""
        teacher = self._teacher
        normal = teacher.normalised(piece.images_BCHW)
        if not self.params.projector:
            levels = teacher.features(normal)
            return distillation_loss(levels, self._rebuilt(levels))
        (noise,) = piece.prepared
        damaged = normal + noise / teacher.std_C11
        others = [teacher.normalised(self._partners(piece))] if self._uses_partners else []
        with torch.no_grad():
            seen = teacher.features(torch.cat([normal, damaged, *others]))
        levels, noised = (_parts(seen, len(normal), number) for number in (0, 1))
        projected = self.run(self.networks[PROJECTOR], seen)
        clean, repaired = (_parts(projected, len(normal), number) for number in (0, 1))
        losses = RECONSTRUCTION_WEIGHT * reconstruction_loss(repaired, clean)
        losses = losses + CONTRAST_WEIGHT * contrast_loss(noised, clean)
        if self._uses_partners:
            losses = losses + self.params.ssot_weight * ssot_loss(clean, _parts(projected, len(normal), 2))
        distilled = distillation_loss(levels, self._rebuilt(clean))
        return distilled + self.params.projector_weight * losses / WEIGHT_SUM

    def end_training(self) -> None:
        """Freezes all networks and forgets the partners."""
        self._partner_keys, self._partners_B3HW = [], torch.zeros(0)
        self.freeze()

    @property
    def scores_by_map(self) -> bool:
        """Yes."""
        return True

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Sum over levels of the upsampled distances, smoothed (RD, sec. 3.4); the image score is its maximum."""
        self.require_fitted()
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if any(size % MULTIPLE for size in size_px):
            raise SpecError(
                f"reverse_distillation_pp: an image of {size_px[0]} x {size_px[1]} px cannot be halved five times. "
                f"Resize it to multiples of {MULTIPLE} px."
            )
        levels = self._teacher(images_BCHW)
        projected = self.run(self.networks[PROJECTOR], levels) if self.params.projector else levels
        pairs = zip(levels, self._rebuilt(projected), strict=True)
        grids = [distances(level, rebuilt) for level, rebuilt in pairs]
        maps = [smooth_upsampled(grid_Bhw, size_px, self.params.smoothing_sigma) for grid_Bhw in grids]
        map_BHW = torch.stack(maps).sum(0)
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)

    @property
    def _teacher(self) -> Backbone:
        teacher = self.networks[TEACHER]
        assert isinstance(teacher, Backbone)
        return teacher

    def _rebuilt(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The decoder's features, shallowest first."""
        found: list[Tensor] = self.run(self.networks[DECODER], self.run(self.networks[EMBEDDING], levels))
        return found

    def _partners(self, batch: Batch) -> Tensor:
        """Another stored image for every image, by its key and epoch, uint8 (B, 3, H, W)."""
        chosen = []
        for key in batch.keys:
            others = [i for i, other in enumerate(self._partner_keys) if other != key]
            generator = keyed_generator(self.seed, "partner", key, batch.epoch)
            chosen.append(others[int(torch.randint(len(others), (), generator=generator))])
        return self._partners_B3HW[chosen].to(self.device)


class Projectors(nn.ModuleList):
    """A projector of four convolutions per level (RD++, sec. 3.2; layers: code)."""

    def __init__(self, widths: Sequence[int]) -> None:
        """Builds the network for levels of C channels each, shallowest first."""
        super().__init__(_projector(width) for width in widths)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Projected levels, of the same shapes."""
        return [projector(level) for projector, level in zip(self, levels, strict=True)]


def _projector(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = width
    for after in (width // 2, width // 4, width // 2, width):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.InstanceNorm2d(after), nn.LeakyReLU()]
        before = after
    return nn.Sequential(*layers)


def noise_patch(size_px: tuple[int, int], generator: Generator) -> Tensor:
    """Zeros, except for simplex noise in a rectangle, (3, H, W) float32 (RD++, sec. 3.3; sizes: code)."""
    noise = torch.zeros(3, *size_px)
    (top, height), (left, width) = (_stretch(side, generator) for side in size_px)
    noise[:, top : top + height, left : left + width] = simplex_texture((height, width), generator)
    return noise


def _stretch(side_px: int, generator: Generator) -> tuple[int, int]:
    """(start, length) of a random part of an axis."""
    least, most = max(1, round(SMALLEST_PATCH * side_px)), int(LARGEST_PATCH * side_px)
    length = int(torch.randint(least, max(least + 1, most), (), generator=generator))
    return int(torch.randint(1, side_px - length, (), generator=generator)), length


def _parts(levels: Sequence[Tensor], images: int, number: int) -> list[Tensor]:
    """One of the consecutive groups of `images` images, for every level."""
    return [level[number * images : (number + 1) * images] for level in levels]


def distances(first_BChw: Tensor, second_BChw: Tensor) -> Tensor:
    """One minus the cosine at every position (RD, eq. 1), (B, h, w)."""
    return 1 - F.cosine_similarity(first_BChw, second_BChw)


def distillation_loss(levels: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
    """Sum over levels of one minus the cosine of whole, flattened maps; RD's eq. 2 has the mean over positions."""
    return _sum_of_levels(lambda a, b: 1 - _whole_cosine(a, b), levels, rebuilt)


def reconstruction_loss(repaired: Sequence[Tensor], clean: Sequence[Tensor]) -> Tensor:
    """Sum over levels of the mean distance of projected features of damaged and normal images (RD++, sec. 3.3)."""
    return _sum_of_levels(distances, repaired, clean)


def contrast_loss(noised: Sequence[Tensor], clean: Sequence[Tensor]) -> Tensor:
    """Sum over levels of how far the cosine of damaged features and normal projections exceeds a margin (RD++)."""
    return _sum_of_levels(lambda a, b: (_whole_cosine(a, b) - CONTRAST_MARGIN).clamp(min=0), noised, clean)


def ssot_loss(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Sum over levels of the optimal transport between the positions of two images (RD++, sec. 3.2).

    Positions are L2-normalised features, pooled to the grid of the deepest level, so that every level has few.
    """
    size = (first[-1].shape[-2], first[-1].shape[-1])

    def transport(a: Tensor, b: Tensor) -> Tensor:
        return sinkhorn_divergence(_cloud(a, size), _cloud(b, size), SSOT_BLUR, LARGEST_COST)

    return _sum_of_levels(transport, first, second)


def _cloud(level_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C), of length 1."""
    return F.normalize(F.adaptive_avg_pool2d(level_BChw, size).flatten(2).transpose(1, 2), dim=2)


def _whole_cosine(first_BChw: Tensor, second_BChw: Tensor) -> Tensor:
    return F.cosine_similarity(first_BChw.flatten(1), second_BChw.flatten(1))


def _sum_of_levels(
    loss: Callable[[Tensor, Tensor], Tensor], first: Sequence[Tensor], second: Sequence[Tensor]
) -> Tensor:
    """Every level's loss has one value per image, or an equal number of them, so the mean is one over images."""
    return torch.stack([loss(a, b).mean() for a, b in zip(first, second, strict=True)]).sum()
