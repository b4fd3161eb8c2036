"""Which detectors find the weights of their default backbone, or CLIP model, in a cache."""

from collections.abc import Iterator
from pathlib import Path

from raydetect.detectors._registry import detector_class, list_models
from raydetect.detectors._weights import IMAGENET, cached_clip, cached_imagenet, require_reachable
from raydetect.doctor.finding import Finding

MORE = ("resnet18",)  # the backbone of examples and of `raydetect init` without a GPU
ADVICE = (
    "Set detector.params.weights to a file of them, or copy the cache of a machine that has them (~/.cache/torch, "
    "~/.cache/huggingface)."
)
HOSTS = {False: "https://download.pytorch.org", True: "https://huggingface.co"}


def weight_findings() -> Iterator[Finding]:
    """One finding for each backbone and CLIP model that a detector has by default."""
    users: dict[str, list[str]] = {name: [] for name in MORE}
    clips: dict[tuple[str, str], list[str]] = {}
    for model in list_models():
        fields = detector_class(model).Params()
        backbone = getattr(fields, "backbone", None)
        if backbone is not None and getattr(fields, "weights", None) == IMAGENET:
            users.setdefault(backbone, []).append(model)
        clip = getattr(fields, "clip_model", None)
        if clip is not None:
            clips.setdefault((clip, str(getattr(fields, "weights", ""))), []).append(model)
    refusals = {is_timm: _refusal(host) for is_timm, host in HOSTS.items()}
    places = [(name, users[name], cached_imagenet(name), refusals[name.startswith("timm/")]) for name in sorted(users)]
    for (name, tag), models in sorted(clips.items()):
        places.append((f"{name} {tag}", models, cached_clip(name, tag), refusals[True]))
    advice = ADVICE
    for place in places:
        finding = _finding(*place, advice)
        advice = "" if finding.advice else advice  # once is enough
        yield finding


def _refusal(host: str) -> str:
    """Why nothing can be downloaded from a host; "" if it can."""
    try:
        require_reachable(host)
    except OSError as error:
        return str(error).removeprefix("they are not in the cache, and ")
    return ""


def _finding(name: str, users: list[str], path: Path | None, refusal: str, advice: str) -> Finding:
    text = f"{name} ({', '.join(users)})" if users else name
    if path is not None:
        return Finding("weights", "ok", f"{text}: {path}")
    if not refusal:
        return Finding("weights", "ok", f"{text}: in no cache; downloaded when they are first needed")
    return Finding("weights", "note", f"{text}: in no cache, and {refusal}", advice)
