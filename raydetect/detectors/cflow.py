"""CFLOW-AD: conditional normalising flows model the likelihood of each feature given its position, per pyramid level.

Positions that are unlikely at all levels are anomalous. The flows process single positions, so the cost of a step over
a few hundred of them is independent of the image size.

Source: Gudovskiy et al., "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional
Normalizing Flows", WACV 2022, arXiv 2107.12571, and its official code (gudovskiy/cflow-ad) where the paper
is silent.
Differs from the paper: a level's likelihoods are divided by the maximum over the training images, not the test set, so
an image's score does not depend on other images; the map is the negative logarithm of the paper's aggregated likelihood
instead of a constant minus it, which ranks pixels identically and does not saturate; a step uses the same number of
positions from every image, where the official code shuffles over the batch, so workers can share it; a step updates
only its own level (in the official code, momentum also moved the others); convolutions of the backbone pad with zeros,
as its weights were trained, where the official code pads by reflection; maps are upsampled without corner alignment;
the last epoch is used instead of one chosen on the test set.

Shapes: B images, C channels, h w feature grid, S positions, L levels, P dims of the position encoding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.augment.rotation import randomly_turned
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.device_constants import kept_on_device
from raydetect.blocks.maps.anomaly_map import negative_log_mean_likelihood
from raydetect.blocks.networks.flows import (
    Chain,
    Invertible,
    Rotation,
    flow_step,
    log_likelihood,
    random_permutation,
    random_rotation,
)
from raydetect.blocks.seeding import keyed_generator, keyed_seed
from raydetect.detectors._base import Batch, Detector, DetectorInfo, ProgressCallback, Scores, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import WeightsName, load_backbone

BACKBONE, FLOWS = "backbone", "flows"
HIGHEST = "highest"
WARM_FROM, COOL_TO = 0.1, 0.001


@dataclass(frozen=True, slots=True)
class Fibres:
    """Features of some positions of every image at one level: the input of a training step.

    Attributes:
        level: index of the level.
        features_BSC: features, the same number of positions for every image.
        codes_BSP: position encodings.
    """

    level: int
    features_BSC: Tensor
    codes_BSP: Tensor


class LevelFlows(nn.Module):
    """One flow per level, and its maximum log-likelihood on the training images."""

    def __init__(self, flows: Sequence[Chain]) -> None:
        """Stores the flows, one per level."""
        super().__init__()
        self.flows = nn.ModuleList(flows)
        self.highest_L: Tensor
        self.register_buffer("highest_L", torch.zeros(len(flows)))

    def forward(self, fibres: Fibres) -> Tensor:
        """Log-likelihood per dim of every position, (B, S) (eq. 6, divided by C)."""
        images, positions, channels = fibres.features_BSC.shape
        found = self.flows[fibres.level](fibres.features_BSC.flatten(0, 1), fibres.codes_BSP.flatten(0, 1))
        return log_likelihood(*found).view(images, positions) / channels


class CFlow(NetworkDetector):
    """Likelihood of every feature given its position, under one conditional flow per level."""

    info = DetectorInfo(
        title="CFLOW-AD",
        paper="arXiv:2107.12571",
        venue="WACV 2022",
        summary="conditional normalising flows model the likelihood of each feature given its position",
        published="MVTec AD, WideResNet-50: 98.26 image AUROC, 98.62 pixel AUROC, 94.60 PRO (paper, tables 2-3)",
    )
    phases = ("train", "collect")
    smoke: ClassVar = {
        "backbone": "resnet18",
        "layers": ("layer1", "layer2"),
        "image_size": (64, 64),
        "n_flows": 2,
        "position_dims": 16,
        "epochs": 3,
        "sub_epochs": 2,
        "warm_up_epochs": 1,
        "batch_size": 16,
        "fibre_batch": 1024,
        "learning_rate": 0.03,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of CFLOW-AD."""

        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 5.1)")] = "wide_resnet50_2"
        layers: Annotated[
            tuple[str, ...], Field(min_length=1, description="levels, shallowest first (sec. 4.1; official code)")
        ] = ("layer2", "layer3", "layer4")
        weights: WeightsName = "imagenet"
        n_flows: Annotated[int, Field(ge=1, description="coupling blocks in each level's flow (sec. 5.1)")] = 8
        clamp: Annotated[float, Field(gt=0, description="bound on the log-scale of a coupling, alpha (eq. 2)")] = 1.9
        position_dims: Annotated[
            int, Field(ge=4, multiple_of=4, description="P, dims of the sinusoidal position encoding (sec. 4.1)")
        ] = 128
        mixing: Annotated[
            Literal["rotation", "permutation"],
            Field(description="mixing of channels between couplings: random rotations (official code) or permutations"),
        ] = "rotation"
        epochs: Annotated[
            int, Field(ge=1, description="meta-epochs; the rate changes between them (official code)")
        ] = 25
        sub_epochs: Annotated[int, Field(ge=1, description="passes over the images per meta-epoch (official code)")] = 8
        warm_up_epochs: Annotated[
            int, Field(ge=0, description="meta-epochs of warm-up from a tenth of the rate (sec. 5.1); 0 = none")
        ] = 2
        batch_size: Annotated[int, Field(ge=1, description="images per forward pass of the backbone (sec. 5.1)")] = 32
        fibre_batch: Annotated[
            int, Field(ge=1, description="maximum positions per step, over all images; at least batch_size (sec. 5.1)")
        ] = 256
        learning_rate: Annotated[float, Field(gt=0, description="of Adam, with cosine decay (sec. 5.1)")] = 2e-4
        turn_degrees: Annotated[
            float,
            Field(
                ge=0,
                le=180,
                description="maximum random rotation of training images (official code); 0 is better for short fits",
            ),
        ] = 5.0

        def __post_init__(self) -> None:
            """Rejects inconsistent parameters."""
            if self.warm_up_epochs >= self.epochs:
                raise ValueError(
                    f"warm_up_epochs = {self.warm_up_epochs} leaves nothing of epochs = {self.epochs}; lower the former"
                )
            if self.fibre_batch < self.batch_size:
                raise ValueError(
                    f"fibre_batch = {self.fibre_batch} is less than one position per image at batch_size = "
                    f"{self.batch_size}; raise it"
                )

    params: Params

    def load_weights(self) -> str:
        """Loads the backbone."""
        p = self.params
        backbone, source = load_backbone(p.backbone, p.layers, p.weights, self.seed, p.precision)
        self.networks = {BACKBONE: backbone.freeze().to(self.device)}
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone and flows."""
        backbone = Backbone(self.params.backbone, self.params.layers, self.seed, precision=self.params.precision)
        return {BACKBONE: backbone, FLOWS: self._flows(backbone, rotate=False)}

    def _flows(self, backbone: Backbone, rotate: bool) -> LevelFlows:
        """New flows; `rotate=False` skips random rotations (seconds at 2048 channels) that loading would overwrite."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "flows"))
            shapes = backbone.shapes(self.params.image_size)
            return LevelFlows([self._flow(level, shape[0], rotate) for level, shape in enumerate(shapes)])

    def _flow(self, level: int, channels: int, rotate: bool) -> Chain:
        steps = []
        for number in range(self.params.n_flows):
            generator = keyed_generator(self.seed, "mixing", level, number)
            mixing: Invertible = random_permutation(channels, generator)
            if self.params.mixing == "rotation":
                mixing = random_rotation(channels, generator) if rotate else Rotation(torch.eye(channels))
            steps.append(flow_step(channels, dense_subnet, self.params.clamp, mixing, self.params.position_dims))
        return Chain(steps)

    def begin_training(self, num_images: int) -> TrainingPlan:
        """New flows, optimised by Adam."""
        self.is_fitted = False
        backbone = self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        flows = self._flows(backbone, rotate=True).to(self.device).train()
        self.networks[FLOWS] = flows
        return TrainingPlan(
            flows,
            torch.optim.Adam(flows.parameters(), lr=self.params.learning_rate, fused=True),
            epochs=self.params.epochs * self.params.sub_epochs,
            batch_size=self.params.batch_size,
            rate=self._rate,
            all_in_every_step=False,
        )

    def _rate(self, passes_done: float) -> float:
        """Learning rate factor: linear warm-up, then cosine decay to 0.001 in steps of a meta-epoch (official code)."""
        done, warm = passes_done / self.params.sub_epochs, self.params.warm_up_epochs
        if done >= warm:
            return self._cosine(math.floor(done))
        return WARM_FROM + done / warm * (self._cosine(warm) - WARM_FROM)

    def _cosine(self, meta_epoch: float) -> float:
        return COOL_TO + (1 - COOL_TO) * (1 + math.cos(math.pi * meta_epoch / self.params.epochs)) / 2

    def training_pieces(self, batch: Batch) -> list[Fibres]:
        """Positions of every rotated image in a keyed order, `fibre_batch // batch_size` per image and step."""
        degrees = self.params.turn_degrees
        columns = zip(batch.images_BCHW, batch.keys, strict=True)
        turned = [randomly_turned(image, degrees, self.seed, key, batch.epoch) for image, key in columns]
        with torch.no_grad():
            levels = self._fibres(self.networks[BACKBONE](torch.stack(turned)))
        pieces = []
        for whole in levels:
            images, positions, _ = whole.features_BSC.shape
            order_BS = self._order(batch, whole.level, positions)
            rows_BS = order_BS + positions * torch.arange(images, device=order_BS.device)[:, None]
            features_BSC = whole.features_BSC.flatten(0, 1)[rows_BS]
            codes_BSP = whole.codes_BSP[0][order_BS]
            each = min(self.params.fibre_batch // self.params.batch_size, positions)
            starts = range(0, positions - each + 1, each)
            pieces += [Fibres(whole.level, features_BSC[:, i : i + each], codes_BSP[:, i : i + each]) for i in starts]
        return pieces

    def _order(self, batch: Batch, level: int, positions: int) -> Tensor:
        key_prefix = "fibres", batch.epoch, level
        orders = [torch.randperm(positions, generator=keyed_generator(self.seed, *key_prefix, k)) for k in batch.keys]
        return torch.stack(orders).to(self.device)

    def _fibres(self, levels: Sequence[Tensor]) -> list[Fibres]:
        """All positions of every level, in row-major order."""
        found = []
        for level, features_BChw in enumerate(levels):
            codes_SP = _position_codes(features_BChw.device, self.params.position_dims, *features_BChw.shape[2:])
            features_BSC = features_BChw.flatten(2).transpose(1, 2)
            found.append(Fibres(level, features_BSC, codes_SP.expand(len(features_BSC), -1, -1)))
        return found

    def training_loss(self, piece: Fibres) -> Tensor:
        """Mean of -log sigmoid(log-likelihood per dim) (official code)."""
        return -F.logsigmoid(self.run(self.networks[FLOWS], piece)).mean()

    def end_training(self) -> None:
        """Freezes the flows; the maximum likelihoods are collected afterwards."""
        self.networks[FLOWS].eval().requires_grad_(False)

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Maximum log-likelihood of every level for each image."""
        levels = self._fibres(self.networks[BACKBONE](batch.images_BCHW))
        return {HIGHEST: torch.stack([self.run(self.networks[FLOWS], fibres).amax(1) for fibres in levels], 1)[:, None]}

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Stores the maxima over the training images of all workers."""
        flows = self.networks[FLOWS]
        assert isinstance(flows, LevelFlows)
        flows.highest_L.copy_(state.rows[HIGHEST].all_rows().amax(0))
        self.freeze()

    @property
    def scores_by_map(self) -> bool:
        """Yes."""
        return True

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Likelihoods of all levels, each relative to its maximum, upsampled and summed (sec. 4.2)."""
        self.require_fitted()
        flows = self.networks[FLOWS]
        assert isinstance(flows, LevelFlows)
        levels = self.networks[BACKBONE](images_BCHW)
        grids = [features_BChw.shape[2:] for features_BChw in levels]
        found = zip(grids, self._fibres(levels), flows.highest_L, strict=True)
        relative = [(self.run(flows, fibres) - highest).unflatten(1, grid) for grid, fibres, highest in found]
        map_BHW = negative_log_mean_likelihood(relative, (images_BCHW.shape[-2], images_BCHW.shape[-1]))
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)


def dense_subnet(inside: int, outside: int) -> nn.Module:
    """One hidden layer, twice as wide as the input (official code)."""
    return nn.Sequential(nn.Linear(inside, 2 * inside), nn.ReLU(), nn.Linear(2 * inside, outside))


def position_codes(dims: int, height: int, width: int) -> Tensor:
    """Sinusoidal encoding, (h * w, P): the column in the first half of the dims, the row in the second (sec. 4.1)."""
    rates = torch.exp(torch.arange(0, dims // 2, 2) * (-2 * math.log(1e4) / dims))
    columns, rows = (
        torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        for angles in (torch.arange(size)[:, None] * rates for size in (width, height))
    )
    return torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, 0)], 1)


_position_codes = kept_on_device(position_codes)
