"""CutPaste: a network learns to distinguish normal images from copies with a patch cut out and pasted elsewhere.

The anomaly score of an image is the distance of its embedding to a Gaussian fitted on normal embeddings.

Source: Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021, arXiv
2104.04015; eq. 1 (loss), sec. 2.2 (augmentations), 2.3 (3-way), 2.4 (patches), Gaussian density estimator of sec. 2;
hyperparameters from the appendix. Maps: Selvaraju et al., "Grad-CAM", ICCV 2017, eqs. 1-2, here in closed form.
Where the paper is silent, as in the authors' code for their earlier two-stage detectors: embeddings are L2-normalised
and images are shifted by up to an eighth; the head with 512 and 128 units follows public implementations.
Differs from the paper: training starts from ImageNet weights unless `pretrained` is false (the paper's tables are from
scratch); the covariance uses Ledoit-Wolf shrinkage, because it has more dims than there are images; one Gaussian for
all patch positions; a pixel is the mean of patch scores, where the paper's transposed convolution sums them.

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

from raydetect.blocks.augment import cut_and_paste
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.coresets.gaussian import Gaussian, fit_gaussian
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.maps.anomaly_map import upsample
from raydetect.blocks.maps.grad_cam import grad_cam, unit
from raydetect.blocks.maps.patch_windows import pooled_windows, upsample_windows
from raydetect.blocks.seeding import in_rounds, keyed_generator, keyed_seed
from raydetect.detectors._base import (
    Batch,
    Detector,
    DetectorInfo,
    Known,
    ProgressCallback,
    Scores,
    TrainingPlan,
    UsedIf,
)
from raydetect.detectors._networks import FineTuned
from raydetect.detectors._weights import IMAGENET, RANDOM
from raydetect.errors import SpecError

BACKBONE, GAUSSIAN, HEAD, EMBEDDINGS = "backbone", "gaussian", "head", "embeddings"
NUM_CLASSES = {"normal": 2, "scar": 2, "3way": 3}


class CutPaste(FineTuned):
    """Mahalanobis distance of embeddings learned by recognising pasted patches."""

    info = DetectorInfo(
        title="CutPaste",
        paper="arXiv:2104.04015",
        venue="CVPR 2021",
        summary="distance to a Gaussian of embeddings, learned by recognising images with a pasted patch",
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
            str, Field(description="layer whose spatial mean is the embedding; layer4 = the whole trunk")
        ] = "layer4"
        weights: Annotated[
            str,
            Field(description='initial weights for training: "imagenet", "random", or a path or URL of a weights file'),
        ] = IMAGENET
        pretrained: Annotated[
            bool, Field(description="false = weights: random, as in the paper's tables 1 and 2; true = use weights")
        ] = True
        level: Annotated[
            Literal["image", "patch"],
            Field(description="image: whole images, map by Grad-CAM; patch: windows of patch_size_px (sec. 2.4)"),
        ] = "image"
        augment_type: Annotated[
            Literal["normal", "scar", "3way"],
            Field(description="augmentation to recognise: CutPaste, CutPaste-Scar, or both as two classes (sec. 2.3)"),
        ] = "3way"
        epochs: Annotated[int, Field(ge=1, description="epochs of steps_per_epoch each (appendix)")] = 256
        steps_per_epoch: Annotated[
            int, Field(ge=1, description="optimizer steps per epoch, as the paper defines it (appendix)")
        ] = 256
        batch_size: Annotated[
            int,
            Field(ge=3, description="original and augmented images per step (appendix: 96 for 3-way, else 64)"),
        ] = 96
        learning_rate: Annotated[float, Field(gt=0, description="of SGD, with cosine decay to 0 (appendix)")] = 0.03
        momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD (appendix)")] = 0.9
        weight_decay: Annotated[float, Field(ge=0, description="of SGD (appendix)")] = 3e-5
        head_dims: Annotated[
            tuple[int, ...], Field(description="hidden layers between embedding and classes (public implementations)")
        ] = (512, 128)
        area_ratio: Annotated[
            tuple[float, float],
            Field(description="CutPaste: patch area as a share of the image (appendix)"),
            UsedIf("augment_type", ("normal", "3way")),
        ] = (0.02, 0.15)
        aspect_ratio: Annotated[
            tuple[float, float],
            Field(description="CutPaste: width over height of the patch (appendix)"),
            UsedIf("augment_type", ("normal", "3way")),
        ] = (0.3, 3.3)
        scar_width_px: Annotated[
            tuple[float, float],
            Field(description="width of scars, at 256 px of image height (appendix)"),
            UsedIf("augment_type", ("scar", "3way")),
        ] = (2, 16)
        scar_length_px: Annotated[
            tuple[float, float],
            Field(description="length of scars, at 256 px of image height (appendix)"),
            UsedIf("augment_type", ("scar", "3way")),
        ] = (10, 25)
        scar_degrees: Annotated[
            float,
            Field(ge=0, le=180, description="maximum rotation of scars (appendix)"),
            UsedIf("augment_type", ("scar", "3way")),
        ] = 45
        jitter: Annotated[
            float, Field(ge=0, le=0.5, description="colour jitter of images and of pasted patches (appendix)")
        ] = 0.1
        shift_ratio: Annotated[
            float, Field(ge=0, lt=1, description="maximum shift of images, as a share of their size (authors' code)")
        ] = 0.125
        patch_size_px: Annotated[
            int, Field(ge=1, description="level patch: side of a window (sec. 4.2)"), UsedIf("level", ("patch",))
        ] = 32
        patch_stride_px: Annotated[
            int, Field(ge=1, description="level patch: stride between windows (sec. 4.2)"), UsedIf("level", ("patch",))
        ] = 4
        smoothing_sigma: Annotated[
            float,
            Field(
                gt=0, le=1000, description="level patch: Gaussian sigma for spreading a window's score, in px (FCDD)"
            ),
            UsedIf("level", ("patch",)),
        ] = 10.0

        @model_validator(mode="before")
        @classmethod
        def _agree(cls, values: Any) -> Any:
            """`pretrained: false` and `weights: random` are equivalent; the record holds both."""
            pretrained, weights = values.get("pretrained"), values.get("weights")
            if pretrained is False and weights not in (None, RANDOM):
                raise ValueError(f"pretrained: false contradicts weights: {weights}; remove one of them")
            if pretrained is True and weights == RANDOM:
                raise ValueError("pretrained: true contradicts weights: random; remove one of them")
            if weights == RANDOM:
                return {**values, "pretrained": False}
            return {**values, "weights": RANDOM} if pretrained is False else values

        def __post_init__(self) -> None:
            """Rejects empty ranges."""
            for name in ("area_ratio", "aspect_ratio", "scar_width_px", "scar_length_px"):
                low, high = getattr(self, name)
                if not 0 < low <= high:
                    raise ValueError(f"{name}: needs 0 < low <= high, given {low} and {high}")
            if self.area_ratio[1] > 1:
                raise ValueError(f"area_ratio: cannot cut {self.area_ratio[1]} of an image; give at most 1")

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self._training = nn.ModuleDict()
        self.shrinkage: float | None = None

    def load_weights(self) -> str:
        """Loads the initial weights for training."""
        return self.load_start(self.params.backbone, self.params.last_layer, self.params.weights)

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone and Gaussian."""
        p = self.params
        backbone = Backbone(p.backbone, (p.last_layer,), self.seed, precision=p.precision)
        return {BACKBONE: backbone, GAUSSIAN: Gaussian(backbone.widths()[0])}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A new head on the loaded backbone, optimised by SGD."""
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

    def _batches(self, known: Mapping[str, Known], epoch: int) -> list[list[str]]:
        """The batches of an epoch: images in rounds, each round in a different order."""
        size = self.params.batch_size // NUM_CLASSES[self.params.augment_type]
        drawn = in_rounds(sorted(known), self.seed, "batches", epoch)
        return [list(islice(drawn, size)) for _ in range(self.params.steps_per_epoch)]

    def prepare_image(self, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        """The image of every class, in [0, 255]."""
        versions = self._versions(image_3HW, keyed_generator(self.seed, "paste", key, epoch, draw))
        return tuple(version * 255 for version in versions)

    def training_loss(self, piece: Batch) -> Tensor:
        """Cross entropy over every image unmodified (class 0) and with pasted patches (eq. 1)."""
        images_BCHW = torch.cat(piece.prepared)
        classes = torch.arange(len(piece.prepared), device=images_BCHW.device)
        class_B = classes.repeat_interleave(len(piece.keys))
        pooled_BD = self._training[BACKBONE](images_BCHW)[0].mean((2, 3))
        return F.cross_entropy(self.run(self._training[HEAD], pooled_BD), class_B)

    def _versions(self, image_CHW: Tensor, random: torch.Generator) -> list[Tensor]:
        """The jittered and shifted image, and its `augment_type` augmentations; float32 in [0, 1]."""
        p = self.params
        image_CHW = cut_and_paste.jittered(image_CHW.float() / 255, p.jitter, random)
        image_CHW = cut_and_paste.shifted(image_CHW, p.shift_ratio, random)
        if p.level == "patch":
            self._require_windows(image_CHW)
            image_CHW = cut_and_paste.cropped(image_CHW, (p.patch_size_px, p.patch_size_px), random)
        versions = [image_CHW]
        if p.augment_type != "scar":
            versions.append(cut_and_paste.paste_patch(image_CHW, p.area_ratio, p.aspect_ratio, p.jitter, random))
        if p.augment_type != "normal":
            scale = p.image_size[0] / 256
            width, length = ((low * scale, high * scale) for low, high in (p.scar_width_px, p.scar_length_px))
            versions.append(cut_and_paste.paste_scar(image_CHW, width, length, p.scar_degrees, p.jitter, random))
        return versions

    def end_training(self) -> None:
        """Freezes the backbone and drops the head."""
        self._training = nn.ModuleDict()
        self.freeze()
        self.is_fitted = False

    @property
    def scores_by_map(self) -> bool:
        """Whether windows are scored, and not only whole images."""
        return self.params.level == "patch"

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """The embedding of every image, or of each of its windows."""
        return {EMBEDDINGS: unit(self._pooled(batch.images_BCHW)).flatten(1, -2)}

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Fits the Gaussian of normal embeddings."""
        gaussian, self.shrinkage = fit_gaussian(state.rows[EMBEDDINGS])
        self.networks[GAUSSIAN] = gaussian.to(self.device)
        self.freeze()

    def facts(self) -> dict[str, Any]:
        """The shrinkage: weight of the scaled identity in the covariance."""
        return {} if self.shrinkage is None else {"shrinkage": round(self.shrinkage, 6)}

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Mahalanobis distance of the image, or the maximum over its windows."""
        self.require_fitted()
        gaussian = self.networks[GAUSSIAN]
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if self.params.level == "patch":
            score_Bhw = gaussian(unit(self._pooled(images_BCHW))).float()
            side, stride = self.params.patch_size_px, self.params.patch_stride_px
            map_BHW = upsample_windows(score_Bhw, size_px, side, stride, self.params.smoothing_sigma)
            return Scores(score_Bhw.flatten(1).amax(1), map_BHW)
        features_BDhw = self.networks[BACKBONE](images_BCHW)[0]
        assert isinstance(gaussian, Gaussian)
        score_B = gaussian(unit(features_BDhw.mean((2, 3)))).float()
        return Scores(score_B, upsample(grad_cam(features_BDhw, gaussian), size_px))

    def _pooled(self, images_BCHW: Tensor) -> Tensor:
        """Mean features: (B, 1, D) for whole images, (B, h, w, D) for windows."""
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
