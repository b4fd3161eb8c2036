"""Where pretrained weights come from: ImageNet by name, a file or URL, or random ones by seed."""

import io

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torchvision import models

from raydetect.blocks.backbone import Backbone, bare_name, is_timm
from raydetect.errors import ArtifactError, StorageError
from raydetect.storage import Storage, normalise_uri

IMAGENET = "imagenet"
RANDOM = "random"
OFFLINE = "Give a file: `weights: /path/to/weights.safetensors` (or a URL), or `weights: random`."


def load_backbone(name: str, layers: tuple[str, ...], weights: str, seed: int) -> tuple[Backbone, str]:
    """A backbone with its weights, and what they are, for the artifact.

    Args:
        name: torchvision or timm name.
        layers: used layers, shallowest first; the trunk is cut after the last.
        weights: "imagenet", "random", or a path or URL of a .safetensors file or a torchvision state dict.
        seed: keys random weights.

    Raises:
        ArtifactError: the weights cannot be had, are damaged, or miss a used tensor.
        SpecError: an unknown name or layer.
    """
    backbone = Backbone(name, layers, seed)
    if weights == RANDOM:
        return backbone, f"random seed:{seed} sha256:{backbone.digest()}"
    found = _imagenet(name) if weights == IMAGENET else _from_file(weights)
    backbone.load(found, weights)
    return backbone, f"{weights} sha256:{backbone.digest()}"


def _imagenet(name: str) -> dict[str, Tensor]:
    bare = bare_name(name)
    try:
        if is_timm(name):
            import timm

            return dict(timm.create_model(bare, pretrained=True).state_dict())
        enum = models.get_model_weights(bare)
        chosen = getattr(enum, "IMAGENET1K_V1", None) or next(iter(enum))
        return dict(chosen.get_state_dict(check_hash=True, progress=False))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(f"ImageNet weights of {name} cannot be had ({reason}). {OFFLINE}") from None


def _from_file(place: str) -> dict[str, Tensor]:
    uri = normalise_uri(place)
    try:
        data = Storage().read(uri)
    except StorageError as error:
        raise ArtifactError(f"weights: {error} {OFFLINE}") from None
    try:
        if uri.endswith(".safetensors"):
            return dict(load(data))
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{uri}: not readable as tensors ({reason}). {OFFLINE}") from None
    except Exception as error:  # the restricted unpickler refuses anything but tensors
        raise ArtifactError(
            f"{uri}: holds more than tensors ({type(error).__name__}). Save a plain state dict."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ArtifactError(f"{uri}: is no plain state dict of tensors. Save model.state_dict().")
    return found
