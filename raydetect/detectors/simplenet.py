"""SimpleNet: a small network discriminates adapted normal patch features from copies with Gaussian noise.

Patches of a test image that it classifies as noisy are anomalous.

Source: Liu et al., "SimpleNet: A Simple Network for Image Anomaly Detection and Localization", CVPR 2023,
arXiv 2303.15140; eqs. 1-3 (features), 4 (adaptor), 5 (noise), 6-7 (loss), 8 (score). Where the paper is silent, as
in the authors' code: pooling of the levels, 1024 hidden dims, Xavier initialisation, no bias in the last layer.
Differs from the paper: images are resized without a centre crop; the last epoch is used, where the authors' code keeps
the best on the test images. Differs from the authors' code, following the paper: the adaptor has no bias, and its
weight decay is the discriminator's.

Shapes: B images, h w feature grid, H W pixels, N patches (B * h * w), D feature dim.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.backbones.patch_embeddings import patch_embeddings
from raydetect.blocks.maps.anomaly_map import smooth_upsampled
from raydetect.blocks.search.matrix_product import product
from raydetect.blocks.seeding import keyed_generator, keyed_seed
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import WeightsName, load_backbone

BACKBONE, ADAPTOR, DISCRIMINATOR = "backbone", "adaptor", "discriminator"
LEAK = 0.2


class SimpleNet(NetworkDetector):
    """A discriminator between adapted patch features and noisy copies."""

    info = DetectorInfo(
        title="SimpleNet",
        paper="arXiv:2303.15140",
        venue="CVPR 2023",
        summary="a small network discriminates normal patch features from copies with Gaussian noise",
        published="MVTec AD, WideResNet-50: 99.6 image AUROC, 98.1 pixel AUROC (paper, tables 1-2)",
    )
    phases = ("train",)
    smoke: ClassVar = {
        "backbone": "resnet18",
        "layers": ("layer1",),
        "image_size": (64, 64),
        "embedding_dims": None,
        "hidden_dims": 64,
        "noise_sigma": 0.05,
        "epochs": 40,
        "adaptor_learning_rate": 2.5e-3,
        "learning_rate": 5e-3,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of SimpleNet."""

        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 4.3)")] = "wide_resnet50_2"
        layers: Annotated[
            tuple[str, ...], Field(min_length=1, description="used levels, shallowest first (sec. 4.3)")
        ] = ("layer2", "layer3")
        weights: WeightsName = "imagenet"
        embedding_dims: Annotated[
            int | None,
            Field(
                ge=1,
                description="dims to pool the 3x3 neighbourhoods of each level, then all levels together, to (sec. "
                "4.3); none = 3x3 means of the levels at their native widths",
            ),
        ] = 1536
        hidden_dims: Annotated[int, Field(ge=1, description="hidden layer of the discriminator (authors' code)")] = 1024
        noise_sigma: Annotated[
            float, Field(gt=0, description="of the Gaussian noise on adapted features (sec. 4.3)")
        ] = 0.015
        margin: Annotated[float, Field(gt=0, description="truncation of the loss, th+ = -th- (eq. 6, sec. 4.3)")] = 0.5
        epochs: Annotated[int, Field(ge=1, description="passes over the images (sec. 4.3)")] = 160
        batch_size: Annotated[int, Field(ge=1, description="images per step (sec. 4.3)")] = 4
        adaptor_learning_rate: Annotated[float, Field(gt=0, description="of Adam, for the adaptor (sec. 4.3)")] = 1e-4
        learning_rate: Annotated[float, Field(gt=0, description="of Adam, for the discriminator (sec. 4.3)")] = 2e-4
        weight_decay: Annotated[float, Field(ge=0, description="of Adam, for both (sec. 4.3)")] = 1e-5
        smoothing_sigma: Annotated[
            float, Field(ge=0, le=1000, description="Gaussian smoothing of the anomaly map in px (sec. 3.6)")
        ] = 4.0

    params: Params
    _embedded: tuple[int, ...]  # (h, w, D)

    def load_weights(self) -> str:
        """Loads the backbone."""
        p = self.params
        backbone, source = load_backbone(p.backbone, p.layers, p.weights, self.seed, p.precision)
        self.networks = {BACKBONE: backbone.freeze().to(self.device)}
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone, adaptor and discriminator, the last two initialised from the seed."""
        backbone = Backbone(self.params.backbone, self.params.layers, self.seed, precision=self.params.precision)
        dims = self.params.embedding_dims or sum(backbone.widths())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "simplenet"))
            adaptor = nn.Linear(dims, dims, bias=False)
            first = nn.Linear(dims, self.params.hidden_dims)
            last = nn.Linear(self.params.hidden_dims, 1, bias=False)
            for layer in (adaptor, first, last):
                nn.init.xavier_normal_(layer.weight)
        norm = nn.BatchNorm1d(self.params.hidden_dims)
        discriminator = nn.Sequential(first, norm, nn.LeakyReLU(LEAK), last)
        return {BACKBONE: backbone, ADAPTOR: adaptor, DISCRIMINATOR: discriminator}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A new adaptor and discriminator, optimised by one Adam with two learning rates."""
        self.is_fitted = False
        networks, backbone = self.make_networks(), self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        levels = backbone.shapes(self.params.image_size)
        dims = self.params.embedding_dims or sum(backbone.widths())
        self._embedded = (*levels[0][1:], dims)
        trained = nn.ModuleDict({name: networks[name].to(self.device).train() for name in (ADAPTOR, DISCRIMINATOR)})
        self.networks.update(trained.items())
        groups = [
            {"params": trained[ADAPTOR].parameters(), "lr": self.params.adaptor_learning_rate},
            {"params": trained[DISCRIMINATOR].parameters(), "lr": self.params.learning_rate},
        ]
        optimizer = torch.optim.Adam(groups, weight_decay=self.params.weight_decay)
        return TrainingPlan(trained, optimizer, self.params.epochs, self.params.batch_size)

    def prepare_image(self, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        """Noise for its embeddings, (h, w, D)."""
        generator = keyed_generator(self.seed, "noise", key, epoch)
        return (self.params.noise_sigma * torch.randn(self._embedded, generator=generator),)

    def training_loss(self, piece: Batch) -> Tensor:
        """Loss of eqs. 5-7, with normal and noisy features in one discriminator batch."""
        (noise_BhwD,) = piece.prepared
        with torch.no_grad():
            embeddings_BhwD = self._embed(piece.images_BCHW)
        adapted_ND = self.run(self.networks[ADAPTOR], embeddings_BhwD.flatten(0, 2))
        noisy_ND = adapted_ND + noise_BhwD.flatten(0, 2)
        normality_2N = self._normality(torch.cat([adapted_ND, noisy_ND]))
        normal_N, anomalous_N = normality_2N.chunk(2)
        return truncated_l1(normal_N, anomalous_N, self.params.margin)

    def _normality(self, rows_ND: Tensor) -> Tensor:
        """The discriminator's output, (N,); its last layers are float32."""
        discriminator = self.networks[DISCRIMINATOR]
        assert isinstance(discriminator, nn.Sequential)
        normality_N1: Tensor = discriminator[1:](self.run(discriminator[0], rows_ND))
        return normality_N1[:, 0]

    def end_training(self) -> None:
        """Freezes the adaptor and the discriminator."""
        self.freeze()

    @property
    def scores_by_map(self) -> bool:
        """Yes."""
        return True

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Negated discriminator output per patch (eq. 8); the image score is the maximum over patches."""
        self.require_fitted()
        embeddings_BhwD = self._embed(images_BCHW)
        discriminator = self.networks[DISCRIMINATOR]
        assert isinstance(discriminator, nn.Sequential)
        adapted_ND = self.run(quick_linear, self.networks[ADAPTOR], embeddings_BhwD.flatten(0, 2))
        hidden_ND = self.run(quick_linear, discriminator[0], adapted_ND)
        score_Bhw = -discriminator[1:](hidden_ND).view(embeddings_BhwD.shape[:3])
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        map_BHW = smooth_upsampled(score_Bhw, size_px, self.params.smoothing_sigma)
        return Scores(score_Bhw.flatten(1).amax(1), map_BHW)

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        return patch_embeddings(self.networks[BACKBONE](images_BCHW), self.params.embedding_dims)


def truncated_l1(normal_N: Tensor, anomalous_N: Tensor, margin: float) -> Tensor:
    """Hinge loss: penalises normal patches below `margin` and noisy ones above `-margin` (eqs. 6-7)."""
    return F.relu(margin - normal_N).mean() + F.relu(margin + anomalous_N).mean()


def quick_linear(layer: nn.Module, rows_ND: Tensor) -> Tensor:
    """A linear layer without gradients."""
    assert isinstance(layer, nn.Linear)
    if torch.is_autocast_enabled(rows_ND.device.type):
        return layer(rows_ND)
    return product(rows_ND, layer.weight, layer.bias)
