"""STFPM against closed forms."""

from pathlib import Path

import numpy as np
import torch

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.stfpm import STFPM, level_error
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch


def test_the_error_is_one_minus_the_cosine() -> None:
    a, b = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1)
    np.testing.assert_allclose(level_error(a, b).numpy(), (1 - cosine).numpy(), atol=1e-6)
    assert level_error(a, 5 * a).abs().max() < 1e-6


def trained(steps: int) -> tuple[STFPM, list[float]]:
    detector = build_detector("stfpm", {"weights": "random", "image_size": [64, 64], "batch_size": 8})
    assert isinstance(detector, STFPM)
    detector.load_weights()
    plan = detector.begin_training(8)
    batch = Batch(as_batch([normal_image(i, 64) for i in range(8)]), [str(i) for i in range(8)])
    losses = []
    for _ in range(steps):
        loss = detector.training_loss(batch)
        plan.optimizer.zero_grad()
        loss.backward()
        plan.optimizer.step()
        losses.append(loss.item())
    detector.end_training()
    return detector, losses


def test_the_loss_falls_and_the_teacher_stays() -> None:
    detector, losses = trained(20)
    assert losses[-1] < 0.6 * losses[0]
    fresh = build_detector("stfpm", {"weights": "random"})
    assert isinstance(fresh, STFPM)
    fresh.load_weights()
    teacher, again = detector.networks["teacher"], fresh.networks["teacher"]
    assert isinstance(teacher, Backbone) and isinstance(again, Backbone)
    assert teacher.digest() == again.digest()


def test_the_map_is_the_product_of_the_levels_and_the_score_its_maximum() -> None:
    detector, _ = trained(6)
    images = as_batch([normal_image(77, 64), defect_image(3, "spot", 64)[0]])
    scores = detector.score(images)
    with torch.inference_mode():
        pairs = zip(detector.networks["teacher"](images), detector.networks["student"](images), strict=True)
        maps = [1 - torch.nn.functional.cosine_similarity(t, s, dim=1) for t, s in pairs]
    product = torch.ones(2, 64, 64)
    for level in maps:
        product *= torch.nn.functional.interpolate(level[:, None], (64, 64), mode="bilinear")[:, 0]
    np.testing.assert_allclose(scores.anomaly_map_BHW.numpy(), product.numpy(), rtol=1e-3, atol=1e-7)
    assert torch.equal(scores.image_score_B, scores.anomaly_map_BHW.flatten(1).max(1).values)


def test_it_finds_the_broken_bottles_and_did_not_before_its_steps(real_data: Path, real_weights: Path) -> None:
    """The paper's settings but for image size, batches of 16 and 8 epochs of 100; every second test image."""
    params = {"weights": str(real_weights), "image_size": [64, 64], "batch_size": 16, "epochs": 8}
    detector = build_detector("stfpm", params)
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 64))
    assert gain.losses[-1] < 0.3 * gain.losses[0]
    assert gain.reaches(image=0.98, pixel=0.95)
    assert gain.at_least(image=0.2, pixel=0.3)
