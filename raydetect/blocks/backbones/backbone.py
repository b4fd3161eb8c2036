"""Backbones by torchvision or timm name, truncated after the deepest used layer.

Building one loads no pretrained weights; see `detectors/_weights.py`.
"""

import copy
import difflib
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from raydetect.blocks.backbones.timm_trunk import TimmTrunk
from raydetect.blocks.backbones.vision import create_feature_extractor, models
from raydetect.blocks.precision import run_network
from raydetect.blocks.seeding import keyed_seed
from raydetect.config import Precision
from raydetect.config.validation import nearest
from raydetect.errors import ArtifactError, SpecError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ALIASES = {"wide_resnet50": "wide_resnet50_2", "wide_resnet101": "wide_resnet101_2"}
TIMM_PREFIX = "timm/"
PROBE_PX = 64  # accepted by every convolutional trunk
NO_MAPS = ("vit_", "swin_")
PIXEL_MEAN, PIXEL_STD = "pixel_mean", "pixel_std"


def is_timm(name: str) -> bool:
    """Whether a backbone name refers to timm: `timm/NAME`, or a name unknown to torchvision."""
    return name.startswith(TIMM_PREFIX) or ALIASES.get(name, name) not in models.list_models()


def bare_name(name: str) -> str:
    """The name as used by its library.

    Raises:
        SpecError: it is unknown to torchvision and timm, or its model provides no feature maps.
    """
    bare = ALIASES.get(name, name).removeprefix(TIMM_PREFIX)
    if is_timm(name):
        import timm  # slow, and only needed for its own models

        known = timm.list_models()
        if bare.partition(".")[0] not in known:
            close = difflib.get_close_matches(bare, [*models.list_models(), *known], n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise SpecError(
                f"backbone {name!r} is unknown to torchvision and timm.{hint} torchvision.models.list_models() and "
                "timm.list_models() list all names."
            )
    elif bare.startswith(NO_MAPS):
        raise SpecError(
            f"backbone {name!r}: torchvision's transformers provide no feature maps. Use timm's, such as "
            "vit_base_patch16_224."
        )
    return bare


class Backbone(nn.Module):
    """Feature pyramid of uint8 RGB images at the given layers, in the given order.

    The constructor raises SpecError if the name or a layer is unknown.
    """

    def __init__(
        self, name: str, layers: Sequence[str], seed: int, *purpose: str, precision: Precision = "float32"
    ) -> None:
        """Builds the truncated trunk with random weights keyed by `seed` and `purpose`, which runs at `precision`."""
        super().__init__()
        self.name, self.layers, self.precision = name, tuple(layers), precision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(seed, "backbone", name, *purpose))
            self.trunk = TimmTrunk(name, bare_name(name), layers) if is_timm(name) else _torchvision_trunk(name, layers)
        self._folded: nn.Module | None = None
        self.mean_C11: Tensor
        self.std_C11: Tensor
        timm_trunk = self.trunk if isinstance(self.trunk, TimmTrunk) else None
        mean, std = (timm_trunk.mean, timm_trunk.std) if timm_trunk else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean_C11", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Features (B, C_i, h_i, w_i) of every layer, float32 at either precision, from uint8 RGB images.

        Raises:
            SpecError: a transformer does not accept images of this size.
        """
        return self.features(self.normalised(images_BCHW))

    def features(self, normal_BCHW: Tensor) -> list[Tensor]:
        """Features of normalised images; gradients flow to inputs that require them."""
        trunk = self.trunk if self._folded is None else self._folded

        def levels(images_BCHW: Tensor) -> list[Tensor]:
            found = trunk(images_BCHW)
            # torchvision's extractor returns the layers in the network's order
            return [found[layer] for layer in self.layers] if isinstance(found, dict) else list(found)

        features: list[Tensor] = run_network(levels, normal_BCHW, precision=self.precision, device=normal_BCHW.device)
        return features

    def shapes(self, image_size: tuple[int, int]) -> list[tuple[int, ...]]:
        """(C_i, h_i, w_i) of every layer for images of (height, width) px; costs one forward pass."""
        modes = {part: part.training for part in self.modules()}
        with torch.inference_mode():
            found = self.eval()(self.mean_C11.new_zeros(1, 3, *image_size))
        for part, training in modes.items():
            part.training = training
        return [tuple(level.shape[1:]) for level in found]

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """(x / 255 - mean) / std, float32, channels last.

        Vectorised over rows of width * channels, which is ten times faster than over the three channels alone.
        """
        images_BHWC = images_BCHW.permute(0, 2, 3, 1).to(torch.float32).contiguous()
        width = images_BHWC.shape[2]
        scale_R = (1.0 / (255.0 * self.std_C11)).flatten().repeat(width)
        shift_R = (-self.mean_C11 / self.std_C11).flatten().repeat(width)
        normal_BHR = torch.addcmul(shift_R, images_BHWC.flatten(2), scale_R)
        return normal_BHR.view(images_BHWC.shape).permute(0, 3, 1, 2)

    def weights(self) -> dict[str, Tensor]:
        """The used tensors under the library's key names.

        Includes timm's pixel mean and std, which differ between its weights and may differ between its versions.
        """
        state = self.trunk.state_dict()
        found = {self._name(key): value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        if isinstance(self.trunk, TimmTrunk):
            found |= {PIXEL_MEAN: self.mean_C11.flatten(), PIXEL_STD: self.std_C11.flatten()}
        return found

    def _name(self, key: str) -> str:
        return self.trunk.names[key] if isinstance(self.trunk, TimmTrunk) else key

    def load(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Loads the used tensors from `weights`; others are ignored.

        Pixel mean and std are loaded if present, as in an artifact; weights files have none.

        Raises:
            ArtifactError: a used tensor is missing or has the wrong shape; the message names it.
        """
        for name, value in self.weights().items():
            if name not in weights:
                if name in (PIXEL_MEAN, PIXEL_STD):
                    continue
                raise ArtifactError(
                    f"{source}: has no tensor {name!r}, which {self.name} needs up to {self.layers[-1]}."
                )
            if weights[name].shape != value.shape:
                raise ArtifactError(
                    f"{source}: tensor {name!r} has shape {tuple(weights[name].shape)}, {self.name} needs "
                    f"{tuple(value.shape)}."
                )
        keys = {key: self._name(key) for key in self.trunk.state_dict()}
        self.trunk.load_state_dict({key: weights[n] for key, n in keys.items() if n in weights}, strict=False)
        if isinstance(self.trunk, TimmTrunk):
            self.mean_C11.copy_(weights.get(PIXEL_MEAN, self.mean_C11.flatten()).view(3, 1, 1))
            self.std_C11.copy_(weights.get(PIXEL_STD, self.std_C11.flatten()).view(3, 1, 1))

    def widths(self) -> list[int]:
        """Channels of every layer."""
        if isinstance(self.trunk, TimmTrunk):
            return self.trunk.channels()
        return [shape[0] for shape in self.shapes((PROBE_PX, PROBE_PX))]

    def digest(self) -> str:
        """sha256 of the used tensors, in order of their names."""
        return tensors_digest(self.weights())

    def freeze(self) -> "Backbone":
        """Prepares for scoring: eval mode, no gradients, folded batch norms (torchvision only), channels last.

        `weights` and `digest` still return the tensors before folding.
        """
        self.eval().requires_grad_(False)
        if isinstance(self.trunk, fx.GraphModule):
            # the extractor holds one graph per mode; fuse expects a single graph
            folded = copy.deepcopy(self.trunk)
            self._folded = fuse(fx.GraphModule(folded, folded.graph).eval(), inplace=True, no_trace=True)
        return self.to(memory_format=torch.channels_last)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors, in order of their names."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def stage_of(name: str, layer: str) -> nn.Module:
    """One stage of a model, such as "layer4" of a ResNet, with random weights.

    Raises:
        SpecError: the model is unknown to both libraries, or has no such stage.
    """
    bare = bare_name(name)
    if is_timm(name):
        import timm

        model: nn.Module = timm.create_model(bare, pretrained=False)
    else:
        model = models.get_model(bare, weights=None)
    try:
        return model.get_submodule(layer)
    except AttributeError:
        known = [child for child, _ in model.named_children()]
        raise SpecError(f"backbone {name!r} has no layer {layer!r}.{nearest(layer, known)}") from None


def _torchvision_trunk(name: str, layers: Sequence[str]) -> nn.Module:
    model = models.get_model(bare_name(name), weights=None)
    try:
        return create_feature_extractor(model, return_nodes={layer: layer for layer in layers})
    except ValueError:
        known = [child for child, _ in model.named_children()]
        raise SpecError(f"backbone {name!r} has no layer among {list(layers)}.{nearest(layers[0], known)}") from None
