"""RegAD: a network learns to register images of one category with each other, and so needs no training for a new one.

Its registered features of a few normal images of the new category, the supports, in 22 views each, give a Gaussian for
every position; the distance to it is the anomaly score.

Source: Huang et al., "Registration based Few-Shot Anomaly Detection", ECCV 2022, arXiv 2207.07361: sec. 3.1 (spatial
transformers, Siamese network and eqs. 2-3), sec. 3.2 (Gaussians, eqs. 4-6), sec. 4.1 (settings), and its official code
(MediaBrain-SJTU/RegAD) where the paper is silent.
Differs from the paper: the last epoch is used (official code: the best one on the test images). Differs from the
official code: a step registers pairs of images, as in the paper, where the code averages the features of k supports;
batches of a category have nearly equal sizes; the learning rate falls from its full value, where the code is one
epoch ahead, so that its last epoch has a rate of 0; what the code computes with the loss at test time and discards is
not computed. Distances are exact but need no D x D covariance (`blocks/coresets/position_gaussians.py`). One set of
supports is used, chosen by keyed hash; the paper's mean over ten sets is of figures, not of scores.

Shapes: B images, P pairs, V views, S cells of a level, C channels, H W pixels.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.augment.support_views import NUM_VIEWS, support_views
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.coresets.position_gaussians import PositionGaussians
from raydetect.blocks.maps.anomaly_map import smooth_upsampled
from raydetect.blocks.networks.registration import (
    LEVELS,
    STRIDES,
    WIDTHS,
    Registered,
    RegistrationTrunk,
    registration_encoder,
    registration_loss,
    registration_predictor,
)
from raydetect.blocks.networks.unet import keyed_init
from raydetect.blocks.seeding import keyed_unit, shuffled
from raydetect.detectors._base import (
    Batch,
    Detector,
    DetectorInfo,
    ImageSize,
    Known,
    NotFittedError,
    ProgressCallback,
    Scores,
    TrainingPlan,
)
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import WeightsName, load_backbone
from raydetect.errors import SpecError

TRUNK, ENCODER, PREDICTOR = "trunk", "encoder", "predictor"
PAIR = 2


class RegAD(NetworkDetector):
    """Distance of registered features to a Gaussian of a few normal images at every position."""

    info = DetectorInfo(
        title="RegAD",
        paper="arXiv:2207.07361",
        venue="ECCV 2022",
        summary="distance to a Gaussian of a few normal images, by features trained to register other categories",
        images="a few normal",
        auxiliary="other categories",
        published="MVTec AD, trained on the other 14 categories, mean of 10 support sets, best epoch on test images: "
        "85.7 image AUROC, 94.6 pixel AUROC with k = 2; 88.2, 95.8 with k = 4; 91.2, 96.8 with k = 8 (paper, tables 1 "
        "and 3); 85.5, 95.6; 89.2, 96.2; 91.2, 97.1 (official code)",
    )
    phases = ("train", "collect")
    smoke: ClassVar = {
        "weights": "random",
        "image_size": (64, 64),
        "k_shot": 8,
        "epochs": 2,
        "batch_size": 8,
        "smoothing_sigma": 1.0,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of RegAD."""

        image_size: Annotated[
            ImageSize,
            Field(
                description="(height, width) in px that images are resized to, multiples of 16; one number = a square "
                "(sec. 4.1). The networks are built for it"
            ),
        ] = (224, 224)
        backbone: Annotated[
            Literal["resnet18", "resnet34"], Field(description="network whose layers 1 to 3 are trained (sec. 4.1)")
        ] = "resnet18"
        weights: WeightsName = "imagenet"
        k_shot: Annotated[
            int,
            Field(
                ge=1,
                description="normal images to compare with, the supports, chosen by keyed hash; all if fewer (the "
                "paper has 2, 4 and 8, the official code 2)",
            ),
        ] = 2
        epochs: Annotated[int, Field(ge=1, description="passes over the auxiliary images (sec. 4.1)")] = 50
        batch_size: Annotated[int, Field(ge=1, description="pairs of images of one category in a step (sec. 4.1)")] = 32
        learning_rate: Annotated[
            float, Field(gt=0, description="of SGD, with cosine decay from epoch to epoch (sec. 4.1)")
        ] = 1e-4
        momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD (sec. 4.1)")] = 0.9
        smoothing_sigma: Annotated[
            float, Field(ge=0, le=1000, description="Gaussian smoothing of the anomaly map in px (official code)")
        ] = 4.0

        def __post_init__(self) -> None:
            if min(self.image_size) < STRIDES[-1] or any(side % STRIDES[-1] for side in self.image_size):
                raise ValueError(f"image_size {list(self.image_size)} has a side that is not a multiple of 16 px")

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self.gaussians: PositionGaussians | None = None
        self._start: nn.Module | None = None
        self._heads = nn.ModuleDict()

    def num_collected(self) -> int:
        """`k_shot`."""
        return self.params.k_shot

    def load_weights(self) -> str:
        """Loads the initial weights of the trunk for training."""
        p = self.params
        backbone, source = load_backbone(p.backbone, LEVELS, p.weights, self.seed)
        self._start = self.make_networks()[TRUNK]
        self._start.load_state_dict(backbone.weights(), strict=False)
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """The trunk, with random weights from the seed; the heads serve the training alone."""
        with keyed_init(self.seed, TRUNK):
            trunk = RegistrationTrunk(self.params.backbone, self.params.image_size)
        return {TRUNK: trunk}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """The loaded trunk and new heads, optimised by SGD."""
        if self._start is None:
            raise NotFittedError("regad: has no trunk yet. Call load_weights first.")
        self.is_fitted, self.gaussians = False, None
        with keyed_init(self.seed, ENCODER):
            heads = {ENCODER: registration_encoder(WIDTHS[-1]), PREDICTOR: registration_predictor(WIDTHS[-1])}
        trained = nn.ModuleDict({TRUNK: copy.deepcopy(self._start), **heads})
        trained.to(self.device).to(memory_format=torch.channels_last).train()
        self.networks = {TRUNK: trained[TRUNK]}
        self._heads = nn.ModuleDict({name: trained[name] for name in heads})
        p = self.params
        optimizer = torch.optim.SGD(trained.parameters(), lr=p.learning_rate, momentum=p.momentum)
        return TrainingPlan(
            trained,
            optimizer,
            p.epochs,
            PAIR * p.batch_size,
            rate=lambda done: 0.5 * (1 + math.cos(math.pi * math.floor(done) / p.epochs)),
            batches=self._batches,
            images_per_item=PAIR,
        )

    def _batches(self, known: Mapping[str, Known], epoch: int) -> list[list[str]]:
        """Every image with another of its category, in batches of one category, in a keyed order."""
        members: dict[str, list[str]] = {}
        for key, image in known.items():
            members.setdefault(image.category or "", []).append(key)
        found = {}
        for category, keys in sorted(members.items()):
            if len(keys) == 1:
                raise SpecError(
                    f"regad: category {category!r} of the auxiliary images has one image, and pairs need two. "
                    "Add images or leave the category out."
                )
            order = shuffled(keys, self.seed, epoch)
            count = math.ceil(len(order) / self.params.batch_size)
            for number, part in enumerate(np.array_split(np.arange(len(order)), count)):
                found[f"{category}:{number}"] = [key for i in part for key in self._pair(order, int(i), epoch)]
        return [found[name] for name in shuffled(list(found), self.seed, epoch)]

    def _pair(self, order: Sequence[str], index: int, epoch: int) -> tuple[str, str]:
        """An image and another one of its category, drawn for the epoch."""
        others = len(order) - 1
        step = 1 + int(keyed_unit(self.seed, "support", epoch, order[index]) * others)
        return order[index], order[(index + step) % len(order)]

    def training_loss(self, piece: Batch) -> Tensor:
        """Negative cosine between the predicted and the other features of each pair, at every position (eqs. 2-3)."""
        pixels = piece.images_BCHW / 255.0
        encoded, predicted = [], []
        for images_PCHW in (pixels[0::PAIR], pixels[1::PAIR]):  # separate batch norms, as in the official code
            registered = Registered(*self.run(self.networks[TRUNK], images_PCHW))
            encoded.append(self.run(self._heads[ENCODER], registered.levels[-1]))
            predicted.append(self.run(self._heads[PREDICTOR], encoded[-1]))
        return registration_loss(encoded, predicted)

    def end_training(self) -> None:
        """Freezes the trunk and drops the heads, which scoring does not need."""
        self._heads = nn.ModuleDict()
        trunk = self.networks[TRUNK].to(memory_format=torch.contiguous_format)  # as when loaded, for the same rounding
        trunk.eval().requires_grad_(False)

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Registered features of all views of every image, (B, S, V * C) for each level."""
        images = [self._features(support_views(image / 255.0)) for image in batch.images_BCHW]
        return {
            name: torch.stack([image[number].flatten(2).permute(2, 0, 1).flatten(1) for image in images])
            for number, name in enumerate(LEVELS)
        }

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Fits the Gaussians on the supports of all workers."""
        levels = []
        for name, (height, width), channels in zip(LEVELS, self._grids(), WIDTHS, strict=True):
            rows = state.rows[name].all_rows().view(-1, height * width, NUM_VIEWS, channels)
            levels.append(rows.transpose(1, 2).flatten(0, 1))
        self.gaussians = PositionGaussians.fit(levels, self._grids()).to(self.device)
        self.freeze()
        on_progress(len(levels[0]), len(levels[0]))

    def extend(self, state: FitState) -> None:
        """Adds nothing: the new images replace the supports, and the training is kept."""

    def facts(self) -> dict[str, Any]:
        """Number of supports, and of their views."""
        if self.gaussians is None:
            return {}
        views = self.gaussians.num_examples
        return {"supports": {"images": views // NUM_VIEWS, "views": views}}

    @property
    def scores_by_map(self) -> bool:
        """Yes."""
        return True

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Smoothed Mahalanobis distances at every position (eq. 6); the image score is the largest."""
        self.require_fitted()
        assert self.gaussians is not None
        size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if size != self.params.image_size:
            height, width = self.params.image_size
            raise SpecError(
                f"regad: expects images of {height} x {width} px, given {size[0]} x {size[1]}. Resize them."
            )
        distance_Bhw = self.gaussians.distance(self._features(images_BCHW / 255.0))
        map_BHW = smooth_upsampled(distance_Bhw, size, self.params.smoothing_sigma)
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)

    def _features(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Registered features of every level, mapped back to where the image has them."""
        if TRUNK not in self.networks:
            raise NotFittedError("regad: has no trunk yet. Fit it or load an artifact first.")
        pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
        return Registered(*self.run(self.networks[TRUNK], pixels_BCHW)).mapped_back()

    def _grids(self) -> list[tuple[int, int]]:
        height, width = self.params.image_size
        return [(height // stride, width // stride) for stride in STRIDES]

    def tensors(self) -> dict[str, Tensor]:
        """The trunk and the Gaussians."""
        found = super().tensors()
        assert self.gaussians is not None
        return {**found, **self.gaussians.tensors(LEVELS)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the trunk and the Gaussians."""
        self.gaussians = PositionGaussians.restored(tensors, LEVELS, self._grids())
        super().load_tensors(tensors)

    def to(self, device: torch.device) -> "RegAD":
        """Moves the trunk and the Gaussians."""
        super().to(device)
        self.gaussians = None if self.gaussians is None else self.gaussians.to(device)
        return self
