"""CutPaste against scikit-learn, autograd, slow loops and its formulas."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import nn

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.coresets.gaussian import Gaussian
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.maps.anomaly_map import upsample
from raydetect.blocks.maps.grad_cam import grad_cam, unit
from raydetect.blocks.maps.patch_windows import upsample_windows
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import Batch, Known
from raydetect.detectors._registry import build_detector
from raydetect.detectors.cutpaste import CutPaste
from raydetect.errors import SpecError
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.builders.training import loss_of
from tests.contracts.cases import as_batch

IMAGES = as_batch([normal_image(i, 64) for i in range(10)])
KEYS = [f"image-{i}" for i in range(10)]
KNOWN = Known(0, None)


def build(**params: object) -> CutPaste:
    detector = build_detector("cutpaste", {"pretrained": False, **params}, preset="smoke")
    assert isinstance(detector, CutPaste)
    detector.load_weights()
    return detector


def fitted(**params: object) -> CutPaste:
    """Without a training step."""
    detector = build(**params)
    detector.begin_training(len(KEYS))
    detector.end_training()
    state = FitState()
    state.add(KEYS, detector.collect(Batch(IMAGES, KEYS)))
    detector.finish(state, lambda *_: None)
    return detector


def means(detector: CutPaste, images: torch.Tensor) -> np.ndarray:
    """L2-normalised mean features in float64."""
    with torch.inference_mode():
        mean = detector.networks["backbone"](images)[0].double().mean((2, 3)).numpy()
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_the_score_is_scikit_learns_distance_of_the_normalised_mean_feature() -> None:
    detector = fitted()
    probes = as_batch([normal_image(70, 64), defect_image(1, "blob", 64)[0]])
    theirs = LedoitWolf().fit(means(detector, IMAGES))
    assert detector.facts()["shrinkage"] == pytest.approx(theirs.shrinkage_, rel=1e-3)
    want = np.sqrt(theirs.mahalanobis(means(detector, probes)))
    np.testing.assert_allclose(detector.score(probes).image_score_B.numpy(), want, rtol=1e-3)


def test_the_map_is_grad_cam_of_the_distance() -> None:
    random = keyed_generator(0, "cam")
    gaussian = Gaussian(12)
    gaussian.mean_D.copy_(torch.randn(12, generator=random) / 4)
    factor = torch.randn(12, 12, generator=random, dtype=torch.float64)
    gaussian.precision_DD.copy_(factor @ factor.T)
    features = torch.rand(3, 12, 4, 5, generator=random, dtype=torch.float64).requires_grad_(True)
    (slopes,) = torch.autograd.grad(gaussian(unit(features.mean((2, 3)))).sum(), features)
    want = torch.relu((slopes.mean((2, 3), keepdim=True) * features).sum(1)).float()
    assert want.count_nonzero() > 20
    torch.testing.assert_close(grad_cam(features.detach().float(), gaussian), want, rtol=1e-4, atol=1e-6)
    detector = fitted()
    with torch.inference_mode():
        level = detector.networks["backbone"](IMAGES)[0]
        cam = grad_cam(level, detector.networks["gaussian"])  # type: ignore[arg-type]
    assert torch.equal(detector.score(IMAGES).anomaly_map_BHW, upsample(cam, (64, 64)))


def test_windows_are_scored_each_as_an_image_of_its_own() -> None:
    detector = fitted(level="patch", patch_size_px=32, patch_stride_px=12)
    places = range(0, 64 - 32 + 1, 12)
    crops = [[IMAGES[:, :, r : r + 32, c : c + 32] for c in places] for r in places]
    each = np.stack([np.stack([means(detector, crop) for crop in row], 1) for row in crops], 1)
    theirs = LedoitWolf().fit(each.reshape(-1, each.shape[-1]))
    want = np.sqrt(theirs.mahalanobis(each.reshape(-1, each.shape[-1]))).reshape(10, 3, 3)
    scores = detector.score(IMAGES)
    np.testing.assert_allclose(scores.image_score_B.numpy(), want.max((1, 2)), rtol=2e-3)
    wide = upsample_windows(torch.from_numpy(want), (64, 64), 32, 12, 10.0)
    np.testing.assert_allclose(scores.anomaly_map_BHW.numpy(), wide.numpy(), rtol=2e-3)
    with pytest.raises(SpecError, match=r"30 x 40 px are smaller than patch_size_px = 32\. Lower it"):
        detector.score(torch.zeros(1, 3, 30, 40, dtype=torch.uint8))


def test_windows_spread_by_a_gaussian_of_the_distance_to_their_middles() -> None:
    grid = torch.rand(2, 3, 4, generator=keyed_generator(0))
    found = upsample_windows(grid, (21, 26), 9, 5, 3.0).numpy()
    for row in range(21):
        for column in range(26):
            total, weights = np.zeros(2), 0.0
            for i in range(3):
                for j in range(4):
                    weight = math.exp(-((row - 4 - 5 * i) ** 2 + (column - 4 - 5 * j) ** 2) / (2 * 3.0**2))
                    total, weights = total + weight * grid[:, i, j].numpy(), weights + weight
            np.testing.assert_allclose(found[:, row, column], total / weights, rtol=1e-5)
    far = upsample_windows(torch.full((1, 1, 1), 2.0), (900, 3), 2, 1, 0.5)  # every weight of it is 0 in float64
    assert torch.equal(far, torch.full((1, 900, 3), 2.0))


@pytest.mark.parametrize(("augment_type", "classes"), [("normal", 2), ("scar", 2), ("3way", 3)])
@pytest.mark.parametrize("level", ["image", "patch"])
def test_the_loss_is_the_cross_entropy_of_each_version(augment_type: str, classes: int, level: str) -> None:
    detector = build(augment_type=augment_type, level=level)
    plan = detector.begin_training(4)
    draws = [7, 3, 11, 20]
    loss = float(loss_of(detector, Batch(IMAGES[:4], KEYS[:4], epoch=2, draws=draws)).detach())
    made = [detector._versions(IMAGES[i], keyed_generator(0, "paste", KEYS[i], 2, draws[i])) for i in range(4)]
    size = 64 if level == "image" else 32
    assert all(len(versions) == classes and versions[0].shape == (3, size, size) for versions in made)
    assert isinstance(plan.module, nn.ModuleDict)
    images = torch.stack([made[i][number] for number in range(classes) for i in range(4)]) * 255
    with torch.no_grad():
        logits = plan.module["head"](plan.module["backbone"](images)[0].mean((2, 3))).double().numpy()
    assert logits.shape == (4 * classes, classes)
    picked = [logits[number * 4 + i, number] for number in range(classes) for i in range(4)]
    want = np.mean(np.log(np.exp(logits).sum(1)) - picked)
    assert loss == pytest.approx(want, rel=1e-4)


def test_every_draw_pastes_otherwise_and_the_order_of_a_batch_does_not_matter() -> None:
    detector = build()
    detector.begin_training(3)
    draws = [0, 1, 2]
    one = loss_of(detector, Batch(IMAGES[:3], KEYS[:3], draws=draws)).detach()
    turned = loss_of(detector, Batch(IMAGES[:3].flip(0), KEYS[:3][::-1], draws=draws[::-1])).detach()
    torch.testing.assert_close(one, turned, rtol=1e-5, atol=0)
    versions = [detector._versions(IMAGES[0], keyed_generator(0, "paste", "a", 0, draw)) for draw in range(5)]
    for number in range(3):
        assert len({version[number].numpy().tobytes() for version in versions}) == 5


def test_an_epoch_is_a_number_of_steps_that_draw_every_image_equally_often() -> None:
    detector = build(batch_size=14, steps_per_epoch=23)  # 4 images in 3 versions
    plan = detector.begin_training(10)
    assert plan.batches is not None
    batches = plan.batches(dict.fromkeys(KEYS, KNOWN), 0)
    assert [len(batch) for batch in batches] == [4] * 23
    assert set(Counter(key for batch in batches for key in batch).values()) == {9, 10}
    assert plan.batches(dict.fromkeys(KEYS[::-1], KNOWN), 0) == batches != plan.batches(dict.fromkeys(KEYS, KNOWN), 1)
    rates = [plan.rate(done) for done in (0, 2.5, 5)]
    assert rates == pytest.approx([1.0, 0.5, 0.0])


def test_pretrained_and_weights_agree_or_are_refused() -> None:
    def words(**params: object) -> tuple[bool, str]:
        found = build_detector("cutpaste", params).params
        assert isinstance(found, CutPaste.Params)
        return found.pretrained, found.weights

    assert words() == (True, "imagenet") and words(weights="a.pth", pretrained=True) == (True, "a.pth")
    assert words(pretrained=False) == words(weights="random") == (False, "random")
    assert words(pretrained=False, weights="random") == (False, "random")  # as a record has it
    for wrong in ({"pretrained": True, "weights": "random"}, {"pretrained": False, "weights": "a.pth"}):
        with pytest.raises(SpecError, match=r"contradicts weights: \S+; remove one of them"):
            words(**wrong)
    with pytest.raises(SpecError, match="scar_width_px: needs 0 < low <= high"):
        words(scar_width_px=[3, 2])
    random, again = build(), build()
    assert random._start is not None and again._start is not None and random._start.digest() == again._start.digest()


def test_training_starts_from_the_loaded_weights_and_saves_no_head(tmp_path: Path) -> None:
    source = Backbone("resnet18", ("layer2",), 99)
    torch.save(source.trunk.state_dict(), tmp_path / "weights.pth")
    detector = build_detector("cutpaste", {"weights": str(tmp_path / "weights.pth")}, preset="smoke")
    assert isinstance(detector, CutPaste)
    message = detector.load_weights()
    assert source.digest() in message
    plan = detector.begin_training(10)
    loss = loss_of(detector, Batch(IMAGES, KEYS))
    loss.backward()
    plan.optimizer.step()
    backbone = detector.networks["backbone"]
    assert isinstance(backbone, Backbone) and backbone.digest() != source.digest()
    detector.begin_training(10)
    again = detector.networks["backbone"]
    assert isinstance(again, Backbone) and again.digest() == source.digest()
    assert {name.partition(".")[0] for name in fitted().tensors()} == {"backbone", "gaussian"}


def test_it_learns_to_locate_the_broken_bottles_by_its_steps(real_data: Path) -> None:
    """The paper's settings from scratch but for image size, trunk and steps; every second test image.

    Image scores prove no training here: the Gaussian on the features of a network that was not trained finds nearly all
    broken bottles.
    """
    words = {"weights": "random", "last_layer": "layer3", "image_size": [72, 72]}
    detector = build_detector("cutpaste", {**words, "epochs": 2, "steps_per_epoch": 15})
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 72))
    assert gain.losses[-1] < 0.95 * gain.losses[0] and gain.after[0] >= 0.85
    assert gain.after[1] >= gain.before[1] + 0.15 and gain.after[1] >= 0.65
