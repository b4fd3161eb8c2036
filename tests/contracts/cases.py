"""One case per detector: parameters for a small fit, and the accuracy it must reach on planted defects."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from raydetect.artifacts.store import load_artifact
from raydetect.config import FitSpec, parse_job
from raydetect.detectors._base import Detector, Scores
from raydetect.detectors._registry import build_detector, detector_class, unused_params
from raydetect.local import jobs
from raydetect.storage import Storage
from tests.builders.archives import normal_files, pack
from tests.builders.auxiliary import auxiliary_of
from tests.builders.images import DEFECTS, defect_image, encode, normal_image

SIZE_PX = 64


@dataclass(frozen=True)
class Case:
    """A test case for one detector.

    Attributes:
        name: name in the registry.
        params: parameters that differ from the detector's smoke preset.
        floor: minimum image AUROC on planted defects, with random backbone weights. Training amplifies float32
            rounding, so it is lower than the results of eight seeds.
        pixel_floor: minimum pixel AUROC, likewise.
        bad: invalid parameters, by a word of the expected message.
        variant: distinguishes several cases of one detector.
    """

    name: str
    params: dict[str, Any]
    floor: float
    pixel_floor: float
    bad: dict[str, dict[str, Any]] = field(default_factory=dict)
    variant: str = ""

    @property
    def id(self) -> str:
        """The name, with the variant if there is one."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def labelled(self) -> bool:
        """Whether fitting needs labelled anomalous images."""
        return detector_class(self.name).info.labels != "none"

    def sized(self) -> dict[str, Any]:
        """The parameters, with the size of the test images."""
        return {"image_size": [SIZE_PX, SIZE_PX], **self.params}

    def brief(self, passes: int = 2) -> dict[str, Any]:
        """The same with only a few training epochs, if the detector is trained."""
        params = self.build().params
        used = {field.name for field in fields(params)} - set(unused_params(params))
        return {**self.sized(), **{name: passes for name in ("epochs", "difference_epochs") if name in used}}

    def build(self, **params: Any) -> Detector:
        """Builds the unfitted detector."""
        return build_detector(self.name, {**self.sized(), **params}, preset="smoke")


RANDOM = {"weights": "random"}
DIFFERENCE = {**RANDOM, "head": "difference", "layers": ["layer1", "layer2"], "smoothing_sigma": 1}
CASES = (
    Case(
        "aprilgan",
        {"k_shot": 8, "temperature": 0.1},  # text says little with random weights
        floor=0.7,
        pixel_floor=0.88,
        bad={
            "multiple of 14 px": {"image_size": [512, 512]},
            "ascending numbers of the 24 blocks": {"layers": [6, 25]},
            "layers": {"layers": [6, 6]},
            "ViT-L-14": {"clip_model": "ViT-L/15"},
            "k_shot": {"k_shot": -1},
            "mosaic_ratio": {"mosaic_ratio": 1.5},
        },
    ),
    Case(
        "cflow",
        RANDOM,
        floor=0.8,
        pixel_floor=0.93,
        bad={
            "n_flows": {"n_flows": 0},
            "warm_up_epochs": {"epochs": 2, "warm_up_epochs": 2},
            "fibre_batch": {"fibre_batch": 8, "batch_size": 9},
            "position_dims": {"position_dims": 6},
        },
    ),
    Case(
        "cutpaste",
        {**RANDOM, "level": "patch", "patch_stride_px": 8},
        floor=0.8,
        pixel_floor=0.8,
        bad={
            "batch_size": {"batch_size": 2},
            "augment_type": {"augment_type": "4way"},
            "contradicts": {"pretrained": False, "weights": "imagenet"},
        },
    ),
    Case(
        "differnet",
        RANDOM,
        floor=0.75,
        pixel_floor=0.8,
        bad={
            "test_transforms": {"test_transforms": 0},
        },
    ),
    Case(
        "differnet",
        {**DIFFERENCE, "difference_epochs": 30},
        floor=0.75,
        pixel_floor=0.88,
        bad={"k_neighbors": {"head": "difference", "k_neighbors": 0}},
        variant="difference",
    ),
    Case(
        "differnet",
        {**DIFFERENCE, "train_difference": False},
        floor=0.95,
        pixel_floor=0.93,
        bad={"coreset_sampling_ratio": {"head": "difference", "coreset_sampling_ratio": 0}},
        variant="distance",
    ),
    Case(
        "draem",
        {},
        floor=0.75,
        pixel_floor=0.55,
        bad={
            "base_width": {"base_width": 7},
            "anomalous_ratio": {"anomalous_ratio": 0},
            "turned_ratio": {"turned_ratio": 1.5},
            "odd": {"smoothing_px": 4},
        },
    ),
    Case(
        "fastflow",
        RANDOM,
        floor=0.95,
        pixel_floor=0.95,
        bad={"n_flow_steps": {"n_flow_steps": 0}, "hidden_ratio": {"hidden_ratio": 0}, "clamp": {"clamp": 0}},
    ),
    Case(
        "memseg",
        {**RANDOM, "epochs": 30},
        floor=0.8,
        pixel_floor=0.65,
        bad={
            "k_neighbors 9": {"k_neighbors": 9, "memory_size": 8},
            "multiples of 32": {"image_size": [100, 100]},
            "feature_dim": {"feature_dim": 100},
            "last_learning_rate": {"last_learning_rate": 1},
        },
    ),
    Case(
        "patchcore",
        {**RANDOM, "layers": ["layer1", "layer2"], "smoothing_sigma": 1},
        floor=0.95,
        pixel_floor=0.93,
        bad={"coreset_sampling_ratio": {"coreset_sampling_ratio": 0}, "n_neighbors": {"n_neighbors": 0}},
    ),
    Case(
        "pyramidflow",
        {},
        floor=0.8,
        pixel_floor=0.8,
        bad={
            "kernel_size": {"kernel_size": 4},
            "multiple of 8 px": {"image_size": [100, 100], "backbone": None},
            "levels": {"levels": 1},
            "batch_size": {"batch_size": 3},
            "volume_norm": {"volume_norm": "CVN"},
        },
    ),
    Case(
        "pyramidflow",
        {**RANDOM, "backbone": "resnet18", "volume_norm": "spatial"},
        floor=0.8,
        pixel_floor=0.8,
        bad={"multiple of 32 px": {"image_size": [48, 48]}, "resnet34": {"backbone": "resnet50"}},
        variant="backbone",
    ),
    Case(
        "spade",
        RANDOM,
        floor=0.9,
        pixel_floor=0.9,
        bad={
            "k_neighbors": {"k_neighbors": 0},
            "feature_levels": {"feature_levels": []},
            "align": {"align": -1},
            "level_fusion": {"level_fusion": "sum"},
        },
    ),
    Case(
        "reverse_distillation_pp",
        RANDOM,
        floor=0.8,
        pixel_floor=0.8,
        bad={
            "multiples of 32": {"image_size": [100, 100]},
            "no mirrored decoder": {"backbone": "resnext50_32x4d"},
            "ssot_partners": {"ssot_partners": 1},
            "noise_strength": {"noise_strength": 0},
        },
    ),
    Case(
        "reverse_distillation_pp",
        {**RANDOM, "projector": False},
        floor=0.8,
        pixel_floor=0.8,
        bad={"smoothing_sigma": {"projector": False, "smoothing_sigma": -1}},
        variant="reverse_distillation",
    ),
    Case(
        "reverse_distillation_pp",
        {**RANDOM, "ssot_weight": 1.0},
        floor=0.8,
        pixel_floor=0.8,
        bad={"ssot_weight": {"ssot_weight": -1}},
        variant="ssot",
    ),
    Case(
        "regad",
        {},
        floor=0.8,
        pixel_floor=0.8,
        bad={
            "multiple of 16 px": {"image_size": [100, 100]},
            "k_shot": {"k_shot": 0},
            "batch_size": {"batch_size": 0},
            "resnet34": {"backbone": "resnet50"},
        },
    ),
    Case(
        "riad",
        {},
        floor=0.8,
        pixel_floor=0.8,
        bad={
            "grid_size": {"grid_size": 0},
            "fewer than two cells": {"grid_size": 200},
            "odd": {"smoothing_px": 20},
        },
    ),
    Case(
        "devnet",
        {**RANDOM, "smoothing_sigma": 1},
        floor=0.95,
        pixel_floor=0.9,
        bad={"margin": {"margin": 0}, "top_ratio": {"top_ratio": 1.5}, "map": {"map": "cam"}},
    ),
    Case(
        "simplenet",
        {**RANDOM, "smoothing_sigma": 1},
        floor=0.8,
        pixel_floor=0.75,
        bad={"noise_sigma": {"noise_sigma": 0}, "margin": {"margin": -0.5}, "embedding_dims": {"embedding_dims": 0}},
    ),
    Case(
        "stfpm",
        RANDOM,
        floor=0.8,
        pixel_floor=0.88,
        bad={"momentum": {"momentum": 1.5}, "epochs": {"epochs": 0}},
    ),
    Case(
        "uniad",
        RANDOM,
        floor=0.8,
        pixel_floor=0.8,
        bad={
            "odd": {"neighbor_size": 4},
            "multiple of n_heads": {"hidden_dims": 60, "n_heads": 8},
            "hides all": {"image_size": [112, 112]},
            "pooling_px 300": {"pooling_px": 300},
            "dropout": {"dropout": 1},
        },
    ),
    Case(
        "winclip",
        {"k_shot": 8},
        floor=0.9,
        pixel_floor=0.8,
        bad={
            "ViT-B-32": {"clip_model": "ViT-B/33"},
            "contradicts": {"window_size": 224, "image_size": [240, 240]},
            "scales": {"scales": [2, 99]},
            "k_shot": {"k_shot": -1},
            "temperature": {"temperature": 0},
        },
    ),
)


IN_BFLOAT16 = tuple(
    replace(
        case,
        params={**case.params, "precision": "bfloat16"},
        variant="-".join(word for word in (case.variant, "bfloat16") if word),
    )
    for case in CASES
)


def fit(case: Case) -> Detector:
    """Fits a case on 40 loose images, enough to find defects, and loads the artifact."""
    return _fit(case, "shared", case.sized(), images=40, shard_images=20, seed=0)


def fit_briefly(case: Case, shard_images: int, seed: int) -> Detector:
    """Fits a case on 8 images with two training epochs, enough to test what a fit depends on."""
    return _fit(case, "brief", case.brief(), 8, shard_images, seed)


def _fit(case: Case, folder: str, params: dict[str, Any], images: int, shard_images: int, seed: int) -> Detector:
    """Fits and loads a detector; one that needs labels gets 25 % more images, with defects."""
    files = normal_files(images)
    if case.labelled:
        for i in range(images // 4):
            kind = DEFECTS[i % len(DEFECTS)]
            files.append((f"widget/train/{kind}/{i:04d}.png", encode(defect_image(i, kind)[0])))
    pack(f"memory://{folder}/normal", "", files, 1)
    spec = parse_job(
        {
            "kind": "fit",
            "source": {
                "uri": f"memory://{folder}/normal",
                "shard_images": shard_images,
                "pattern": "{category}/train/{defect}/{name}.png",
            },
            "detector": {"name": case.name, "preset": "smoke", "params": params},
            "artifact": f"memory://{folder}/artifact",
            "seed": seed,
            **auxiliary_of(case.name, folder=f"memory://{folder}/auxiliary"),
            "batch_size": 8,
            "resources": {"cpus_per_worker": 1},
        },
        case.name,
    )
    assert isinstance(spec, FitSpec)
    jobs.fit(spec, lambda *_: None)
    return load_artifact(f"memory://{folder}/artifact", Storage()).detector


def as_batch(images: list[np.ndarray]) -> torch.Tensor:
    """Stacks images to uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def test_images(count: int = 12) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(images, labels, masks): normal images, then planted defects, none of them used for fitting."""
    normal = [normal_image(90_000 + i, SIZE_PX) for i in range(count)]
    planted = [defect_image(500 + i, DEFECTS[i % len(DEFECTS)], SIZE_PX) for i in range(count)]
    masks = np.zeros((2 * count, SIZE_PX, SIZE_PX), bool)
    for i, (_, mask) in enumerate(planted):
        masks[count + i] = mask
    return as_batch([*normal, *(image for image, _ in planted)]), np.repeat([0, 1], count), masks


def score(detector: Detector, images_BCHW: torch.Tensor) -> Scores:
    """Scores images as one batch."""
    with torch.inference_mode():
        return detector.score(images_BCHW)
