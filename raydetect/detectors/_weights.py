"""Where pretrained weights come from: ImageNet by name, a file or URL, or random ones by seed.

What is pinned: torchvision's file names carry the first digits of their sha256, and every load checks them, from the
cache too. Files of the Hugging Face Hub are checked against the sha256 under which its cache keeps them; which file
that is, timm and the Hub decide. The artifact records the sha256 of the used tensors, wherever they come from.

A file in the cache is used as it is, without the network. With HF_HUB_OFFLINE=1 nothing is fetched, and a host that
does not answer within seconds is not tried again.
"""

import hashlib
import io
import os
import re
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from raydetect.blocks.backbone import Backbone, bare_name, is_timm
from raydetect.blocks.seeding import Undrawn
from raydetect.blocks.vision import models
from raydetect.config import nearest
from raydetect.errors import ArtifactError, SpecError, StorageError
from raydetect.storage import Storage, normalise_uri

IMAGENET = "imagenet"
RANDOM = "random"
OFFLINE = "Give a file: `weights: /path/to/weights.safetensors` (or a URL), or `weights: random`."
CONNECT_SECONDS = 5.0
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
WeightsName = Annotated[str, Field(description='"imagenet", "random", or a path or URL of a weights file')]
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def load_backbone(name: str, layers: tuple[str, ...], weights: str, seed: int) -> tuple[Backbone, str]:
    """A backbone with its weights, and what they are, for the artifact.

    Args:
        name: torchvision or timm name.
        layers: used layers, shallowest first; the trunk is cut after the last.
        weights: "imagenet" (what the library has for this name), "random", or a path or URL of a .safetensors file or
            a state dict with the library's key names.
        seed: keys random weights.

    Raises:
        ArtifactError: the weights cannot be had, are damaged, or miss a used tensor.
        SpecError: an unknown name or layer.
    """
    with nullcontext() if weights == RANDOM else Undrawn():
        backbone = Backbone(name, layers, seed)
    if weights == RANDOM:
        return backbone, f"random seed:{seed} sha256:{backbone.digest()}"
    found, said = _imagenet(name) if weights == IMAGENET else (read_weights(weights), weights)
    backbone.load(found, weights)
    return backbone, f"{said} sha256:{backbone.digest()}"


def _imagenet(name: str) -> tuple[dict[str, Tensor], str]:
    bare = bare_name(name)
    try:
        return _of_timm(bare) if is_timm(name) else (_of_torchvision(bare), IMAGENET)
    except Exception as error:
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise ArtifactError(f"pretrained weights of {name} cannot be had ({reason}). {OFFLINE}") from None


def _of_torchvision(bare: str) -> dict[str, Tensor]:
    enum = models.get_model_weights(bare)
    chosen = getattr(enum, "IMAGENET1K_V1", None) or next(iter(enum))
    return read_weights(str(url_file(chosen.url)))


def _of_timm(bare: str) -> tuple[dict[str, Tensor], str]:
    import timm

    known = timm.get_pretrained_cfg(bare)
    if known is None or not (known.hf_hub_id or known.url):
        raise FileNotFoundError("timm has none")
    source = {}
    if known.hf_hub_id:
        names = [known.hf_hub_filename] if known.hf_hub_filename else HUB_FILES
        source = {"pretrained_cfg_overlay": {"file": str(hub_file(known.hf_hub_id, names))}}
    else:
        require_reachable(known.url)
    model = timm.create_model(bare, pretrained=True, **source)
    return dict(model.state_dict()), f"{IMAGENET}:timm/{known.architecture}.{known.tag}"


def url_file(url: str) -> Path:
    """torch.hub's cached copy of a file whose name ends with the beginning of its sha256; fetched if need be.

    Raises:
        OSError: it cannot be fetched, or the copy has another sha256 than its name says.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    digits = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if not path.exists():
        require_reachable(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digits and digits[1], progress=False)
    if digits is not None:
        _require_sha256(path, digits[1])
    return path


def hub_file(repository: str, names: Sequence[str]) -> Path:
    """The first of some files of a repository of the Hugging Face Hub, from its cache or fetched.

    Raises:
        OSError: none can be had, or the copy has another sha256 than the cache keeps it under.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    bare, _, revision = repository.partition("@")
    for name in names:
        found = try_to_load_from_cache(bare, name, revision=revision or None)
        if isinstance(found, str):
            return _as_kept(Path(found))
    require_reachable(constants.ENDPOINT)
    for name in names:
        try:
            return _as_kept(Path(hf_hub_download(bare, name, revision=revision or None)))
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{repository} has none of {', '.join(names)}")


def _as_kept(path: Path) -> Path:
    """The path, whose content has the sha256 that is the name of the blob it stands for."""
    blob = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        _require_sha256(path, blob)
    return path


def _require_sha256(path: Path, digits: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digits):
        raise OSError(f"{path} is damaged, its sha256 is {found[:16]}... instead of {digits[:16]}; delete it")


def require_reachable(url: str) -> None:
    """Gives up within seconds where a download would try again for minutes; behind a proxy nothing is asked.

    Raises:
        OSError: offline mode is on, or the host does not answer.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise OSError("they are not in the cache, and HF_HUB_OFFLINE is set")
    parts = urlsplit(url)
    if parts.hostname is None or urllib.request.getproxies().get(parts.scheme):
        return
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise OSError(f"they are not in the cache, and {parts.hostname} cannot be reached: {error}") from None


def read_weights(place: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a state dict at a path or URL.

    Raises:
        ArtifactError: it cannot be read, or holds more than tensors.
    """
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


def clip_facts(model: str, weights: str) -> Mapping[str, Any]:
    """What open_clip knows of a tag of weights: `hf_hub`, `url`, `mean`, `std`, `quick_gelu`; nothing of a file.

    Raises:
        SpecError: `weights` is neither a tag of this model, nor looks like a path or URL.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model  # slow

    tags = list_pretrained_tags_by_model(model)
    if weights in tags:
        found: Mapping[str, Any] = get_pretrained_cfg(model, weights)
        return found
    if weights == RANDOM or "/" in weights or "." in weights:
        return {}
    said = nearest(weights, tags) if tags else f" open_clip has no weights of {model}."
    raise SpecError(f"weights {weights!r}: is neither a tag of open_clip for {model}, nor a path or URL.{said}")


def clip_weights(model: str, weights: str) -> dict[str, Tensor]:
    """The tensors of a CLIP by open_clip's names: of a tag, from the Hub, or of a file.

    Raises:
        ArtifactError: they cannot be had or are damaged.
    """
    facts = clip_facts(model, weights)
    if not facts:
        return read_weights(weights)
    try:
        repository, _, name = str(facts["hf_hub"]).rpartition("/")
        path = hub_file(repository, [name] if name else CLIP_FILES) if repository else url_file(facts["url"])
        return read_weights(str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise ArtifactError(f"weights {weights} of {model} cannot be had ({reason}). {OFFLINE}") from None
