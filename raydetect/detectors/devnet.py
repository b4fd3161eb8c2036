"""DevNet: trains the mean of the top 10 % of patch scores to be near zero for normal images and high for defects.

Deviations are measured in standard deviations of a Gaussian prior, so a score tells how unlikely an image is under it.

Source: Pang et al., "Explainable Deep Few-shot Anomaly Detection with Deviation Networks", arXiv 2108.00462 (the
prior, the deviation, its loss; top-K patch scores; two scales; gradients as map), the image version of "Deep Anomaly
Detection with Deviation Networks", KDD 2019, arXiv 1911.08623 (eqs. 5-7). Where the papers are silent, as in the
authors' code: patch scores are absolute values, the second scale takes every second pixel, learning rates are divided
by 10 every 10 epochs, gradients are clipped at norm 1, training images are randomly rotated, an epoch draws its images
in rounds, gradient maps are cut at their 99th percentile before they are smoothed.
Differs from the authors' code: gradient maps are not rescaled to [0, 1] per image, so maps of different images are
comparable.

Shapes: B images, C channels, h w feature grid, H W pixels, P patches of one image at one scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.augment.rotation import randomly_turned
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.maps.anomaly_map import smooth, smooth_upsampled
from raydetect.blocks.seeding import in_rounds, keyed_generator, keyed_seed
from raydetect.detectors._base import Batch, Detector, DetectorInfo, ImageSize, Known, Scores, TrainingPlan
from raydetect.detectors._networks import FineTuned
from raydetect.errors import SpecError

BACKBONE, HEAD = "backbone", "head"
HIGHEST_SHARE = 0.99


class DevNet(FineTuned):
    """Mean of the highest patch scores, learned from a few labelled anomalous images."""

    info = DetectorInfo(
        title="DevNet",
        paper="arXiv:2108.00462",
        venue="KDD 2019 and arXiv 2021",
        summary="patch scores trained on a few labelled defects to deviate from a Gaussian prior of normal scores",
        labels="some anomalous",
        published="MVTec AD, ResNet-18, 10 labelled defects: 94.5 image AUROC (arXiv 2108.00462)",
    )
    phases = ("train",)
    smoke: ClassVar = {
        "image_size": (64, 64),
        "last_layer": "layer2",
        "epochs": 6,
        "steps_per_epoch": 6,
        "batch_size": 12,
        "learning_rate": 1e-3,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of DevNet."""

        image_size: Annotated[
            ImageSize, Field(description="(height, width) in px that images are resized to (authors' code)")
        ] = (448, 448)
        backbone: Annotated[str, Field(description="torchvision or timm name (implementation details)")] = "resnet18"
        last_layer: Annotated[
            str, Field(description="layer whose positions are the patches; layer4 = the whole trunk")
        ] = "layer4"
        weights: Annotated[
            str,
            Field(description='initial weights for training: "imagenet", "random", or a path or URL of a weights file'),
        ] = "imagenet"
        hidden_dims: Annotated[
            tuple[int, ...],
            Field(description="hidden layers of the patch scorer, 1x1 with ReLU; none in the published image version"),
        ] = ()
        margin: Annotated[
            float, Field(gt=0, description="minimum deviation of defects, in standard deviations, a (eq. 7)")
        ] = 5.0
        top_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of top patches averaged for the image score (top-K, 10 %)")
        ] = 0.1
        num_scales: Annotated[
            int, Field(ge=1, description="number of scales (full, half, quarter, ... size) whose scores are averaged")
        ] = 2
        prior_draws: Annotated[
            int, Field(ge=2, description="standard normal samples to estimate the prior from in each step, l (eq. 5)")
        ] = 5000
        epochs: Annotated[int, Field(ge=1, description="epochs of steps_per_epoch each")] = 50
        steps_per_epoch: Annotated[int, Field(ge=1, description="optimizer steps per epoch")] = 20
        batch_size: Annotated[
            int, Field(ge=2, description="images per step, half normal and half labelled anomalous")
        ] = 48
        learning_rate: Annotated[float, Field(gt=0, description="of Adam")] = 2e-4
        weight_decay: Annotated[float, Field(ge=0, description="of Adam")] = 1e-5
        decay_epochs: Annotated[
            int, Field(ge=1, description="epochs between divisions of the learning rate by 10 (authors' code)")
        ] = 10
        max_gradient_norm: Annotated[float, Field(gt=0, description="gradient clipping norm (authors' code)")] = 1.0
        turn_degrees: Annotated[
            float, Field(ge=0, le=180, description="maximum random rotation of training images (authors' code)")
        ] = 180.0
        map: Annotated[
            Literal["gradient", "patches"],
            Field(description="gradient: input gradient of the image score, as published; patches: the patch scores"),
        ] = "gradient"
        smoothing_sigma: Annotated[
            float, Field(ge=0, le=1000, description="Gaussian smoothing of the anomaly map in px (authors' code)")
        ] = 4.0

    params: Params

    def load_weights(self) -> str:
        """Loads the initial weights for training."""
        return self.load_start(self.params.backbone, self.params.last_layer, self.params.weights)

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone and patch scorer, the latter initialised from the seed."""
        p = self.params
        backbone = Backbone(p.backbone, (p.last_layer,), self.seed, precision=p.precision)
        widths = [backbone.widths()[0], *self.params.hidden_dims, 1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "devnet"))
            layers = [nn.Conv2d(width, following, 1) for width, following in pairwise(widths)]
        parts = [part for layer in layers for part in (nn.ReLU(), layer)][1:]
        return {BACKBONE: backbone, HEAD: nn.Sequential(*parts)}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A new scorer on the loaded backbone, optimised by Adam."""
        self.is_fitted = False
        self.networks = {**self.make_networks(), BACKBONE: self.fresh_backbone()}
        trained = nn.ModuleDict(self.networks).to(self.device).to(memory_format=torch.channels_last).train()
        rate, decay = self.params.learning_rate, self.params.weight_decay
        optimizer = torch.optim.Adam(trained.parameters(), lr=rate, weight_decay=decay)
        return TrainingPlan(
            trained,
            optimizer,
            self.params.epochs,
            self.params.batch_size,
            rate=lambda done: 0.1 ** (int(done) // self.params.decay_epochs),
            batches=self._batches,
            max_gradient_norm=self.params.max_gradient_norm,
        )

    def _batches(self, known: Mapping[str, Known], epoch: int) -> list[list[str]]:
        """Batches of half normal, half anomalous images; each kind drawn in rounds, so images are used equally often.

        Raises:
            SpecError: there are no normal or no anomalous images.
        """
        kinds = [sorted(key for key, image in known.items() if image.label == wanted) for wanted in (0, 1)]
        if not all(kinds):
            missing = "normal" if kinds[1] else "labelled anomalous"
            raise SpecError(f"devnet: none of {len(known)} images to fit on is {missing}. Add images, with labels.")
        sizes = [self.params.batch_size // 2, self.params.batch_size - self.params.batch_size // 2]
        drawn = [in_rounds(keys, self.seed, "batches", label, epoch) for label, keys in enumerate(kinds)]
        return [
            [key for size, keys in zip(sizes, drawn, strict=True) for key in islice(keys, size)]
            for _ in range(self.params.steps_per_epoch)
        ]

    def training_loss(self, piece: Batch) -> Tensor:
        """Deviation loss of rotated images (eqs. 5-7)."""
        assert piece.labels is not None
        draws = piece.draws or [0] * len(piece.keys)
        rotated = [
            randomly_turned(image_CHW, self.params.turn_degrees, self.seed, key, piece.epoch, draw)
            for image_CHW, key, draw in zip(piece.images_BCHW, piece.keys, draws, strict=True)
        ]
        score_B = self._scores(self._backbone().normalised(torch.stack(rotated)))[0]
        step = draws[0] // self.params.batch_size
        generator = keyed_generator(self.seed, "prior", piece.epoch, step)
        prior_N = torch.randn(self.params.prior_draws, generator=generator).to(score_B)
        return deviation_loss(score_B, torch.tensor(piece.labels).to(score_B), prior_N, self.params.margin)

    def _backbone(self) -> Backbone:
        backbone = self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        return backbone

    def _scores(self, normal_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image scores and per-scale patch scores (B, h, w) of normalised images."""
        backbone, (height, width) = self._backbone(), normal_BCHW.shape[-2:]
        patches = []
        for scale in range(self.params.num_scales):
            size_px = (max(1, height >> scale), max(1, width >> scale))
            scaled = F.interpolate(normal_BCHW, size=size_px) if scale else normal_BCHW
            patches.append(self.networks[HEAD](backbone.features(scaled)[0])[:, 0].abs())
        each = [worst_mean(patch_Bhw.flatten(1), self.params.top_ratio) for patch_Bhw in patches]
        return torch.stack(each).mean(0), patches

    def end_training(self) -> None:
        """Freezes backbone and scorer."""
        self.freeze()

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Mean of the highest patch scores, and the map."""
        self.require_fitted()
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if self.params.map == "gradient":
            return self._with_gradients(images_BCHW)
        score_B, patches = self._scores(self._backbone().normalised(images_BCHW))
        maps = [smooth_upsampled(patch_Bhw, size_px, self.params.smoothing_sigma) for patch_Bhw in patches]
        return Scores(score_B, torch.stack(maps).mean(0))

    def _with_gradients(self, images_BCHW: Tensor) -> Scores:
        """Like `score`; the map is the absolute gradient of the image score, summed over channels, without peaks."""
        with torch.inference_mode(False), torch.enable_grad():
            normal_BCHW = self._backbone().normalised(images_BCHW.clone()).requires_grad_(True)
            score_B = self._scores(normal_BCHW)[0]
            (gradient_BCHW,) = torch.autograd.grad(score_B.sum(), normal_BCHW)
        map_BHW = gradient_BCHW.abs().sum(1)
        highest_B = map_BHW.flatten(1).quantile(HIGHEST_SHARE, 1)
        map_BHW = torch.minimum(map_BHW, highest_B[:, None, None])
        return Scores(score_B.detach(), smooth(map_BHW, self.params.smoothing_sigma))


def worst_mean(score_BP: Tensor, ratio: float) -> Tensor:
    """Mean of the K largest scores of every image, K = max(1, floor(ratio * P))."""
    count = max(1, int(score_BP.shape[1] * ratio))
    return score_BP.topk(count, 1).values.mean(1)


def deviation_loss(score_B: Tensor, label_B: Tensor, prior_N: Tensor, margin: float) -> Tensor:
    """|dev| for normal images, max(0, margin - dev) for anomalous ones, averaged over images (eqs. 6-7)."""
    deviation_B = (score_B - prior_N.mean()) / prior_N.std()
    return ((1 - label_B) * deviation_B.abs() + label_B * F.relu(margin - deviation_B)).mean()
