"""The contract of a detector: one file, one class, spelled as its paper spells it.

Shapes: B images, C channels, H W pixels, N patches, D feature dim.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from raydetect.config import STRICT
from raydetect.errors import RaydetectError

Phase = Literal["collect", "train"]


class NotFittedError(RaydetectError):
    """`score` was called before the detector was fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorInfo:
    """What a person needs to choose: shown by `raydetect detectors`.

    Attributes:
        title: the algorithm's name as its paper writes it.
        paper: "arXiv:2103.04257".
        venue: "BMVC 2021".
        summary: one sentence: what it does.
        labels: which labels fitting needs.
        localises: whether the anomaly map shows where.
        published: published accuracy with its source, for humans.
    """

    title: str
    paper: str
    venue: str
    summary: str
    labels: Literal["none", "some anomalous"] = "none"
    localises: bool = True
    published: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images on the device in one forward pass.

    Attributes:
        images_BCHW: uint8 RGB, all of one size.
        keys: stable image names, one per image; randomness is keyed by them.
        labels: 0 normal, 1 anomalous; None when fitting needs none.
        epoch: 0-based epoch while training, else 0.
    """

    images_BCHW: Tensor
    keys: Sequence[str]
    labels: Sequence[int] | None = None
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Scores:
    """Result of `Detector.score`: raw, finite, higher = more anomalous.

    Attributes:
        image_score_B: float32.
        anomaly_map_BHW: float32, at the size of the images that went in.
    """

    image_score_B: Tensor
    anomaly_map_BHW: Tensor


@dataclass(slots=True)
class FitState:
    """What collecting leaves: named tensors per image key. Merging is written here once, for all detectors.

    Keyed by image, a shard that is read twice changes nothing, and `ordered()` makes the fit independent of the
    number and order of shards.
    """

    items: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def merge(self, other: "FitState") -> "FitState":
        """The union of two states; the same key on both sides is one image, kept once."""
        return FitState({**self.items, **other.items})

    def ordered(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor called `name`) of every image, in order of keys."""
        for key in sorted(self.items):
            yield key, self.items[key][name]

    def stacked(self, name: str) -> Tensor:
        """The tensors called `name` concatenated along dim 0, in order of keys."""
        return torch.cat([tensor for _, tensor in self.ordered(name)])


class Detector(abc.ABC):
    """One anomaly detection algorithm.

    A subclass sets `info`, `phases` and `Params`, and implements `score`, the hooks of its phases, and
    `tensors` / `load_tensors`. It does no file or network access except in `load_weights`, writes no merging code and
    never looks at the batch as a whole: an image's score must not depend on its neighbours.
    """

    info: ClassVar[DetectorInfo]
    phases: ClassVar[tuple[Phase, ...]]

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params:
        """Parameters that every detector has."""

        __pydantic_config__: ClassVar[ConfigDict] = STRICT
        image_size: Annotated[
            tuple[int, int], Field(description="(height, width) in px that images are resized to")
        ] = (256, 256)

    def __init__(self, params: "Detector.Params", seed: int = 0) -> None:
        """Keeps the parameters. Cheap: no weights are loaded here."""
        self.params = params
        self.seed = seed
        self.device = torch.device("cpu")

    @abc.abstractmethod
    def load_weights(self) -> str:
        """Loads pretrained weights, or makes random ones from the seed, before fitting.

        Returns:
            What was loaded, for the artifact: "<name or URI> sha256:<digest>" or "random seed:<n>".

        Raises:
            ArtifactError: the weights cannot be had, do not match their digest, or miss a used tensor.
        """

    @abc.abstractmethod
    def score(self, images_BCHW: Tensor) -> Scores:
        """Scores uint8 RGB images (B, 3, H, W).

        Raises:
            NotFittedError: the detector is not fitted.
        """

    def collect(self, batch: Batch) -> FitState:
        """The state of a batch of normal images; only when "collect" is in `phases`."""
        raise TypeError(f"{type(self).__name__} has no collect phase")

    def finish(self, state: FitState) -> None:
        """Fits from everything collected; forgets any earlier fit."""
        raise TypeError(f"{type(self).__name__} has no collect phase")

    def begin_training(self, num_images: int) -> "TrainingPlan":
        """Makes fresh trainable parts and the optimizer; only when "train" is in `phases`."""
        raise TypeError(f"{type(self).__name__} has no train phase")

    def training_loss(self, batch: Batch) -> Tensor:
        """The scalar loss of a batch, with gradients."""
        raise TypeError(f"{type(self).__name__} has no train phase")

    def end_training(self) -> None:
        """Freezes what was trained; `score` works from here on."""
        raise TypeError(f"{type(self).__name__} has no train phase")

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything a fitted detector needs to score, backbone included, by name."""

    @abc.abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned; scores are bit-identical afterwards.

        Raises:
            ArtifactError: a tensor is missing or has the wrong shape.
        """

    @abc.abstractmethod
    def to(self, device: torch.device) -> "Detector":
        """Moves everything to a device and returns itself."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How the trainer runs a gradient detector.

    Attributes:
        optimizer: over the trainable parts.
        epochs: passes over the images.
        batch_size: images per step; the last, smaller batch of an epoch is dropped when `drop_last`.
        scheduler: stepped once per epoch, or None.
    """

    optimizer: torch.optim.Optimizer
    epochs: int
    batch_size: int
    drop_last: bool = False
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
