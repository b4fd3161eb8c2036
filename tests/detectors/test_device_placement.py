"""Every detector's `score` stays on one device and waits for it only where it says so; proved without a GPU."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from raydetect.blocks.device_constants import forget_constants, kept_on_device
from raydetect.config import MemberSpec
from raydetect.detectors._base import Detector, Scores
from raydetect.detectors._ensemble import Ensemble, Scale
from raydetect.detectors._registry import list_models
from tests.builders.fake_device import score_on_fake_gpu
from tests.contracts import cases
from tests.contracts.cases import CASES, SIZE_PX, Case

SIZE = (SIZE_PX, SIZE_PX)
BY_ID = {case.id: case for case in CASES}


def variant(name: str, params: dict[str, Any]) -> Case:
    """A case with other parameters, named after the first of them."""
    word = "-".join(f"{key}-{value}" for key, value in list(params.items())[:1])
    return replace(BY_ID[name], params={**BY_ID[name].params, **params}, variant=word)


VARIANTS = (
    variant("aprilgan", {"k_shot": 0}),
    replace(BY_ID["cutpaste"], params={"weights": "random", "level": "image"}, variant="level-image"),
    variant("devnet", {"map": "patches"}),
    variant("memseg", {"k_neighbors": 3}),
    variant("patchcore", {"search": "bfloat16"}),
    variant("patchcore", {"n_neighbors": 1}),
    variant("patchcore", {"backbone": "vit_tiny_patch16_224", "layers": ["blocks.1", "blocks.2"]}),
    variant("riad", {"backbone": "resnet18", "weights": "random"}),
    variant("simplenet", {"embedding_dims": 32}),
    variant("spade", {"align": True}),
    variant("spade", {"level_fusion": "average"}),
    variant("winclip", {"k_shot": 0}),
)
WAITS = {"patchcore": 2, "spade": 1, "winclip": 3, "aprilgan": 2, "differnet-difference": 1, "differnet-distance": 1}
"""How often `score` waits for the device: once per exact search, see the README of detectors. Others never do."""
WAITS |= {"patchcore-n_neighbors-1": 1, "winclip-k_shot-0": 0, "aprilgan-k_shot-0": 0}


def waits(case: Case) -> int:
    """The documented number of waits of a case."""
    return WAITS.get(case.id, WAITS.get(case.name, 0) if case.name != "differnet" else 0)


@lru_cache(maxsize=1)
def fitted(name: str) -> Detector:
    """A detector fitted on 8 images."""
    case = next(case for case in (*CASES, *VARIANTS) if case.id == name)
    return cases.fit_briefly(case, shard_images=100, seed=3)


def test_every_detector_is_tried() -> None:
    assert {case.name for case in CASES} == set(list_models())


@pytest.mark.parametrize("case", [*CASES, *VARIANTS], ids=lambda case: case.id)
def test_scoring_stays_on_the_device_and_waits_only_where_it_says_so(case: Case) -> None:
    detector = fitted(case.id)
    before = cases.score(detector, cases.test_images(1)[0])
    assert score_on_fake_gpu(detector, SIZE) == waits(case)
    after = cases.score(detector, cases.test_images(1)[0])
    assert torch.equal(before.anomaly_map_BHW, after.anomaly_map_BHW)  # the fake copy has left nothing behind


@pytest.mark.parametrize(
    "name", ["patchcore", "patchcore-search-bfloat16", "spade", "winclip", "aprilgan", "differnet-distance"]
)
def test_the_rescue_of_unproven_patches_stays_on_the_device(name: str) -> None:
    case = next(case for case in (*CASES, *VARIANTS) if case.id == name)
    assert score_on_fake_gpu(fitted(name), SIZE, pending=2) > waits(case)


def test_an_ensemble_stays_on_the_device() -> None:
    members = [fitted("patchcore"), fitted("draem")]
    specs = tuple(MemberSpec(name=name) for name in ("patchcore", "draem"))
    ensemble = Ensemble(Ensemble.Params(members=specs, weights=(2.0, 1.0)), members)
    ensemble.scales = (Scale(0.0, 1.0, 0.0, 1.0),) * 2
    assert score_on_fake_gpu(ensemble, SIZE) == WAITS["patchcore"]


@dataclass
class Faulty(Detector):
    """A detector with one fault."""

    fault: str

    def __post_init__(self) -> None:
        self.device, self.constant = torch.device("cpu"), torch.ones(1)

    def score(self, images_BCHW: Tensor) -> Scores:
        """The mean pixel."""
        map_BHW = images_BCHW.float().mean(1)
        match self.fault:
            case "left":
                map_BHW = map_BHW * self.constant
            case "sent":
                map_BHW = map_BHW * self.constant.to(map_BHW.device)
            case "made":
                map_BHW = map_BHW * torch.tensor([2.0]).to(map_BHW.device)
            case "listed":
                map_BHW = map_BHW * torch.tensor([2.0, 3.0, 4.0], device=map_BHW.device)[:, None, None]
            case "read":
                map_BHW = map_BHW * float(map_BHW.mean())
            case "returned":
                map_BHW = map_BHW.cpu()
            case "masked":
                map_BHW[map_BHW > 3] = map_BHW[map_BHW > 3] * 2
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)

    def load_weights(self) -> str:
        """Nothing."""
        return "from scratch"

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def to(self, device: torch.device) -> "Faulty":
        """Forgets the constant."""
        self.device = device
        return self


def test_a_detector_without_fault_passes() -> None:
    assert score_on_fake_gpu(Faulty("none"), SIZE) == 0


@pytest.mark.parametrize("fault", ["left", "sent", "made", "listed", "read", "returned", "masked"])
def test_every_fault_is_found(fault: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        score_on_fake_gpu(Faulty(fault), SIZE)


@pytest.fixture
def calls() -> Iterator[list[int]]:
    """Sizes that a constant was computed for."""
    yield []
    forget_constants()


def test_constants_are_made_once_and_carry_gradients(calls: list[int]) -> None:
    @kept_on_device
    def ones(size: int) -> Tensor:
        calls.append(size)
        return torch.ones(size)

    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = ones(cpu, 2)
    assert ones(cpu, 2) is first and ones(cpu, 3).shape == (3,) and calls == [2, 3]
    assert ones(torch.device("meta"), 2).device.type == "meta" and calls == [2, 3, 2]
    assert not first.is_inference() and (torch.ones(2, requires_grad=True) * first).sum().requires_grad
    forget_constants()
    assert torch.equal(ones(cpu, 2), first) and calls == [2, 3, 2, 2]
