"""STFPM: a student learns a pretrained teacher's feature pyramid on normal images; mismatches are anomalous.

Source: Wang et al., "Student-Teacher Feature Pyramid Matching for Anomaly Detection", BMVC 2021, arXiv 2103.04257.
Differs from the paper: the last epoch is used instead of one chosen on a validation split.

Shapes: B images, C channels, h w feature grid, H W pixels.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.maps.anomaly_map import upsample
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import load_backbone

TEACHER, STUDENT = "teacher", "student"


class STFPM(NetworkDetector):
    """Feature mismatch between a student and its teacher over several levels."""

    info = DetectorInfo(
        title="STFPM",
        paper="arXiv:2103.04257",
        venue="BMVC 2021",
        summary="a student's features differ from its pretrained teacher's where an image is anomalous",
        published="MVTec AD, ResNet-18: 95.5 image AUROC, 97.0 pixel AUROC, 92.1 PRO (paper, tables 1-2)",
    )
    phases = ("train",)
    smoke: ClassVar = {"image_size": (64, 64), "epochs": 20, "batch_size": 16, "learning_rate": 0.2}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of STFPM."""

        backbone: Annotated[str, Field(description="teacher and student network (sec. 4.1)")] = "resnet18"
        layers: Annotated[
            tuple[str, ...], Field(min_length=1, description="matched levels, shallowest first (sec. 3.2)")
        ] = ("layer1", "layer2", "layer3")
        weights: Annotated[
            str, Field(description='teacher: "imagenet", "random", or a path or URL of a weights file')
        ] = "imagenet"
        epochs: Annotated[int, Field(ge=1, description="passes over the images (sec. 4.1)")] = 100
        batch_size: Annotated[int, Field(ge=1, description="images per step (sec. 4.1)")] = 32
        learning_rate: Annotated[float, Field(gt=0, description="of SGD (sec. 4.1)")] = 0.4
        momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD (sec. 4.1)")] = 0.9
        weight_decay: Annotated[float, Field(ge=0, description="of SGD (sec. 4.1)")] = 1e-4

    params: Params

    def load_weights(self) -> str:
        """Loads the teacher."""
        p = self.params
        teacher, source = load_backbone(p.backbone, p.layers, p.weights, self.seed, p.precision)
        self.networks = {TEACHER: teacher.freeze().to(self.device)}
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """Teacher and student, the latter initialised from the seed."""
        make = partial(Backbone, self.params.backbone, self.params.layers, self.seed, precision=self.params.precision)
        return {TEACHER: make(), STUDENT: make(STUDENT)}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A new student, optimised by SGD."""
        self.is_fitted = False
        student = self.make_networks()[STUDENT].to(self.device).to(memory_format=torch.channels_last).train()
        self.networks[STUDENT] = student
        optimizer = torch.optim.SGD(
            student.parameters(),
            lr=self.params.learning_rate,
            momentum=self.params.momentum,
            weight_decay=self.params.weight_decay,
        )
        return TrainingPlan(student, optimizer, self.params.epochs, self.params.batch_size)

    def training_loss(self, piece: Batch) -> Tensor:
        """Sum over levels of the mean over positions, averaged over the batch (eqs. 1-3)."""
        with torch.no_grad():
            teacher = self.networks[TEACHER](piece.images_BCHW)
        student = self.networks[STUDENT](piece.images_BCHW)
        losses = [level_error(t, s).mean() for t, s in zip(teacher, student, strict=True)]
        return torch.stack(losses).sum()

    def end_training(self) -> None:
        """Freezes the student."""
        self.freeze()

    @property
    def scores_by_map(self) -> bool:
        """Yes."""
        return True

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Product over levels of the upsampled errors (eq. 4); the image score is its maximum."""
        self.require_fitted()
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        map_BHW = torch.ones(len(images_BCHW), *size_px, device=self.device)
        pairs = zip(self.networks[TEACHER](images_BCHW), self.networks[STUDENT](images_BCHW), strict=True)
        for teacher, student in pairs:
            map_BHW = map_BHW * upsample(level_error(teacher, student), size_px)
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)


def level_error(teacher_BChw: Tensor, student_BChw: Tensor) -> Tensor:
    """Half the squared distance of the L2-normalised features at every position (eq. 1), (B, h, w)."""
    teacher = F.normalize(teacher_BChw, dim=1)
    student = F.normalize(student_BChw, dim=1)
    return 0.5 * (teacher - student).square().sum(1)
