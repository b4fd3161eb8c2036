"""SPADE against brute force in float64, and on real images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.spade import SPADE
from raydetect.errors import SpecError
from tests.builders.bottle import aurocs, fit_in_memory, read_bottles
from tests.builders.group import together
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch
from tests.reference.correspondence import nearest_squares

PARAMS = {"backbone": "resnet18", "weights": "random", "image_size": [64, 64], "k_neighbors": 3, "smoothing_sigma": 0}
NORMAL = [normal_image(i, 64) for i in range(7)]
TESTED = [normal_image(900, 64), defect_image(1, "blob", 64)[0], defect_image(2, "scratch", 64)[0]]


def build(**params: object) -> SPADE:
    detector = build_detector("spade", {**PARAMS, **params})
    assert isinstance(detector, SPADE)
    detector.load_weights()
    return detector


def collected(detector: SPADE, images: list[np.ndarray], names: list[str], group: Group | None = None) -> FitState:
    state = FitState(group)
    with torch.inference_mode():
        for image, name in zip(images, names, strict=True):
            state.add([name], detector.collect(Batch(as_batch([image]), [name])))
    state.agree()
    return state


def fitted(images: list[np.ndarray] = NORMAL, **params: object) -> SPADE:
    detector = build(**params)
    detector.finish(collected(detector, images, [f"{i:02d}" for i in range(len(images))]), lambda *_: None)
    return detector


def features(detector: SPADE, image: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The pyramid and the pooled feature of one image, float64."""
    assert detector.backbone is not None
    with torch.inference_mode():
        levels = [level[0].double().numpy() for level in detector.backbone(as_batch([image]))]
    return levels[:3], levels[-1].mean((1, 2))


def brute_force(detector: SPADE, image: np.ndarray, count: int) -> tuple[float, list[list[np.ndarray]], list]:
    """Eq. 2, the image's pyramid and those of its nearest images."""
    levels, pooled = features(detector, image)
    others = [features(detector, normal) for normal in NORMAL]
    squares = np.array([((other - pooled) ** 2).sum() for _, other in others])
    nearest = squares.argsort(kind="stable")[:count]
    return float(squares[nearest].mean()), levels, [others[i][0] for i in nearest]


@pytest.mark.parametrize("count", [1, 3])
def test_scores_and_maps_are_equations_2_and_3(count: int) -> None:
    detector = fitted(k_neighbors=count)
    scores = detector.score(as_batch(TESTED))
    for i, image in enumerate(TESTED):
        expected, levels, others = brute_force(detector, image, count)
        assert float(scores.image_score_B[i]) == pytest.approx(expected, rel=1e-3)
        coarse = torch.from_numpy(nearest_squares(levels, others))[None, None]
        upsampled = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")[0, 0].numpy()
        np.testing.assert_allclose(scores.anomaly_map_BHW[i].numpy(), upsampled, rtol=1e-3, atol=1e-3)


def test_averaged_levels_each_have_their_own_counterpart() -> None:
    detector = fitted(level_fusion="average")
    scores = detector.score(as_batch(TESTED[1:2]))
    _, levels, others = brute_force(detector, TESTED[1], 3)
    total = np.zeros((64, 64))
    for i, level in enumerate(levels):
        coarse = torch.from_numpy(nearest_squares([level], [[other[i]] for other in others]) ** 0.5)[None, None]
        total += torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")[0, 0].numpy() / 3
    np.testing.assert_allclose(scores.anomaly_map_BHW[0].numpy(), total, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("align", "cells"), [(True, 2), (4, 1), (12.5, 3.125)])
def test_aligned_counterparts_lie_within_reach(align: float, cells: float) -> None:
    detector = fitted(align=align)
    scores = detector.score(as_batch(TESTED[1:2]))
    _, levels, others = brute_force(detector, TESTED[1], 3)
    coarse = torch.from_numpy(nearest_squares(levels, others, cells))[None, None]
    upsampled = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose(scores.anomaly_map_BHW[0].numpy(), upsampled, rtol=1e-3, atol=1e-3)
    assert (scores.anomaly_map_BHW >= fitted().score(as_batch(TESTED[1:2])).anomaly_map_BHW - 1e-3).all()
    with pytest.raises(SpecError, match="48 x 64"):
        detector.score(torch.zeros(1, 3, 48, 64, dtype=torch.uint8))


def test_the_map_is_smoothed_as_scipy_does_and_can_be_the_score() -> None:
    images = as_batch(TESTED[1:2])
    plain = fitted().score(images).anomaly_map_BHW[0].numpy()
    smooth = fitted(smoothing_sigma=3, image_score="map").score(images)
    expected = gaussian_filter(plain.astype(np.float64), 3, mode="reflect")
    np.testing.assert_allclose(smooth.anomaly_map_BHW[0].numpy(), expected, rtol=1e-3)
    assert float(smooth.image_score_B[0]) == pytest.approx(expected.max(), rel=1e-3)


def test_a_normal_image_of_the_gallery_is_at_no_distance_from_itself() -> None:
    scores = fitted(k_neighbors=1).score(as_batch(NORMAL))
    assert scores.image_score_B.abs().max() < 1e-6
    assert scores.anomaly_map_BHW.abs().max() < 1e-3


def test_any_order_of_levels_and_any_pooled_level_works() -> None:
    detector = fitted(feature_levels=["layer2", "layer3"], pooled_level="layer1")
    assert detector.backbone is not None
    with torch.inference_mode():
        found = dict(zip(detector.backbone.layers, detector.backbone(as_batch(TESTED)), strict=True))
    assert [found[name].shape[1] for name in ("layer1", "layer2", "layer3")] == [64, 128, 256]
    expected = torch.cdist(found["layer1"].mean((2, 3)), detector.tensors()["pooled"]).square()
    expected = expected.topk(3, largest=False).values.mean(1)
    torch.testing.assert_close(detector.score(as_batch(TESTED)).image_score_B, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shares", [[range(0, 7, 2), range(1, 7, 2)], [range(5, 1, -1), range(0), (6, 0, 1)]])
def test_workers_fit_the_same_gallery_as_one_alone(shares: list[Sequence[int]]) -> None:
    expected = fitted().tensors()
    detectors = [build() for _ in shares]  # random weights come of the one generator of all threads

    def work(group: Group) -> dict[str, torch.Tensor]:
        mine = shares[group.rank]
        state = collected(detectors[group.rank], [NORMAL[i] for i in mine], [f"{i:02d}" for i in mine], group)
        detectors[group.rank].finish(state, lambda *_: None)
        return detectors[group.rank].tensors()

    for tensors in together(len(shares), work):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_an_extended_gallery_scores_as_one_of_all_images() -> None:
    for fusion in ("concatenate", "average"):
        first = fitted(NORMAL[:4], level_fusion=fusion)
        state = collected(first, NORMAL[4:], ["x", "y", "z"])
        first.extend(state)
        first.finish(state, lambda *_: None)
        assert first.facts() == {"gallery": {"images": 7, "searched": 3}}
        found, expected = first.score(as_batch(TESTED)), fitted(level_fusion=fusion).score(as_batch(TESTED))
        torch.testing.assert_close(found.image_score_B, expected.image_score_B)
        torch.testing.assert_close(found.anomaly_map_BHW, expected.anomaly_map_BHW, rtol=1e-5, atol=1e-4)


def test_fewer_images_than_neighbours_are_all_searched_and_a_bound_is_one() -> None:
    assert fitted(k_neighbors=50).facts() == {"gallery": {"images": 7, "searched": 7}}
    assert build(max_gallery_images=5).num_collected() == 5 and build().num_collected() is None


def test_it_finds_the_broken_bottles(real_data: Path, real_weights: Path) -> None:
    """The paper's defaults but for the backbone, whose weights end at layer3, and 160 px; every third test image."""
    detector = build(image_size=[160, 160], k_neighbors=50, smoothing_sigma=4, pooled_level="layer3",
                     weights=str(real_weights))  # fmt: skip
    fit_in_memory(detector, read_bottles(real_data, "train", 160))
    test = read_bottles(real_data, "test", 160)
    image_auroc, pixel_auroc = aurocs(detector, test.only(np.arange(0, len(test.names), 3)))
    print(f"image AUROC {image_auroc:.4f}, pixel AUROC {pixel_auroc:.4f}")
    assert image_auroc >= 0.95 and pixel_auroc >= 0.97
