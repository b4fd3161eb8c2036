"""The requirements of the Detector interface, each tested on every registered detector."""

import time
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache

import fsspec
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from raydetect.artifacts.checks import load_checked
from raydetect.artifacts.record import Calibration
from raydetect.artifacts.store import load_artifact, save_artifact
from raydetect.blocks.coresets.keyed_rows import PAD_KEY, FitState
from raydetect.detectors._base import Batch, Detector, NotFittedError
from raydetect.detectors._registry import build_detector, detector_class, list_models
from raydetect.errors import ArtifactError, RaydetectError, SpecError
from raydetect.storage import Storage
from tests.builders.training import prepared
from tests.contracts import cases
from tests.contracts.cases import CASES, IN_BFLOAT16, SIZE_PX, Case

pytestmark = [
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.id),
    pytest.mark.usefixtures("one_thread"),
]
BY_ID = {case.id: case for case in (*CASES, *IN_BFLOAT16)}
SEED = 3


def fitted(case: Case) -> Detector:
    """The fitted detector of a case, shared by tests that do not modify it."""
    return _fitted(case.id)


@lru_cache(maxsize=1)
def _fitted(name: str) -> Detector:
    """Caches one detector only: tests run case by case, and a fitted detector may use gigabytes."""
    return cases.fit(BY_ID[name])


def brief(case: Case) -> Detector:
    """The detector of a case fitted on 8 images in one shard with `SEED`, as a reference for other fits."""
    return _brief(case.id)


@lru_cache(maxsize=1)
def _brief(name: str) -> Detector:
    return cases.fit_briefly(BY_ID[name], shard_images=100, seed=SEED)


def needs_weights(case: Case) -> bool:
    """Whether the detector uses pretrained weights, including those of an optional backbone if it has one."""
    if "weights" not in {field.name for field in fields(detector_class(case.name).Params)}:
        return False
    return getattr(case.build().params, "backbone", "its own") is not None


def untrained(detector: Detector) -> None:
    """Runs a train phase without any step."""
    detector.begin_training(12)
    detector.end_training()


def train_twice(detector: Detector, batch: Batch) -> None:
    """Runs a train phase of two epochs over one batch."""
    plan = detector.begin_training(len(batch.keys))
    for _ in range(2):
        for piece in detector.training_pieces(prepared(detector, batch)):
            plan.optimizer.zero_grad()
            detector.training_loss(piece).backward()
            plan.optimizer.step()
    detector.end_training()


def test_every_detector_has_a_case(case: Case) -> None:
    assert case.name in list_models()
    assert {c.name for c in CASES} == set(list_models())


def test_class_name_matches_file_and_info_is_complete(case: Case) -> None:
    kind = detector_class(case.name)
    assert kind.__name__.lower() == case.name.replace("_", "")
    assert (
        kind.info.paper.startswith(("arXiv:", "doi:", "https://openaccess.thecvf.com/"))
        and kind.info.venue
        and kind.info.summary
        and kind.info.published
    )
    assert kind.phases and set(kind.phases) <= {"collect", "train"}


def test_building_is_cheap(case: Case) -> None:
    detector_class(case.name)
    started = time.process_time()
    build_detector(case.name, {"weights": "no/such/file"} if needs_weights(case) else {})  # nothing is loaded yet
    assert time.process_time() - started < 0.2


def test_unknown_and_invalid_parameters_are_rejected(case: Case) -> None:
    with pytest.raises(SpecError, match="image_size"):
        build_detector(case.name, {"image_sise": [64, 64]})
    for word, params in case.bad.items():
        with pytest.raises(SpecError, match=word):
            build_detector(case.name, params)


def test_missing_weights_give_a_helpful_error(case: Case) -> None:
    if not needs_weights(case):
        assert case.build().load_weights() == "from scratch"
        return
    with pytest.raises(ArtifactError, match="weights"):
        case.build(weights="/no/such/file.safetensors").load_weights()


def test_unfitted_detector_refuses_to_score_and_save(case: Case) -> None:
    detector = case.build()
    for _ in range(2):
        with pytest.raises(NotFittedError, match=case.name):
            detector.score(torch.zeros(1, 3, SIZE_PX, SIZE_PX, dtype=torch.uint8))
        with pytest.raises(NotFittedError):
            detector.tensors()
        detector.load_weights()


def test_scores_have_the_right_shapes_and_are_finite(case: Case) -> None:
    images = torch.randint(0, 256, (3, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8)
    for batch in (images, torch.zeros_like(images), torch.full_like(images, 255)):
        scores = cases.score(fitted(case), batch)
        assert scores.image_score_B.shape == (3,) and scores.image_score_B.dtype == torch.float32
        assert scores.anomaly_map_BHW.shape == (3, SIZE_PX, SIZE_PX) and scores.anomaly_map_BHW.dtype == torch.float32
        assert torch.isfinite(scores.image_score_B).all() and torch.isfinite(scores.anomaly_map_BHW).all()


def test_finds_planted_defects(case: Case) -> None:
    images, labels, masks = cases.test_images()
    scores = cases.score(fitted(case), images)
    assert roc_auc_score(labels, scores.image_score_B.numpy()) >= case.floor
    if fitted(case).info.localises:
        assert roc_auc_score(masks.ravel(), scores.anomaly_map_BHW.numpy().ravel()) >= case.pixel_floor


def test_scores_do_not_depend_on_the_batch(case: Case) -> None:
    images = cases.test_images()[0]
    together = cases.score(fitted(case), images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = cases.score(fitted(case), images[order])
    assert torch.equal(shuffled.image_score_B, together.image_score_B[order])
    assert torch.equal(shuffled.anomaly_map_BHW, together.anomaly_map_BHW[order])
    alone = torch.cat([cases.score(fitted(case), images[i : i + 1]).image_score_B for i in range(4)])
    torch.testing.assert_close(alone, together.image_score_B[:4], rtol=1e-4, atol=1e-6)


def test_scoring_is_pure(case: Case) -> None:
    images = cases.test_images(3)[0]
    before = images.clone()
    first, second = cases.score(fitted(case), images), cases.score(fitted(case), images)
    assert torch.equal(first.image_score_B, second.image_score_B)
    assert torch.equal(first.anomaly_map_BHW, second.anomaly_map_BHW)
    assert torch.equal(images, before)


def test_fit_does_not_depend_on_batches_or_order(case: Case) -> None:
    """The keyed state is the same for any batches and order of images, even if some are collected twice."""
    phases = case.build().phases
    if "collect" not in phases:
        with pytest.raises(TypeError, match="no collect phase"):
            case.build().collect(Batch(torch.zeros(0), []))
        return
    images, keys = cases.test_images(6)[0], [f"image-{i}" for i in range(12)]
    banks = []
    for orders in ([range(0, 12)], [range(11, 5, -1), range(5, -1, -1)], [range(4), range(2, 9), range(8, 12)]):
        detector = case.build()
        detector.load_weights()
        if phases[0] == "train":
            untrained(detector)
        state = FitState()
        with torch.inference_mode():
            for order in orders:
                indices = list(order)
                padded = images[[*indices, *[0] * (12 - len(indices))]]
                names = [keys[i] for i in indices] + [PAD_KEY] * (12 - len(indices))
                state.add(names, detector.collect(Batch(padded, names)))
        detector.finish(state, lambda *_: None)
        if phases[-1] == "train":
            untrained(detector)
        banks.append(detector.tensors())
    for other in banks[1:]:
        assert all(torch.equal(banks[0][name], other[name]) for name in banks[0])


def test_fit_is_repeatable_with_any_number_of_shards(case: Case) -> None:
    one, many = brief(case).tensors(), cases.fit_briefly(case, shard_images=3, seed=SEED).tensors()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_fit_depends_on_the_seed(case: Case) -> None:
    one, other = brief(case).tensors(), cases.fit_briefly(case, shard_images=100, seed=SEED + 1).tensors()
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_second_fit_forgets_the_first(case: Case) -> None:
    detector = case.build()
    detector.load_weights()
    images, _, masks = cases.test_images(8)
    keys = [str(i) for i in range(16)]

    def fit_on(rows: range) -> dict[str, torch.Tensor]:
        labels, masks_BHW = [i % 2 for i in range(len(rows))], torch.from_numpy(masks[list(rows)])
        names = [keys[i] for i in rows]
        batch = Batch(images[list(rows)], names, labels, masks_BHW=masks_BHW, categories=["widget"] * len(rows))
        for phase in detector.phases:
            if phase == "collect":
                with torch.inference_mode():
                    state = FitState()
                    state.add(batch.keys, detector.collect(batch))
                    detector.finish(state, lambda *_: None)
            else:
                train_twice(detector, batch)
        return {name: value.clone() for name, value in detector.tensors().items()}

    once = fit_on(range(8))
    fit_on(range(8, 16))
    twice = fit_on(range(8))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert brief(case).tensors().keys() == once.keys()


def test_saved_detector_scores_bit_identically_without_pickle(case: Case) -> None:
    detector, images = fitted(case), cases.test_images(4)[0]
    calibration = Calibration(scores=(0.0, 1.0), map_low=0.0, map_high=1.0)
    save_artifact("memory://saved/artifact", Storage(), case.name, detector, calibration, {})
    scores = [cases.score(d, images) for d in (detector, load_artifact("memory://saved/artifact", Storage()).detector)]
    assert torch.equal(scores[0].image_score_B, scores[1].image_score_B)
    assert torch.equal(scores[0].anomaly_map_BHW, scores[1].anomaly_map_BHW)
    names = [name.rpartition("/")[2] for name in fsspec.filesystem("memory").find("/saved/artifact")]
    assert sorted(name.rpartition(".")[2] for name in names) == ["json", "safetensors"]


def test_a_missing_tensor_is_named(case: Case) -> None:
    tensors = dict(fitted(case).tensors())
    name = next(n for n in sorted(tensors) if n.endswith("weight") or n == "bank")
    del tensors[name]
    detector = case.build()
    with pytest.raises(ArtifactError, match=r"has no tensor|misses"):
        detector.load_tensors(tensors)


def _others(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor of another type, of another shape, and with a value that is not finite."""
    yield value.double() if value.dtype != torch.float64 else value.float()
    yield value[..., : value.shape[-1] // 2] if value.ndim and value.shape[-1] > 1 else value[None]
    if value.is_floating_point():
        yield torch.full_like(value, torch.inf)


def test_tensors_of_another_kind_are_refused_before_it_scores(case: Case) -> None:
    tensors = dict(fitted(case).tensors())
    load_checked(case.build(), tensors, "its file", f"{case.id}, whole")
    kinds = {name.partition(".")[0]: name for name in sorted(tensors)}  # one of each network, and what is none
    for number, (name, other) in enumerate((n, other) for n in kinds.values() for other in _others(tensors[n])):
        with pytest.raises(ArtifactError, match=r"^its file: .*Fit again\.$"):
            load_checked(case.build(), {**tensors, name: other}, "its file", f"{case.id}, {number}")


@pytest.mark.parametrize("size", [(32, 32), (65, 97), (33, 40), (200, 48)])
def test_any_image_size_works_or_is_rejected(case: Case, size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    try:
        scores = cases.score(fitted(case), images)
    except RaydetectError as error:
        assert str(size[0]) in str(error)
        return
    assert scores.anomaly_map_BHW.shape == (2, *size)
    assert torch.isfinite(scores.anomaly_map_BHW).all()


def test_to_returns_the_detector_itself(case: Case) -> None:
    detector = fitted(case)
    assert detector.to(torch.device("cpu")) is detector
    assert np.isfinite(cases.score(detector, cases.test_images(1)[0]).image_score_B.numpy()).all()
