"""DevNet: the worst tenth of patch scores is near zero for normal images and far above it for labelled defects.

"Near" and "far" are in standard deviations of a Gaussian prior, so a score says how unlikely an image is to be normal.

Source: Pang et al., "Explainable Deep Few-shot Anomaly Detection with Deviation Networks", arXiv 2108.00462 (the
prior, the deviation, its loss; top-K patch scores; two scales; gradients as map), the image form of "Deep Anomaly
Detection with Deviation Networks", KDD 2019, arXiv 1911.08623 (eqs. 5-7). Where the papers are silent, as the authors'
code: patch scores count by their magnitude, the second scale takes every second pixel, learning rates fall by ten
every 10 epochs, gradients are cut at norm 1, training images are turned at random, an epoch's images come in rounds.
Differs from the authors' code: gradients as a map are not stretched to [0, 1] image by image, so that maps of
different images can be compared.

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

from raydetect.blocks.anomaly_map import smooth, smooth_upsampled
from raydetect.blocks.backbone import Backbone
from raydetect.blocks.seeding import in_rounds, keyed_generator, keyed_seed, keyed_unit
from raydetect.blocks.vision import transforms
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan
from raydetect.detectors._networks import FineTuned
from raydetect.errors import SpecError

BACKBONE, HEAD = "backbone", "head"


class DevNet(FineTuned):
    """Mean of the worst patch scores, learned from a few labelled anomalous images."""

    info = DetectorInfo(
        title="DevNet",
        paper="arXiv:2108.00462",
        venue="KDD 2019 and arXiv 2021",
        summary="patch scores that a few labelled defects push away from a Gaussian prior of normal ones",
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
            tuple[int, int], Field(description="(height, width) in px that images are resized to (authors' code)")
        ] = (448, 448)
        backbone: Annotated[str, Field(description="torchvision or timm name (implementation details)")] = "resnet18"
        last_layer: Annotated[
            str, Field(description="patches are the positions of this layer; layer4 = the whole trunk")
        ] = "layer4"
        weights: Annotated[
            str,
            Field(description='what training starts from: "imagenet", "random", or a path or URL of a weights file'),
        ] = "imagenet"
        hidden_dims: Annotated[
            tuple[int, ...],
            Field(description="hidden layers of the patch scorer, 1x1 with ReLU; none in the published image form"),
        ] = ()
        margin: Annotated[
            float, Field(gt=0, description="standard deviations that defects are to be above the prior, a (eq. 7)")
        ] = 5.0
        top_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of patches whose mean is the image score (top-K, 10 %)")
        ] = 0.1
        num_scales: Annotated[
            int, Field(ge=1, description="the image, half of it, a quarter, ...: their scores are averaged")
        ] = 2
        prior_draws: Annotated[
            int, Field(ge=2, description="standard normal draws that a step's prior is estimated from, l (eq. 5)")
        ] = 5000
        epochs: Annotated[int, Field(ge=1, description="epochs of steps_per_epoch each")] = 50
        steps_per_epoch: Annotated[int, Field(ge=1, description="optimizer steps of an epoch")] = 20
        batch_size: Annotated[
            int, Field(ge=2, description="images per step, half of them normal and half labelled anomalous")
        ] = 48
        learning_rate: Annotated[float, Field(gt=0, description="of Adam")] = 2e-4
        weight_decay: Annotated[float, Field(ge=0, description="of Adam")] = 1e-5
        decay_epochs: Annotated[
            int, Field(ge=1, description="epochs after which the learning rate falls to a tenth (authors' code)")
        ] = 10
        max_gradient_norm: Annotated[float, Field(gt=0, description="gradients are cut to this (authors' code)")] = 1.0
        turn_degrees: Annotated[
            float, Field(ge=0, le=180, description="training images are turned by up to this (authors' code)")
        ] = 180.0
        map: Annotated[
            Literal["gradient", "patches"],
            Field(description="gradient: of the image score in the pixels, as published; patches: the patch scores"),
        ] = "gradient"
        smoothing_sigma: Annotated[
            float, Field(ge=0, description="Gaussian smoothing of the anomaly map in px (authors' code)")
        ] = 4.0

    params: Params

    def load_weights(self) -> str:
        """Loads what training starts from."""
        return self.load_start(self.params.backbone, self.params.last_layer, self.params.weights)

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone and patch scorer, the latter initialised by the seed."""
        backbone = Backbone(self.params.backbone, (self.params.last_layer,), self.seed)
        widths = [backbone.widths()[0], *self.params.hidden_dims, 1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "devnet"))
            layers = [nn.Conv2d(width, following, 1) for width, following in pairwise(widths)]
        parts = [part for layer in layers for part in (nn.ReLU(), layer)][1:]
        return {BACKBONE: backbone, HEAD: nn.Sequential(*parts)}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A fresh scorer on the loaded backbone, under Adam."""
        self.is_fitted = False
        self.networks = {**self.make_networks(), BACKBONE: self.fresh_backbone()}
        trained = nn.ModuleDict(self.networks).to(self.device).to(memory_format=torch.channels_last).train()
        rate, decay = self.params.learning_rate, self.params.weight_decay
        optimizer = torch.optim.Adam(trained.parameters(), lr=rate, weight_decay=decay)
        optimizer.register_step_pre_hook(self._cut_gradients)
        return TrainingPlan(
            trained,
            optimizer,
            self.params.epochs,
            self.params.batch_size,
            rate=lambda done: 0.1 ** (int(done) // self.params.decay_epochs),
            batches=self._batches,
        )

    def _cut_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for words in optimizer.param_groups:
            nn.utils.clip_grad_norm_(words["params"], self.params.max_gradient_norm)

    def _batches(self, labels: Mapping[str, int], epoch: int) -> list[list[str]]:
        """Half of every batch normal, half anomalous; each in rounds, so that no image comes twice as often as another.

        Raises:
            SpecError: one of the two is missing.
        """
        kinds = [sorted(key for key, label in labels.items() if label == wanted) for wanted in (0, 1)]
        if not all(kinds):
            missing = "normal" if kinds[1] else "labelled anomalous"
            raise SpecError(f"devnet: none of {len(labels)} images to fit on is {missing}. Add images, with labels.")
        sizes = [self.params.batch_size // 2, self.params.batch_size - self.params.batch_size // 2]
        drawn = [in_rounds(keys, self.seed, "batches", label, epoch) for label, keys in enumerate(kinds)]
        return [
            [key for size, keys in zip(sizes, drawn, strict=True) for key in islice(keys, size)]
            for _ in range(self.params.steps_per_epoch)
        ]

    def training_loss(self, piece: Batch) -> Tensor:
        """Eqs. 5-7 over turned images."""
        assert piece.labels is not None
        draws = piece.draws or [0] * len(piece.keys)
        turned = [
            self._turned(image_CHW, key, piece.epoch, draw)
            for image_CHW, key, draw in zip(piece.images_BCHW, piece.keys, draws, strict=True)
        ]
        score_B = self._scores(self._backbone().normalised(torch.stack(turned)))[0]
        step = draws[0] // self.params.batch_size
        generator = keyed_generator(self.seed, "prior", piece.epoch, step)
        prior_N = torch.randn(self.params.prior_draws, generator=generator).to(score_B)
        return deviation_loss(score_B, torch.tensor(piece.labels).to(score_B), prior_N, self.params.margin)

    def _turned(self, image_CHW: Tensor, *words: str | int) -> Tensor:
        degrees = self.params.turn_degrees * (2 * keyed_unit(self.seed, "turn", *words) - 1)
        return transforms.rotate(image_CHW, degrees)

    def _backbone(self) -> Backbone:
        backbone = self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        return backbone

    def _scores(self, normal_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image scores, and the patch scores (B, h, w) of every scale, from normalised images."""
        backbone, (height, width) = self._backbone(), normal_BCHW.shape[-2:]
        patches = []
        for scale in range(self.params.num_scales):
            size_px = (max(1, height >> scale), max(1, width >> scale))
            scaled = F.interpolate(normal_BCHW, size=size_px) if scale else normal_BCHW
            patches.append(self.networks[HEAD](backbone.features(scaled)[0])[:, 0].float().abs())
        each = [worst_mean(patch_Bhw.flatten(1), self.params.top_ratio) for patch_Bhw in patches]
        return torch.stack(each).mean(0), patches

    def end_training(self) -> None:
        """Freezes backbone and scorer."""
        self.freeze()

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Mean of the worst patch scores, and where they come from."""
        self.require_fitted()
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if self.params.map == "gradient":
            return self._with_gradients(images_BCHW)
        score_B, patches = self._scores(self._backbone().normalised(images_BCHW))
        maps = [smooth_upsampled(patch_Bhw, size_px, self.params.smoothing_sigma) for patch_Bhw in patches]
        return Scores(score_B, torch.stack(maps).mean(0))

    def _with_gradients(self, images_BCHW: Tensor) -> Scores:
        """As `score`; the map is the sum over channels of the magnitude of the image score's gradient."""
        with torch.inference_mode(False), torch.enable_grad():
            normal_BCHW = self._backbone().normalised(images_BCHW.clone()).requires_grad_(True)
            score_B = self._scores(normal_BCHW)[0]
            (gradient_BCHW,) = torch.autograd.grad(score_B.sum(), normal_BCHW)
        map_BHW = gradient_BCHW.abs().sum(1)
        return Scores(score_B.detach(), smooth(map_BHW, self.params.smoothing_sigma))


def worst_mean(score_BP: Tensor, ratio: float) -> Tensor:
    """Mean of the K largest scores of every image, K = the whole part of `ratio` times P, at least 1."""
    count = max(1, int(score_BP.shape[1] * ratio))
    return score_BP.topk(count, 1).values.mean(1)


def deviation_loss(score_B: Tensor, label_B: Tensor, prior_N: Tensor, margin: float) -> Tensor:
    """Eqs. 6-7: |dev| of normal images, max(0, margin - dev) of anomalous ones, mean over images."""
    deviation_B = (score_B - prior_N.mean()) / prior_N.std()
    return ((1 - label_B) * deviation_B.abs() + label_B * F.relu(margin - deviation_B)).mean()
