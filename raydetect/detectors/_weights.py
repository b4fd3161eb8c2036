"""Loads pretrained weights: ImageNet weights by name, a file or URL, or random weights from a seed.

Integrity: torchvision's file names contain the first digits of their sha256, which every load verifies, including
loads from the cache. Files from the Hugging Face Hub are verified against the sha256 under which the cache stores them;
timm and the Hub decide which file that is. The artifact records the sha256 of the used tensors, whatever their source.

Cached files are used without network access. With HF_HUB_OFFLINE=1 nothing is downloaded, and a host that does not
respond within seconds is not retried.
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

from raydetect.blocks.backbones.backbone import Backbone, bare_name, is_timm
from raydetect.blocks.backbones.vision import models
from raydetect.blocks.seeding import SkipInitialisation
from raydetect.config import Precision
from raydetect.config.validation import nearest
from raydetect.errors import ArtifactError, SpecError, StorageError
from raydetect.storage import Storage, normalise_uri

IMAGENET = "imagenet"
RANDOM = "random"
OFFLINE = "Give a file: `weights: /path/to/weights.safetensors` (or a URL), or `weights: random`."
CONNECT_SECONDS = 5.0
PARALLEL = "module."  # what torch's DataParallel puts before the names of tensors
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
WeightsName = Annotated[str, Field(description='"imagenet", "random", or a path or URL of a weights file')]
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def load_backbone(
    name: str, layers: tuple[str, ...], weights: str, seed: int, precision: Precision = "float32"
) -> tuple[Backbone, str]:
    """A backbone with its weights, and a description of the weights for the artifact.

    Args:
        name: torchvision or timm name.
        layers: used layers, shallowest first; the trunk is truncated after the last.
        weights: "imagenet" (the library's weights for this name), "random", or a path or URL of a .safetensors file or
            a state dict with the library's key names.
        seed: seed of random weights.
        precision: what the backbone runs at.

    Raises:
        ArtifactError: the weights are unavailable, damaged, or lack a used tensor.
        SpecError: an unknown name or layer.
    """
    with nullcontext() if weights == RANDOM else SkipInitialisation():
        backbone = Backbone(name, layers, seed, precision=precision)
    if weights == RANDOM:
        return backbone, f"random seed:{seed} sha256:{backbone.digest()}"
    found, source = _imagenet(name) if weights == IMAGENET else (read_weights(weights), weights)
    backbone.load(found, weights)
    return backbone, f"{source} sha256:{backbone.digest()}"


def _imagenet(name: str) -> tuple[dict[str, Tensor], str]:
    bare = bare_name(name)
    try:
        return _of_timm(bare) if is_timm(name) else (_of_torchvision(bare), IMAGENET)
    except Exception as error:
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise ArtifactError(f"pretrained weights of {name} are unavailable ({reason}). {OFFLINE}") from None


def _of_torchvision(bare: str) -> dict[str, Tensor]:
    return read_weights(str(url_file(_torchvision_url(bare))))


def _torchvision_url(bare: str) -> str:
    enum = models.get_model_weights(bare)
    return str((getattr(enum, "IMAGENET1K_V1", None) or next(iter(enum))).url)


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
    """torch.hub's cached copy of a file whose name ends with a prefix of its sha256; downloaded if missing.

    Raises:
        OSError: the download fails, or the sha256 of the copy does not match its name.
    """
    path = _place_of(url)
    digits = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if not path.exists():
        require_reachable(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digits and digits[1], progress=False)
    if digits is not None:
        _require_sha256(path, digits[1])
    return path


def _place_of(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def cached_imagenet(name: str) -> Path | None:
    """The cached file of a backbone's ImageNet weights; None if it is not there. Reads and downloads nothing.

    Args:
        name: torchvision or timm name.

    Raises:
        ValueError: torchvision or timm does not know it.
    """
    bare = bare_name(name)
    if not is_timm(name):
        path = _place_of(_torchvision_url(bare))
        return path if path.exists() else None
    import timm

    known = timm.get_pretrained_cfg(bare)
    if known is None or not known.hf_hub_id:
        return None
    return _in_hub_cache(known.hf_hub_id, (known.hf_hub_filename,) if known.hf_hub_filename else HUB_FILES)


def _in_hub_cache(repository: str, names: Sequence[str]) -> Path | None:
    """The first of some files of a repository that is in the cache of the Hugging Face Hub."""
    from huggingface_hub import try_to_load_from_cache

    bare, _, revision = repository.partition("@")
    found = (try_to_load_from_cache(bare, name, revision=revision or None) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def hub_file(repository: str, names: Sequence[str]) -> Path:
    """The first available of some files in a Hugging Face Hub repository, cached or downloaded.

    Raises:
        OSError: none is available, or the sha256 of the copy does not match its name in the cache.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    cached = _in_hub_cache(repository, names)
    if cached is not None:
        return _verified(cached)
    bare, _, revision = repository.partition("@")
    require_reachable(constants.ENDPOINT)
    for name in names:
        try:
            return _verified(Path(hf_hub_download(bare, name, revision=revision or None)))
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{repository} has none of {', '.join(names)}")


def _verified(path: Path) -> Path:
    """The path, after checking its content against the sha256 in the blob's name."""
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
    """Fails within seconds where a download would retry for minutes; behind a proxy nothing is checked.

    Raises:
        OSError: offline mode is on, or the host does not respond.
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
    """The tensors of a .safetensors file, or of a state dict at a path or URL.

    The state dict may be the entry `state_dict` of a checkpoint, and that of a `DataParallel` module.

    Raises:
        ArtifactError: it cannot be read, or contains anything but tensors.
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
        raise ArtifactError(f"{uri}: cannot be read as tensors ({reason}). {OFFLINE}") from None
    except Exception as error:  # the restricted unpickler rejects anything but tensors
        raise ArtifactError(
            f"{uri}: contains more than tensors ({type(error).__name__}). Save a plain state dict."
        ) from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found  # a training checkpoint
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ArtifactError(f"{uri}: is not a plain state dict of tensors. Save model.state_dict().")
    return {name.removeprefix(PARALLEL): value for name, value in found.items()}


def clip_facts(model: str, weights: str) -> Mapping[str, Any]:
    """open_clip's config of a weights tag: `hf_hub`, `url`, `mean`, `std`, `quick_gelu`; empty for a file.

    Raises:
        SpecError: `weights` is neither a tag of this model nor looks like a path or URL.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model  # slow

    tags = list_pretrained_tags_by_model(model)
    if weights in tags:
        found: Mapping[str, Any] = get_pretrained_cfg(model, weights)
        return found
    if weights == RANDOM or "/" in weights or "." in weights:
        return {}
    hint = nearest(weights, tags) if tags else f" open_clip has no weights of {model}."
    raise SpecError(f"weights {weights!r}: is neither a tag of open_clip for {model}, nor a path or URL.{hint}")


def clip_weights(model: str, weights: str) -> dict[str, Tensor]:
    """The tensors of a CLIP model under open_clip's names: of a tag, from the Hub, or of a file.

    Raises:
        ArtifactError: they are unavailable or damaged.
    """
    facts = clip_facts(model, weights)
    if not facts:
        return read_weights(weights)
    try:
        repository, names = _clip_repository(facts, weights)
        return read_weights(str(hub_file(repository, names) if repository else url_file(facts["url"])))
    except Exception as error:
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise ArtifactError(f"weights {weights} of {model} are unavailable ({reason}). {OFFLINE}") from None


def cached_clip(model: str, weights: str) -> Path | None:
    """The cached file of a weights tag of open_clip; None if it is not there. Reads and downloads nothing."""
    facts = clip_facts(model, weights)
    repository, names = _clip_repository(facts, weights)
    if repository:
        return _in_hub_cache(repository, names)
    path = _place_of(facts["url"])
    return path if path.exists() else None


def _clip_repository(facts: Mapping[str, Any], tag: str) -> tuple[str, Sequence[str]]:
    """The repository of a tag's weights on the Hub, and the files to look for; "" if they are to come from a URL.

    open_clip names for some tags a repository of another one (of laion400m_e32 that of laion400m_e31) beside the URL
    of the right file.
    """
    hub = str(facts["hf_hub"])
    if facts["url"] and tag not in hub:
        return "", ()
    repository, _, name = hub.rpartition("/")
    return repository, [name] if name else CLIP_FILES
