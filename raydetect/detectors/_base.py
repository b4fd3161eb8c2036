"""The interface every detector implements.

Shapes: B images, C channels, H W pixels, N patches, D feature dim.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from torch import Tensor

from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.precision import run_network
from raydetect.blocks.search.search import Search
from raydetect.config import Precision
from raydetect.config.validation import STRICT
from raydetect.errors import RaydetectError, SpecError

Phase = Literal["collect", "train"]
Auxiliary = Literal["none", "other categories", "labelled masks"]
ProgressCallback = Callable[[int, int], None]


class NotFittedError(RaydetectError, ValueError, AttributeError):
    """The detector is not fitted yet. Of the same kinds as scikit-learn's, so that what catches those catches it."""


def _square(value: Any) -> Any:
    """256 as (256, 256); anything else as it is."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


ImageSize = Annotated[tuple[int, int], BeforeValidator(_square)]
"""(height, width) in px; a single number is a square."""


@dataclass(frozen=True, slots=True)
class UsedIf:
    """Annotates a parameter that has an effect only with certain values of another.

    Whoever states it where it has none is told so (`_registry.py`), instead of waiting for an effect.

    Attributes:
        other: the other parameter.
        values: its values with which this one is used; empty = all but those of `unless`.
        unless: its values with which this one is not used.
    """

    other: str
    values: tuple[Any, ...] = ()
    unless: tuple[Any, ...] = ()

    def holds(self, params: "Detector.Params") -> bool:
        """Whether the parameter is used."""
        found = getattr(params, self.other)
        return found not in self.unless and (not self.values or found in self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorInfo:
    """What users need to choose a detector; shown by `raydetect detectors`.

    Attributes:
        title: the algorithm's name as spelled in its paper.
        paper: "arXiv:2103.04257".
        venue: "BMVC 2021".
        summary: what it does, in one sentence.
        images: how many normal images it is designed for.
        labels: the labels needed for fitting.
        auxiliary: what the train phase learns from instead of the source (`auxiliary` of a fit job): normal images of
            other categories, or normal and anomalous images of another data set with masks of the defects. The source
            then has only what is collected, and normal images to calibrate on.
        localises: whether the anomaly map locates defects.
        published: published accuracy with its source, as display text.
    """

    title: str
    paper: str
    venue: str
    summary: str
    images: Literal["many normal", "a few normal", "none or a few normal"] = "many normal"
    labels: Literal["none", "some anomalous"] = "none"
    auxiliary: Auxiliary = "none"
    localises: bool = True
    published: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images on the device for one forward pass.

    Attributes:
        images_BCHW: uint8 RGB, all the same size.
        keys: stable image names, one per image; they seed all randomness.
        labels: 0 normal, 1 anomalous; None if fitting needs no labels.
        epoch: 0-based epoch during training, else 0.
        draws: during training, the index of every image among all draws of its epoch, the same for any number of
            workers; it distinguishes repeated draws of one image within an epoch.
        masks_BHW: pixels of defects, bool, during a training on auxiliary images with masks; else None.
        categories: during training, the category of every image; None if the pattern has none.
        prepared: during training, what `Detector.prepare_image` returned for every image, stacked along B.
    """

    images_BCHW: Tensor
    keys: Sequence[str]
    labels: Sequence[int] | None = None
    epoch: int = 0
    draws: Sequence[int] = ()
    masks_BHW: Tensor | None = None
    categories: Sequence[str | None] = ()
    prepared: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of an image to train on.

    Attributes:
        label: 0 normal or unlabelled, 1 anomalous.
        category: None if the pattern has none.
    """

    label: int
    category: str | None


@dataclass(frozen=True, slots=True)
class Scores:
    """Result of `Detector.score`: raw, finite, higher = more anomalous.

    Attributes:
        image_score_B: float32.
        anomaly_map_BHW: float32, same height and width as the input images.
    """

    image_score_B: Tensor
    anomaly_map_BHW: Tensor


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """A grid of patches.

    Attributes:
        height: rows of patches.
        width: columns of patches.
        reach_px: how far a patch's score spreads in the map, in px of the input, beyond the patch.
    """

    height: int
    width: int
    reach_px: int


class Detector(abc.ABC):
    """One anomaly detection algorithm.

    A subclass sets `info`, `phases` and `Params`, and implements `score`, the hooks of its phases, and
    `tensors` / `load_tensors`. It accesses files or the network only in `load_weights`, contains no merging code and
    treats images independently: an image's score must not depend on the rest of its batch.
    """

    info: ClassVar[DetectorInfo]
    phases: tuple[Phase, ...]  # in the order a fit runs them; parameters may override them per instance
    smoke: ClassVar[Mapping[str, Any]] = {}  # preset for tests: seconds on two cores, not accurate

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params:
        """Parameters common to all detectors."""

        __pydantic_config__: ClassVar[ConfigDict] = STRICT
        image_size: Annotated[
            ImageSize, Field(description="(height, width) in px that images are resized to; one number = a square")
        ] = (256, 256)
        precision: Annotated[
            Precision,
            Field(
                description="of the networks, in the fit and in all scoring: float32, or bfloat16, which is faster on "
                "processors and GPUs with such units; distances, likelihoods and losses are float32 at either"
            ),
        ] = "float32"

    def __init__(self, params: "Detector.Params", seed: int = 0) -> None:
        """Stores the parameters. Cheap: no weights are loaded here."""
        self.params = params
        self.seed = seed
        self.device = torch.device("cpu")

    @abc.abstractmethod
    def load_weights(self) -> str:
        """Loads or randomly initialises (from the seed) the weights, and reads any other input needed before fitting.

        Returns:
            What was loaded, for the artifact: "<name or URI> sha256:<digest>", "random seed:<n>" or "from scratch".

        Raises:
            ArtifactError: the weights are unavailable, do not match their digest, or lack a required tensor.
        """

    @abc.abstractmethod
    def score(self, images_BCHW: Tensor) -> Scores:
        """Scores uint8 RGB images (B, 3, H, W).

        Raises:
            NotFittedError: the detector is not fitted.
        """

    def num_collected(self) -> int | None:
        """Maximum number of images to collect, chosen by keyed hash over all workers; None = all normal images."""
        return None

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Rows to store for a batch of normal images, by name: (B, R, D); only when "collect" is in `phases`."""
        raise TypeError(f"{type(self).__name__} has no collect phase")

    @property
    def only_collects(self) -> bool:
        """Whether the images of the source are collected and never trained on, so that another fit is cheap."""
        return "collect" in self.phases and (set(self.phases) == {"collect"} or self.info.auxiliary != "none")

    @property
    def scores_by_map(self) -> bool:
        """Whether the image score is the highest of the map or of its patches, so that pixels can be left out."""
        return False

    def patch_grids(self) -> Mapping[str, "PatchGrid"]:
        """The grids of collected rows that are a set of patches, by name; patches that nothing depends on are left out.

        Only for detectors with `scores_by_map`, as patches that were left out score high.
        """
        return {}

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Fits from the rows collected by all workers, replacing any earlier fit. Called on every worker.

        Args:
            state: this worker's rows; `state.group` is the group of workers.
            tick: called with the progress since the last call and the total.
        """
        raise TypeError(f"{type(self).__name__} has no collect phase")

    def extend(self, state: FitState) -> None:
        """Adds the data stored in this fitted detector to a state, before `finish` refits it.

        A detector that trains on auxiliary images keeps its training and may add nothing: what it compares with are
        then the new images alone.

        Raises:
            SpecError: this algorithm stores nothing that can be extended.
        """
        raise SpecError(f"{type(self).__name__}: has no memory bank to extend. Fit it again on all images.")

    def facts(self) -> Mapping[str, Any]:
        """Statistics of the fit, as plain JSON values for the artifact's record."""
        return {}

    def begin_training(self, num_images: int) -> "TrainingPlan":
        """Creates the trainable modules and the optimizer; only when "train" is in `phases`."""
        raise TypeError(f"{type(self).__name__} has no train phase")

    def prepare_image(self, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        """What a step needs of an image beside its pixels, such as a copy with a simulated defect or noise.

        Called on several threads of the CPU, while the device takes the step before. So it depends on its arguments,
        the seed and what no training changes alone, draws from keyed generators, and runs no network.

        Args:
            image_3HW: uint8, on the CPU.
            key: of the image.
            epoch: 0-based.
            draw: see `Batch.draws`.

        Returns:
            Tensors on the CPU, of the same shapes for every image; `Batch.prepared` has them on the device.
        """
        return ()

    def training_pieces(self, batch: Batch) -> Sequence[Any]:
        """Splits a batch into pieces, one optimizer step each; the number is the same on every worker.

        An algorithm that takes steps over positions rather than images computes its features here, without gradients.
        """
        return [batch]

    def training_loss(self, piece: Any) -> Tensor:
        """Scalar loss of a piece, a mean over images (or items of several), with gradients; a piece is a `Batch` unless
        split further.
        """
        raise TypeError(f"{type(self).__name__} has no train phase")

    def end_training(self) -> None:
        """Freezes the trained modules; `score` works afterwards."""
        raise TypeError(f"{type(self).__name__} has no train phase")

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All tensors a fitted detector needs for scoring, including the backbone, by name."""

    @abc.abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the tensors returned by `tensors`; scores are then bit-identical.

        Raises:
            ArtifactError: a tensor is missing or has the wrong shape.
        """

    def memory_bank(self) -> str | None:
        """Name in `tensors` of a bank (M, D) that can be sharded over remote searches; None = no bank."""
        return None

    def piece_search(self, piece_MD: Tensor) -> Search:
        """A search over a contiguous shard of the bank, as configured by the parameters."""
        raise SpecError(f"{type(self).__name__}: has no memory bank that can be split. Set resources.bank_shards to 1.")

    def load_beside(self, tensors: Mapping[str, Tensor], search: Search) -> None:
        """Like `load_tensors`, but without the tensor named by `memory_bank`; `search` replaces it.

        Raises:
            ArtifactError: a tensor is missing or has the wrong shape.
        """
        raise SpecError(f"{type(self).__name__}: has no memory bank that can be split. Set resources.bank_shards to 1.")

    def run(self, network: Callable[..., Any], *inputs: Any) -> Any:
        """Calls a network, or a method of one, at `params.precision`; its outputs are float32. A `Backbone` needs no
        such call: it has its own precision.
        """
        return run_network(network, *inputs, precision=self.params.precision, device=self.device)

    @abc.abstractmethod
    def to(self, device: torch.device) -> "Detector":
        """Moves the detector to a device and returns it."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How to train a detector by gradient descent.

    Attributes:
        module: all trainable modules.
        optimizer: for the parameters of `module`.
        epochs: passes over the images.
        batch_size: maximum number of images per batch, over all workers; at least `images_per_item`.
        rate: learning rate multiplier as a function of completed epochs, such as 12.25.
        batches: maps (what is known of each key, epoch) to the keys per batch; None = all images in a keyed order,
            split evenly.
        images_per_item: consecutive images of a batch that the loss looks at together, such as 2 for pairs; they are
            never on different workers. If the images of an epoch leave an item incomplete, the first ones of its order
            are used again to complete it.
        max_gradient_norm: norm to which the gradient of all parameters together is clipped; None = it is not clipped.
        all_in_every_step: whether every loss uses every parameter; if not, unused parameters are not updated.
    """

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    epochs: int
    batch_size: int
    rate: Callable[[float], float] = lambda _: 1.0
    batches: Callable[[Mapping[str, Known], int], list[list[str]]] | None = None
    images_per_item: int = 1
    max_gradient_norm: float | None = None
    all_in_every_step: bool = True
