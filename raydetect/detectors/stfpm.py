"""STFPM: a student learns a pretrained teacher's feature pyramid on normal images; where it fails is anomalous.

Source: Wang et al., "Student-Teacher Feature Pyramid Matching for Anomaly Detection", BMVC 2021, arXiv 2103.04257.
Differs from the paper: no validation split chooses the epoch; the last one is used.

Shapes: B images, C channels, h w feature grid, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raydetect.blocks.anomaly_map import upsample
from raydetect.blocks.backbone import Backbone
from raydetect.detectors._base import Batch, Detector, DetectorInfo, NotFittedError, Scores, TrainingPlan
from raydetect.detectors._weights import load_backbone

TEACHER, STUDENT = "teacher.", "student."


class STFPM(Detector):
    """Disagreement of a student with its teacher over several feature levels."""

    info = DetectorInfo(
        title="STFPM",
        paper="arXiv:2103.04257",
        venue="BMVC 2021",
        summary="a student fails to follow a pretrained teacher where an image is not normal",
        published="MVTec AD, ResNet-18: 95.5 image AUROC, 97.0 pixel AUROC, 92.1 PRO (paper, tables 1-2)",
    )
    phases = ("train",)

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

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Keeps the parameters."""
        super().__init__(params, seed)
        self.raw_teacher: Backbone | None = None
        self.raw_student: Backbone | None = None
        self.teacher: Backbone | None = None
        self.student: Backbone | None = None

    def load_weights(self) -> str:
        """Loads the teacher."""
        self.raw_teacher, said = load_backbone(self.params.backbone, self.params.layers, self.params.weights, self.seed)
        self.teacher = self.raw_teacher.frozen().to(self.device)
        return said

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A fresh student, initialised by the seed, under SGD."""
        self.student = None
        self.raw_student = Backbone(self.params.backbone, self.params.layers, self.seed, "student")
        self.raw_student.to(self.device).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(
            self.raw_student.parameters(),
            lr=self.params.learning_rate,
            momentum=self.params.momentum,
            weight_decay=self.params.weight_decay,
        )
        return TrainingPlan(self.raw_student, optimizer, self.params.epochs, self.params.batch_size)

    def training_loss(self, batch: Batch) -> Tensor:
        """Eqs. 1-3: sum over levels of the mean over positions, averaged over the batch."""
        assert self.teacher is not None and self.raw_student is not None
        with torch.no_grad():
            teacher = self.teacher(batch.images_BCHW)
        student = self.raw_student(batch.images_BCHW)
        losses = [level_error(t, s).mean() for t, s in zip(teacher, student, strict=True)]
        return torch.stack(losses).sum()

    def end_training(self) -> None:
        """Freezes the student."""
        assert self.raw_student is not None
        self.raw_student.eval()
        self.student = self.raw_student.frozen().to(self.device)

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Eq. 4: the product over levels of upsampled errors; the image score is its maximum."""
        if self.teacher is None or self.student is None:
            raise NotFittedError("stfpm: is not fitted. Fit it or load an artifact first.")
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        map_BHW = torch.ones(len(images_BCHW), *size_px, device=self.device)
        for teacher, student in zip(self.teacher(images_BCHW), self.student(images_BCHW), strict=True):
            map_BHW = map_BHW * upsample(level_error(teacher, student), size_px)
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)

    def tensors(self) -> dict[str, Tensor]:
        """Weights of teacher and student."""
        if self.raw_teacher is None or self.student is None or self.raw_student is None:
            raise NotFittedError("stfpm: is not fitted, there is nothing to save.")
        teacher = {TEACHER + name: value for name, value in self.raw_teacher.weights().items()}
        return teacher | {STUDENT + name: value for name, value in self.raw_student.weights().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores teacher and student."""
        self.raw_teacher = self._restored(tensors, TEACHER)
        self.raw_student = self._restored(tensors, STUDENT)
        self.teacher = self.raw_teacher.frozen().to(self.device)
        self.student = self.raw_student.frozen().to(self.device)

    def _restored(self, tensors: Mapping[str, Tensor], prefix: str) -> Backbone:
        network = Backbone(self.params.backbone, self.params.layers, self.seed)
        mine = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        network.load(mine, "the artifact")
        return network

    def to(self, device: torch.device) -> "STFPM":
        """Moves teacher and student."""
        self.device = device
        for network in (self.teacher, self.student):
            if network is not None:
                network.to(device)
        return self


def level_error(teacher_BChw: Tensor, student_BChw: Tensor) -> Tensor:
    """Half the squared distance of the two L2-normalised features at every position (eq. 1), shape (B, h, w)."""
    teacher = F.normalize(teacher_BChw, dim=1)
    student = F.normalize(student_BChw, dim=1)
    return 0.5 * (teacher - student).square().sum(1)
