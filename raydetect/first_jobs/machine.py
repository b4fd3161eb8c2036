"""What of this machine decides the first jobs: cores, a GPU, and the weights in its caches."""

import os
from dataclasses import dataclass

import torch

from raydetect.detectors._weights import IMAGENET, RANDOM, cached_imagenet, require_reachable
from raydetect.first_jobs.job_text import Setting

SMALL_BACKBONE, LARGE_BACKBONE = "resnet18", "wide_resnet50_2"
DOWNLOADS = "https://download.pytorch.org"


@dataclass(frozen=True, slots=True)
class Backbone:
    """The backbone to use, its weights, and why."""

    name: str
    weights: str
    why: str


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def choose_backbone() -> Backbone:
    """Weights in a cache before a download, and random ones only where neither is to be had."""
    order = (LARGE_BACKBONE, SMALL_BACKBONE) if has_gpu() else (SMALL_BACKBONE, LARGE_BACKBONE)
    speed = (
        "a GPU is there" if has_gpu() else "without a GPU it is several times as fast as the paper's wide_resnet50_2"
    )
    for name in order:
        path = cached_imagenet(name)
        if path is not None:
            why = f"{name} with ImageNet weights, which are in the cache ({path})"
            return Backbone(name, IMAGENET, f"{why}; {speed}" if name == order[0] else why)
    try:
        require_reachable(DOWNLOADS)
    except OSError:
        why = (
            f"{order[0]} with RANDOM weights, which find only coarse defects: ImageNet weights are in no cache, and "
            "download.pytorch.org cannot be reached. Set weights to a file of them for real use"
        )
        return Backbone(order[0], RANDOM, why)
    why = f"{order[0]} with ImageNet weights, which are downloaded once ({speed})"
    return Backbone(order[0], IMAGENET, why)


def worker(workers: int = 1) -> Setting:
    """The resources of a job with so many workers on this machine."""
    value: dict[str, int] = {"num_workers": workers, "cpus_per_worker": max(1, cores() // workers)}
    text = f"{cores()} cores of this machine" + (f", shared by {workers} workers" if workers > 1 else "")
    if has_gpu():
        return Setting("resources", value | {"gpus_per_worker": 1}, f"{text} and its GPU")
    return Setting("resources", value, f"{text}; torch sees no GPU")
