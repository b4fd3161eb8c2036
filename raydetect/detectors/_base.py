"""The contract of a detector: one file, one class, spelled as its paper spells it.

Shapes: B images, C channels, H W pixels, N patches, D feature dim.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from raydetect.blocks.rows import FitState
from raydetect.blocks.search import Search
from raydetect.config import STRICT
from raydetect.errors import RaydetectError, SpecError

Phase = Literal["collect", "train"]
Tick = Callable[[int, int], None]


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
        images: which normal images it is made for.
        labels: which labels fitting needs.
        localises: whether the anomaly map shows where.
        published: published accuracy with its source, for humans.
    """

    title: str
    paper: str
    venue: str
    summary: str
    images: Literal["many normal", "none or a few normal"] = "many normal"
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
        draws: while training, the place of every image among all that its epoch draws, the same on any number of
            workers; it tells the draws of an image apart where an epoch has it several times.
    """

    images_BCHW: Tensor
    keys: Sequence[str]
    labels: Sequence[int] | None = None
    epoch: int = 0
    draws: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """Result of `Detector.score`: raw, finite, higher = more anomalous.

    Attributes:
        image_score_B: float32.
        anomaly_map_BHW: float32, at the size of the images that went in.
    """

    image_score_B: Tensor
    anomaly_map_BHW: Tensor


class Detector(abc.ABC):
    """One anomaly detection algorithm.

    A subclass sets `info`, `phases` and `Params`, and implements `score`, the hooks of its phases, and
    `tensors` / `load_tensors`. It does no file or network access except in `load_weights`, writes no merging code and
    never looks at the batch as a whole: an image's score must not depend on its neighbours.
    """

    info: ClassVar[DetectorInfo]
    phases: tuple[Phase, ...]  # in the order in which a fit runs them; parameters may change an instance's
    smoke: ClassVar[Mapping[str, Any]] = {}  # parameters of the preset for tests: seconds on two cores, no accuracy

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
        """Loads pretrained weights, or makes random ones from the seed, and whatever else is read before fitting.

        Returns:
            What was loaded, for the artifact: "<name or URI> sha256:<digest>", "random seed:<n>" or "from scratch".

        Raises:
            ArtifactError: the weights cannot be had, do not match their digest, or miss a used tensor.
        """

    @abc.abstractmethod
    def score(self, images_BCHW: Tensor) -> Scores:
        """Scores uint8 RGB images (B, 3, H, W).

        Raises:
            NotFittedError: the detector is not fitted.
        """

    def num_collected(self) -> int | None:
        """How many images `collect` is to see, chosen by keyed hash over all workers; None = all normal ones."""
        return None

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Rows that a batch of normal images leaves, by name: (B, R, D); only when "collect" is in `phases`."""
        raise TypeError(f"{type(self).__name__} has no collect phase")

    def finish(self, state: FitState, tick: Tick) -> None:
        """Fits from everything that all workers collected; forgets any earlier fit. Every worker calls it.

        Args:
            state: this worker's rows; its `group` are the workers.
            tick: told how much more is done, and of how much.
        """
        raise TypeError(f"{type(self).__name__} has no collect phase")

    def extend(self, state: FitState) -> None:
        """Adds what this fitted detector has stored to a state, before `finish` fits it again.

        Raises:
            SpecError: this algorithm keeps nothing that could be added to.
        """
        raise SpecError(f"{type(self).__name__}: has no memory bank that could be extended. Fit it anew on all images.")

    def facts(self) -> Mapping[str, Any]:
        """What the fit measured about itself, as plain JSON values for the artifact's record."""
        return {}

    def begin_training(self, num_images: int) -> "TrainingPlan":
        """Makes fresh trainable parts and the optimizer; only when "train" is in `phases`."""
        raise TypeError(f"{type(self).__name__} has no train phase")

    def training_pieces(self, batch: Batch) -> Sequence[Any]:
        """What a batch is cut into, one optimizer step each; as many on every worker, whatever its share of images.

        An algorithm that steps over positions rather than images computes its features here, without gradients.
        """
        return [batch]

    def training_loss(self, piece: Any) -> Tensor:
        """The scalar loss of a piece, a mean over images, with gradients; a piece is a `Batch` unless cut further."""
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

    def memory_bank(self) -> str | None:
        """Name in `tensors` of a bank (M, D) whose rows searches elsewhere may hold in pieces; None = there is none."""
        return None

    def piece_search(self, piece_MD: Tensor) -> Search:
        """The search of this detector's parameters over a run of rows of its bank."""
        raise SpecError(f"{type(self).__name__}: has no memory bank that can be cut. Set resources.bank_shards to 1.")

    def load_beside(self, tensors: Mapping[str, Tensor], search: Search) -> None:
        """As `load_tensors`, but the tensor `memory_bank` is left out and `search` answers for it.

        Raises:
            ArtifactError: a tensor is missing or has the wrong shape.
        """
        raise SpecError(f"{type(self).__name__}: has no memory bank that can be cut. Set resources.bank_shards to 1.")

    @abc.abstractmethod
    def to(self, device: torch.device) -> "Detector":
        """Moves everything to a device and returns itself."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How the trainer runs a gradient detector.

    Attributes:
        module: all trainable parts.
        optimizer: over its parameters.
        epochs: passes over the images.
        batch_size: images per batch of all workers, at most.
        rate: factor of the optimizer's learning rates as a function of the epochs done, such as 12.25.
        batches: keys of every batch from (label by key, epoch); None = all images in a keyed order, cut evenly.
        all_in_every_step: whether every loss uses every parameter; those it leaves out then keep still.
    """

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    epochs: int
    batch_size: int
    rate: Callable[[float], float] = lambda _: 1.0
    batches: Callable[[Mapping[str, int], int], list[list[str]]] | None = None
    all_in_every_step: bool = True
