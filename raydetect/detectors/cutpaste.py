"""CutPaste: a network learns to tell normal images from the same with a patch cut out and pasted elsewhere.

An image is as anomalous as its embedding is far from the Gaussian of normal ones.

Source: Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021, arXiv
2104.04015; eq. 1 (loss), sec. 2.2 (augmentations), 2.3 (3-way), 2.4 (patches), Gaussian density estimator of sec. 2;
settings of the appendix. Gradients of maps: Selvaraju et al., "Grad-CAM", ICCV 2017, eqs. 1-2, here in closed form.
Where the paper is silent, as the authors' code for their earlier two-stage detectors: embeddings are L2-normalised,
images are shifted by up to an eighth; the head of 512 and 128 as public implementations have it.
Differs from the paper: starts from ImageNet weights unless `pretrained` is false (its tables are from scratch); the
covariance is shrunk as Ledoit and Wolf do, because it has more dims than there are images; one Gaussian for all
places of patches; pixels are means of patch scores, where a transposed convolution sums them.

Shapes: B images, C channels, h w feature or window grid, H W pixels, R windows of one image, D embedding dim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from raydetect.blocks import pasting
from raydetect.blocks.anomaly_map import upsample
from raydetect.blocks.backbone import Backbone
from raydetect.blocks.gaussian import Gaussian, fit_gaussian
from raydetect.blocks.grad_cam import grad_cam, unit
from raydetect.blocks.patch_windows import pooled_windows, spread
from raydetect.blocks.rows import FitState
from raydetect.blocks.seeding import in_rounds, keyed_generator, keyed_seed
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, Tick, TrainingPlan
from raydetect.detectors._networks import FineTuned
from raydetect.detectors._weights import IMAGENET, RANDOM
from raydetect.errors import SpecError

BACKBONE, GAUSSIAN, HEAD, EMBEDDINGS = "backbone", "gaussian", "head", "embeddings"
NUM_CLASSES = {"normal": 2, "scar": 2, "3way": 3}


class CutPaste(FineTuned):
    """Mahalanobis distance of an embedding that was learned by telling pasted patches."""

    info = DetectorInfo(
        title="CutPaste",
        paper="arXiv:2104.04015",
        venue="CVPR 2021",
        summary="distance to the Gaussian of embeddings that learned to tell images with a pasted patch",
        published="MVTec AD, ResNet-18 from scratch: 95.2 image AUROC (3-way), 96.0 pixel AUROC by patches and 88.3 "
        "by gradients (paper, tables 1-2)",
    )
    phases = ("train", "collect")
    smoke: ClassVar = {
        "image_size": (64, 64),
        "last_layer": "layer2",
        "epochs": 5,
        "steps_per_epoch": 8,
        "batch_size": 24,
        "head_dims": (64,),
        "patch_stride_px": 16,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of CutPaste."""

        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 4.1)")] = "resnet18"
        last_layer: Annotated[
            str, Field(description="the embedding is the mean over positions of this layer; layer4 = the whole trunk")
        ] = "layer4"
        weights: Annotated[
            str,
            Field(description='what training starts from: "imagenet", "random", or a path or URL of a weights file'),
        ] = IMAGENET
        pretrained: Annotated[
            bool, Field(description="false = weights: random, as in the paper's tables 1 and 2; true = as weights says")
        ] = True
        level: Annotated[
            Literal["image", "patch"],
            Field(description="image: whole images, map by Grad-CAM; patch: windows of patch_size_px (sec. 2.4)"),
        ] = "image"
        augment_type: Annotated[
            Literal["normal", "scar", "3way"],
            Field(description="what is told from normal: CutPaste, CutPaste-Scar, or both as two classes (sec. 2.3)"),
        ] = "3way"
        epochs: Annotated[int, Field(ge=1, description="epochs of steps_per_epoch each (appendix)")] = 256
        steps_per_epoch: Annotated[
            int, Field(ge=1, description="optimizer steps that the paper calls an epoch (appendix)")
        ] = 256
        batch_size: Annotated[
            int,
            Field(ge=3, description="originals and pasted ones in a step (appendix: 96 for 3-way, 64 for the others)"),
        ] = 96
        learning_rate: Annotated[float, Field(gt=0, description="of SGD, falling to 0 by a cosine (appendix)")] = 0.03
        momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD (appendix)")] = 0.9
        weight_decay: Annotated[float, Field(ge=0, description="of SGD (appendix)")] = 3e-5
        head_dims: Annotated[
            tuple[int, ...], Field(description="hidden layers between embedding and classes (public implementations)")
        ] = (512, 128)
        area_ratio: Annotated[
            tuple[float, float], Field(description="share of the image that CutPaste cuts (appendix)")
        ] = (0.02, 0.15)
        aspect_ratio: Annotated[
            tuple[float, float], Field(description="width over height of what CutPaste cuts (appendix)")
        ] = (0.3, 3.3)
        scar_width_px: Annotated[
            tuple[float, float], Field(description="width of scars, at 256 px of image height (appendix)")
        ] = (2, 16)
        scar_length_px: Annotated[
            tuple[float, float], Field(description="length of scars, at 256 px of image height (appendix)")
        ] = (10, 25)
        scar_degrees: Annotated[float, Field(ge=0, le=180, description="scars are turned by up to this (appendix)")] = (
            45
        )
        jitter: Annotated[
            float, Field(ge=0, le=0.5, description="of colours, of every image and of what is pasted (appendix)")
        ] = 0.1
        shift_ratio: Annotated[
            float, Field(ge=0, lt=1, description="images are shifted by up to this share of their size (authors' code)")
        ] = 0.125
        patch_size_px: Annotated[int, Field(ge=1, description="level patch: side of a window (sec. 4.2)")] = 32
        patch_stride_px: Annotated[int, Field(ge=1, description="level patch: from window to window (sec. 4.2)")] = 4
        smoothing_sigma: Annotated[
            float, Field(gt=0, description="level patch: of the Gaussian that spreads a window's score, in px (FCDD)")
        ] = 10.0

        @model_validator(mode="before")
        @classmethod
        def _agree(cls, values: Any) -> Any:
            """`pretrained: false` and `weights: random` say the same; the record holds both."""
            pretrained, weights = values.get("pretrained"), values.get("weights")
            if pretrained is False and weights not in (None, RANDOM):
                raise ValueError(f"pretrained: false contradicts weights: {weights}; remove one of them")
            if pretrained is True and weights == RANDOM:
                raise ValueError("pretrained: true contradicts weights: random; remove one of them")
            if weights == RANDOM:
                return {**values, "pretrained": False}
            return {**values, "weights": RANDOM} if pretrained is False else values

        def __post_init__(self) -> None:
            """Refuses ranges that hold nothing."""
            for name in ("area_ratio", "aspect_ratio", "scar_width_px", "scar_length_px"):
                low, high = getattr(self, name)
                if not 0 < low <= high:
                    raise ValueError(f"{name}: needs 0 < low <= high, given {low} and {high}")
            if self.area_ratio[1] > 1:
                raise ValueError(f"area_ratio: cannot cut {self.area_ratio[1]} of an image; give at most 1")

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Keeps the parameters."""
        super().__init__(params, seed)
        self._training = nn.ModuleDict()
        self.shrinkage: float | None = None

    def load_weights(self) -> str:
        """Loads what training starts from."""
        return self.load_start(self.params.backbone, self.params.last_layer, self.params.weights)

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone and Gaussian."""
        backbone = Backbone(self.params.backbone, (self.params.last_layer,), self.seed)
        return {BACKBONE: backbone, GAUSSIAN: Gaussian(backbone.widths()[0])}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A fresh head on the loaded backbone, under SGD."""
        self.is_fitted = False
        backbone = self.fresh_backbone()
        widths = [backbone.widths()[0], *self.params.head_dims]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "cutpaste"))
            layers = [part for pair in pairwise(widths) for part in _hidden(*pair)]
            head = nn.Sequential(*layers, nn.Linear(widths[-1], NUM_CLASSES[self.params.augment_type]))
        self._training = nn.ModuleDict({BACKBONE: backbone.to(memory_format=torch.channels_last), HEAD: head})
        self._training.to(self.device).train()
        self.networks = {BACKBONE: backbone}
        optimizer = torch.optim.SGD(
            self._training.parameters(),
            lr=self.params.learning_rate,
            momentum=self.params.momentum,
            weight_decay=self.params.weight_decay,
        )
        epochs = self.params.epochs
        return TrainingPlan(
            self._training,
            optimizer,
            epochs,
            self.params.batch_size,
            rate=lambda done: 0.5 * (1 + math.cos(math.pi * done / epochs)),
            batches=self._batches,
        )

    def _batches(self, labels: Mapping[str, int], epoch: int) -> list[list[str]]:
        """An epoch's steps: the images in rounds, each round in an order of its own."""
        size = self.params.batch_size // NUM_CLASSES[self.params.augment_type]
        drawn = in_rounds(sorted(labels), self.seed, "batches", epoch)
        return [list(islice(drawn, size)) for _ in range(self.params.steps_per_epoch)]

    def training_loss(self, piece: Batch) -> Tensor:
        """Eq. 1: cross entropy over every image as it is (class 0) and with what is pasted into it."""
        draws = piece.draws or [0] * len(piece.keys)
        with torch.no_grad():
            made = [
                self._versions(image_CHW, keyed_generator(self.seed, "paste", key, piece.epoch, draw))
                for image_CHW, key, draw in zip(piece.images_BCHW, piece.keys, draws, strict=True)
            ]
            images_BCHW = torch.cat([torch.stack(version) for version in zip(*made, strict=True)]) * 255
        class_B = torch.arange(len(made[0]), device=images_BCHW.device).repeat_interleave(len(made))
        pooled_BD = self._training[BACKBONE](images_BCHW)[0].mean((2, 3))
        return F.cross_entropy(self._training[HEAD](pooled_BD), class_B)

    def _versions(self, image_CHW: Tensor, random: torch.Generator) -> list[Tensor]:
        """The image after mild changes, and that with what `augment_type` pastes into it; float32 in [0, 1]."""
        p = self.params
        image_CHW = pasting.jittered(image_CHW.float() / 255, p.jitter, random)
        image_CHW = pasting.shifted(image_CHW, p.shift_ratio, random)
        if p.level == "patch":
            self._require_windows(image_CHW)
            image_CHW = pasting.cropped(image_CHW, (p.patch_size_px, p.patch_size_px), random)
        made = [image_CHW]
        if p.augment_type != "scar":
            made.append(pasting.paste_patch(image_CHW, p.area_ratio, p.aspect_ratio, p.jitter, random))
        if p.augment_type != "normal":
            scale = p.image_size[0] / 256
            width, length = ((low * scale, high * scale) for low, high in (p.scar_width_px, p.scar_length_px))
            made.append(pasting.paste_scar(image_CHW, width, length, p.scar_degrees, p.jitter, random))
        return made

    def end_training(self) -> None:
        """Freezes the backbone; the head has done its work."""
        self._training = nn.ModuleDict()
        self.freeze()
        self.is_fitted = False

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """The embedding of every image, or of every window of it."""
        return {EMBEDDINGS: unit(self._pooled(batch.images_BCHW)).flatten(1, -2)}

    def finish(self, state: FitState, tick: Tick) -> None:
        """Fits the Gaussian of normal embeddings."""
        gaussian, self.shrinkage = fit_gaussian(state.rows[EMBEDDINGS])
        self.networks[GAUSSIAN] = gaussian.to(self.device)
        self.freeze()

    def facts(self) -> dict[str, Any]:
        """How much of the covariance is the scaled identity."""
        return {} if self.shrinkage is None else {"shrinkage": round(self.shrinkage, 6)}

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Mahalanobis distances: of the image, or the largest of its windows."""
        self.require_fitted()
        gaussian = self.networks[GAUSSIAN]
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if self.params.level == "patch":
            score_Bhw = gaussian(unit(self._pooled(images_BCHW))).float()
            side, stride = self.params.patch_size_px, self.params.patch_stride_px
            map_BHW = spread(score_Bhw, size_px, side, stride, self.params.smoothing_sigma)
            return Scores(score_Bhw.flatten(1).amax(1), map_BHW)
        features_BDhw = self.networks[BACKBONE](images_BCHW)[0]
        assert isinstance(gaussian, Gaussian)
        score_B = gaussian(unit(features_BDhw.mean((2, 3)))).float()
        return Scores(score_B, upsample(grad_cam(features_BDhw, gaussian), size_px))

    def _pooled(self, images_BCHW: Tensor) -> Tensor:
        """Mean features: (B, 1, D) of whole images, (B, h, w, D) of windows."""
        backbone = self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        if self.params.level == "image":
            return backbone(images_BCHW)[0].mean((2, 3))[:, None]
        self._require_windows(images_BCHW)
        side, stride = self.params.patch_size_px, self.params.patch_stride_px
        return pooled_windows(backbone, images_BCHW, side, stride)

    def _require_windows(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        if min(height, width) < self.params.patch_size_px:
            raise SpecError(
                f"cutpaste: images of {height} x {width} px are smaller than patch_size_px = "
                f"{self.params.patch_size_px}. Lower it or raise image_size."
            )


def _hidden(width: int, next_width: int) -> list[nn.Module]:
    return [nn.Linear(width, next_width), nn.BatchNorm1d(next_width), nn.ReLU()]
