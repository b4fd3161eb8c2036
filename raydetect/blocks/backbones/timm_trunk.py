"""timm models as feature pyramids: convolutional networks, and transformers whose blocks give grids of patch tokens.

Shapes: B images, C channels, h w feature grid, H W pixels.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raydetect.config.validation import nearest
from raydetect.errors import SpecError

ADVICE = "Choose some, shallowest first, such as [{}, {}]."


class TimmTrunk(nn.Module):
    """A timm model, truncated after the deepest used layer.

    The layer `blocks.5` of a vision transformer is the output of its sixth block, before the final norm, without class
    and register tokens. Position embeddings are interpolated to the image's grid (timm's `dynamic_img_size`), so any
    multiple of the patch size is accepted.

    Attributes:
        names: timm's name of every tensor in `state_dict`.
        mean: pixel mean used to train the weights, three channels, for pixels in [0, 1].
        std: pixel std, likewise.
    """

    def __init__(self, name: str, bare: str, layers: Sequence[str]) -> None:
        """Builds the trunk with random weights.

        Args:
            name: the name as given by the user, for messages.
            bare: timm's name, with or without a weights tag.
            layers: used layers, in any order.

        Raises:
            SpecError: the tag or a layer is unknown.
        """
        super().__init__()
        import timm  # slow, and only needed for timm models

        self.name = name
        try:
            with torch.device("meta"):  # only its metadata is needed
                whole = timm.create_model(bare, pretrained=False)
        except RuntimeError as error:
            raise SpecError(f"backbone {name!r}: {' '.join(str(error).split())}.") from None
        indices = [_known_layers(whole).index(_require_layer(name, layer, _known_layers(whole))) for layer in layers]
        self.kept = sorted(set(indices))
        self.order = [self.kept.index(index) for index in indices]
        sizes = {"dynamic_img_size": True} if _takes_any_size(whole) else {}
        self.features = timm.create_model(
            bare, pretrained=False, features_only=True, out_indices=tuple(self.kept), **sizes
        )
        self.names = _own_names(self.features, whole)
        self.mean, self.std = tuple(whole.pretrained_cfg["mean"]), tuple(whole.pretrained_cfg["std"])

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) of every layer, in the order of `layers`.

        Raises:
            SpecError: the network does not accept images of this size.
        """
        self._check_size(images_BCHW.shape[-2], images_BCHW.shape[-1])
        try:
            levels = self.features(images_BCHW)
        except AssertionError as error:  # timm's check of networks with a fixed size
            size = f"{images_BCHW.shape[-2]} x {images_BCHW.shape[-1]}"
            raise SpecError(
                f"backbone {self.name!r} does not take images of {size} px ({error}). Set image_size to its own size."
            ) from None
        if str(getattr(self.features, "output_fmt", "")).endswith("NHWC"):
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return [levels[index] for index in self.order]

    def channels(self) -> list[int]:
        """Channels of every layer, in the order of `layers`."""
        info: Any = self.features.feature_info
        kept = info.channels()
        return [kept[index] for index in self.order]

    def _check_size(self, height: int, width: int) -> None:
        patches = getattr(getattr(self.features, "model", None), "patch_embed", None)
        patch = getattr(patches, "patch_size", (1, 1))
        if height % patch[0] or width % patch[1]:
            near = [max(1, round(size / step)) * step for size, step in zip((height, width), patch, strict=True)]
            raise SpecError(
                f"backbone {self.name!r} cuts images into patches of {patch[0]} x {patch[1]} px, and {height} x "
                f"{width} px is not a multiple. Set image_size to [{near[0]}, {near[1]}]."
            )


def _known_layers(whole: nn.Module) -> list[str]:
    info: Any = whole.feature_info
    return [entry["module"] for entry in getattr(info, "info", info)]


def _require_layer(name: str, layer: str, known: Sequence[str]) -> str:
    if layer in known:
        return layer
    advice = nearest(layer, known)
    if known[0] == "blocks.0" and len(known) > 5:  # a transformer: all levels have the same size
        advice = f" It has {known[0]} to {known[-1]}. " + ADVICE.format(
            known[len(known) // 2 - 1], known[len(known) * 3 // 4 - 1]
        )
    raise SpecError(f"backbone {name!r} has no layer {layer!r}.{advice}")


def _takes_any_size(whole: nn.Module) -> bool:
    constructors = [vars(base)["__init__"] for base in type(whole).__mro__ if "__init__" in vars(base)]
    return any("dynamic_img_size" in inspect.signature(one).parameters for one in constructors)


def _own_names(features: nn.Module, whole: nn.Module) -> dict[str, str]:
    """Maps tensor names of the truncated network, which timm flattens or wraps, to names of the whole network."""
    own = {name.replace(".", "_"): name for name in whole.state_dict()}
    found = {}
    for name in features.state_dict():
        flat, unwrapped = name.replace(".", "_"), name.partition(".")[2].replace(".", "_")
        found[f"features.{name}"] = own[flat] if flat in own else own[unwrapped]
    return found
