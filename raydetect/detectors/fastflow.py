"""FastFlow: a normalising flow over whole feature maps at each pyramid level; unlikely features are anomalous.

Its subnets are convolutions, so a feature is scored in its context and one pass gives the whole map.

Source: Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows", 2021, arXiv
2111.07677; its authors published no code. Unspecified details follow gathierry/FastFlow and anomalib, which agree.
Differs from the paper: no known differences in the flow. Differs from those two: scale and shift of the layer norm are
part of the flow, so the likelihood is exact (they omit the scale from the determinant, so shrinking all features lowers
the loss); the map is the negative logarithm of their mean likelihood over levels, which ranks pixels identically and
does not saturate; transformers are treated like convolutional networks, with a trained layer norm over each level's
whole map, where those two give the flow the tokens after the transformer's pretrained final norm, without another norm.

Shapes: B images, C channels, h w feature grid, H W pixels.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.maps.anomaly_map import negative_log_mean_likelihood
from raydetect.blocks.networks.flows import Chain, flow_step, random_permutation
from raydetect.blocks.seeding import keyed_generator, keyed_seed
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import WeightsName, load_backbone

BACKBONE, FLOWS = "backbone", "flows"


class LevelFlow(nn.Module):
    """Layer norm over a whole feature map, then a flow; the norm's scale and shift count as part of the flow."""

    def __init__(self, shape: tuple[int, ...], flow: Chain) -> None:
        """Stores the flow; `shape` is (C, h, w)."""
        super().__init__()
        self.norm = nn.LayerNorm(shape)
        self.flow = flow

    def forward(self, features_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """z, and log |det| of the scale, the shift and the flow, (B,)."""
        z_BChw, log_det_B = self.flow(self.norm(features_BChw))
        return z_BChw, log_det_B + self.norm.weight.abs().log().sum()


class FastFlow(NetworkDetector):
    """Likelihood of feature maps under one 2-D flow per level."""

    info = DetectorInfo(
        title="FastFlow",
        paper="arXiv:2111.07677",
        venue="arXiv 2021",
        summary="normalising flows over whole feature maps locate unlikely features",
        published="MVTec AD, best backbone: 99.4 image AUROC, 98.5 pixel AUROC (paper, tables 2-3); WideResNet-50 "
        "reproductions 96.3-98.5",
    )
    phases = ("train",)
    smoke: ClassVar = {
        "backbone": "resnet18",
        "layers": ("layer1", "layer2"),
        "image_size": (64, 64),
        "n_flow_steps": 2,
        "epochs": 6,
        "batch_size": 8,
        "learning_rate": 3e-3,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of FastFlow."""

        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 4.2)")] = "wide_resnet50_2"
        layers: Annotated[
            tuple[str, ...],
            Field(min_length=1, description="levels, shallowest first: the first three blocks (sec. 4.2)"),
        ] = ("layer1", "layer2", "layer3")
        weights: WeightsName = "imagenet"
        n_flow_steps: Annotated[
            int,
            Field(ge=1, description="couplings in each level's flow: 8 for ResNets, 20 for transformers (sec. 4.2)"),
        ] = 8
        conv3x3_only: Annotated[
            bool,
            Field(description="3x3 kernels throughout, as in the paper for ResNet-18; else alternating 3x3 and 1x1"),
        ] = False
        hidden_ratio: Annotated[
            float,
            Field(gt=0, description="hidden over input width of a subnet: 1 for ResNets, else 0.16 (sec. 4.2)"),
        ] = 1.0
        clamp: Annotated[float, Field(gt=0, description="bound on the log-scale of a coupling (reference code)")] = 2.0
        epochs: Annotated[int, Field(ge=1, description="passes over the images (sec. 4.2)")] = 500
        batch_size: Annotated[int, Field(ge=1, description="images per step (sec. 4.2)")] = 32
        learning_rate: Annotated[float, Field(gt=0, description="of Adam (sec. 4.2)")] = 1e-3
        weight_decay: Annotated[float, Field(ge=0, description="of Adam (sec. 4.2)")] = 1e-5

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
        return {BACKBONE: backbone, FLOWS: self._flows(backbone)}

    def _flows(self, backbone: Backbone) -> nn.ModuleList:
        """New flows for the feature maps of `image_size`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "flows"))
            shapes = backbone.shapes(self.params.image_size)
            return nn.ModuleList(LevelFlow(shape, self._flow(level, shape[0])) for level, shape in enumerate(shapes))

    def _flow(self, level: int, channels: int) -> Chain:
        """A flow with 3x3 kernels in even steps and 1x1 in odd ones (sec. 3.3)."""
        steps = []
        for number in range(self.params.n_flow_steps):
            size = 3 if self.params.conv3x3_only or number % 2 == 0 else 1
            mixing = random_permutation(channels, keyed_generator(self.seed, "mixing", level, number))
            subnet = partial(conv_subnet, size, self.params.hidden_ratio)
            steps.append(flow_step(channels, subnet, self.params.clamp, mixing))
        return Chain(steps)

    def begin_training(self, num_images: int) -> TrainingPlan:
        """New flows, optimised by Adam."""
        self.is_fitted = False
        backbone = self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        flows = self._flows(backbone).to(self.device).train()
        self.networks[FLOWS] = flows
        optimizer = torch.optim.Adam(
            flows.parameters(), lr=self.params.learning_rate, weight_decay=self.params.weight_decay, fused=True
        )
        return TrainingPlan(flows, optimizer, self.params.epochs, self.params.batch_size)

    def training_loss(self, piece: Batch) -> Tensor:
        """Eq. 2 without its constant: half the squared norm of z minus the log-determinant, summed over levels."""
        with torch.no_grad():
            levels = self.networks[BACKBONE](piece.images_BCHW)
        losses = [0.5 * z_BChw.square().flatten(1).sum(1) - log_det_B for z_BChw, log_det_B in self._run_flows(levels)]
        return torch.stack(losses).sum(0).mean()

    def _run_flows(self, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """z and log-determinant of every level."""
        flows = self.networks[FLOWS]
        assert isinstance(flows, nn.ModuleList)
        # couplings split and concatenate channels, which is faster on contiguous maps
        return [self.run(flow, level.contiguous()) for flow, level in zip(flows, levels, strict=True)]

    def end_training(self) -> None:
        """Freezes the flows."""
        self.freeze()

    @property
    def scores_by_map(self) -> bool:
        """Yes."""
        return True

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Negative log-likelihood map of z, averaged over channels and levels; the score is its maximum (sec. 3.4).

        Raises:
            NotFittedError: the detector is not fitted.
            SpecError: the images are not of `image_size`; the layer norms have parameters per position.
        """
        self.require_fitted()
        self.require_size(images_BCHW)
        levels = self.networks[BACKBONE](images_BCHW)
        map_BHW = negative_log_mean_likelihood(
            [-0.5 * z_BChw.square().mean(1) for z_BChw, _ in self._run_flows(levels)], self.params.image_size
        )
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)


def conv_subnet(size: int, hidden_ratio: float, inside: int, outside: int) -> nn.Module:
    """Two convolutions with kernel size `size` and a ReLU between them (sec. 3.3)."""
    hidden = max(1, int(inside * hidden_ratio))
    return nn.Sequential(
        nn.Conv2d(inside, hidden, size, padding="same"),
        nn.ReLU(),
        nn.Conv2d(hidden, outside, size, padding="same"),
    )
