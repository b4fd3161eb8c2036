"""Base classes of detectors whose fitted state is a set of networks: save, load, move and freeze them."""

import abc
import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.seeding import SkipInitialisation
from raydetect.detectors._base import Detector, NotFittedError
from raydetect.detectors._weights import load_backbone
from raydetect.errors import ArtifactError, SpecError

COUNTERS = "num_batches_tracked"


class NetworkDetector(Detector):
    """A detector whose state is a set of named networks. A `Backbone` saves only the tensors it uses.

    Attributes:
        networks: the networks created so far by `load_weights` and `begin_training`.
        is_fitted: whether `score` may be called; set by `freeze`.
    """

    def __init__(self, params: Detector.Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self.networks: dict[str, nn.Module] = {}
        self.is_fitted = False

    @abc.abstractmethod
    def make_networks(self) -> dict[str, nn.Module]:
        """All networks of a fitted detector, with placeholder values; reads no files."""

    def require_fitted(self) -> None:
        """Checks that the detector is fitted; call first in `score`.

        Raises:
            NotFittedError: the detector is not fitted.
        """
        if not self.is_fitted:
            raise NotFittedError(f"{self._name()}: is not fitted. Fit it or load an artifact first.")

    def require_size(self, images_BCHW: Tensor) -> None:
        """Checks that images have the size of the fit; for detectors with parameters of every position.

        Raises:
            SpecError: they have another.
        """
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if size_px != self.params.image_size:
            raise SpecError(
                f"{self._name()}: was fitted on images of {self.params.image_size} px, given {size_px}. Resize them."
            )

    def _name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def freeze(self) -> None:
        """Prepares all networks for scoring (eval mode, no gradients); call last in a fit.

        Their memory format becomes that of a loaded artifact: another one, as trainings use, gives other last digits.
        """
        for network in self.networks.values():
            if isinstance(network, Backbone):
                network.freeze()
            else:
                network.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
        self.is_fitted = True

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of all networks as `network.tensor`."""
        self.require_fitted()
        return {f"{name}.{key}": value for name, net in self.networks.items() for key, value in _state(net).items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores all networks."""
        with SkipInitialisation():
            self.networks = self.make_networks()
        for name, network in self.networks.items():
            prefix = f"{name}."
            mine = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if isinstance(network, Backbone):
                network.load(mine, "the artifact")
            else:
                _load(network, mine, name)
        self.to(self.device)
        self.freeze()

    def to(self, device: torch.device) -> "NetworkDetector":
        """Moves all networks."""
        self.device = device
        for network in self.networks.values():
            network.to(device)
        return self


class FineTuned(NetworkDetector):
    """A detector that fine-tunes a backbone with one output layer; every training starts from the loaded weights."""

    _start: Backbone | None = None

    def load_start(self, backbone: str, last_layer: str, weights: str) -> str:
        """Loads the initial weights for training; see `Detector.load_weights`."""
        self._start, source = load_backbone(backbone, (last_layer,), weights, self.seed, self.params.precision)
        return source

    def fresh_backbone(self) -> Backbone:
        """A copy of the loaded backbone.

        Raises:
            NotFittedError: no weights are loaded yet.
        """
        if self._start is None:
            raise NotFittedError(f"{self._name()}: has no backbone yet. Call load_weights first.")
        return copy.deepcopy(self._start)


def _state(network: nn.Module) -> dict[str, Tensor]:
    if isinstance(network, Backbone):
        return network.weights()
    return {key: value for key, value in network.state_dict().items() if not key.endswith(COUNTERS)}


def _load(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    for key, value in _state(network).items():
        if key not in tensors:
            raise ArtifactError(f"the artifact has no tensor '{name}.{key}'. Fit again.")
        if tensors[key].shape != value.shape:
            raise ArtifactError(
                f"the artifact's tensor '{name}.{key}' has shape {tuple(tensors[key].shape)}, expected "
                f"{tuple(value.shape)}. Fit again."
            )
    network.load_state_dict(dict(tensors), strict=False)
