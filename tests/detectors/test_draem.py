"""DRAEM against closed forms: its loss, its simulated defects, its networks' sizes and its score."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from raydetect.blocks.augment.synthesis import perlin_mask
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors import draem
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.draem import DRAEM, ReconstructionNet, SegmentationNet
from raydetect.errors import ArtifactError
from tests.builders.archives import pack
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, encode, normal_image
from tests.builders.training import loss_of
from tests.contracts.cases import as_batch
from tests.reference import images as plain

SMALL = {"image_size": [64, 64], "base_width": 4, "learning_rate": 3e-3, "epochs": 10}


def started(**params: object) -> DRAEM:
    detector = build_detector("draem", {**SMALL, **params})
    assert isinstance(detector, DRAEM)
    detector.load_weights()
    return detector


def step(detector: DRAEM, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    loss = loss_of(detector, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def normal_batch(count: int = 8, epoch: int = 0) -> Batch:
    return Batch(as_batch([normal_image(i, 64) for i in range(count)]), [str(i) for i in range(count)], epoch=epoch)


def test_the_networks_are_as_large_as_the_authors() -> None:

    def block(widths: list[int]) -> int:
        return sum(9 * a * b + b + 2 * b for a, b in pairwise(widths))

    w, v = 128, 64
    down = block([3, w, w]) + block([w, 2 * w, 2 * w]) + block([2 * w, 4 * w, 4 * w]) + block([4 * w, 8 * w, 8 * w])
    up = sum(block([a, a, a, b]) for a, b in ((8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w), (w, w)))
    repairing = down + block([8 * w, 8 * w, 8 * w]) + up + 9 * w * 3 + 3
    down = block([6, v, v]) + block([v, 2 * v, 2 * v]) + block([2 * v, 4 * v, 4 * v]) + block([4 * v, 8 * v, 8 * v])
    steps = ((8, 8, 8), (8, 4, 8), (4, 2, 4), (2, 1, 2), (1, 1, 1))  # from, to, skip
    up = sum(block([a * v, b * v]) + block([(b + c) * v, b * v, b * v]) for a, b, c in steps)
    finding = down + 2 * block([8 * v, 8 * v, 8 * v]) + up + 9 * v * 2 + 2
    counts = [sum(p.numel() for p in net.parameters()) for net in (ReconstructionNet(w), SegmentationNet(v))]
    assert counts == [repairing, finding] == [69_048_579, 28_374_146]


def test_the_loss_is_the_sum_of_its_three_parts_and_falls() -> None:
    detector = started(anomalous_ratio=1.0, ssim_weight=0.7)
    plan = detector.begin_training(8)
    losses = [step(detector, plan.optimizer, normal_batch(epoch=epoch)) for epoch in range(25)]
    assert np.mean(losses[-3:]) < 0.6 * losses[0]
    detector.end_training()
    batch = normal_batch(2, epoch=3)
    found = loss_of(detector, batch).item()
    parts = []
    for image, key in zip(batch.images_BCHW.float() / 255, batch.keys, strict=True):
        truth, damaged, mask = detector._simulated(image, keyed_generator(detector.seed, "draem", key, 3))
        with torch.inference_mode():
            repaired, anomalous = (x[0].numpy() for x in detector._forward(damaged[None]))
        alike = np.mean([plain.ssim_map(a, b) for a, b in zip(repaired, truth.numpy(), strict=True)])
        l2 = np.mean((repaired - truth.numpy()) ** 2)
        parts.append(l2 + 0.7 * (1 - alike) + plain.focal_loss(anomalous.astype(np.float64), mask.numpy(), 2.0))
    assert found == pytest.approx(np.mean(parts), rel=2e-3)


def test_defects_follow_their_words_and_fill_their_masks() -> None:
    detector = started(anomalous_ratio=1.0, turned_ratio=0.0)
    image, filled = torch.from_numpy(normal_image(1, 64)).permute(2, 0, 1).float() / 255, 0
    for i in range(12):
        truth, damaged, mask = detector._simulated(image, keyed_generator(0, "draem", str(i)))
        again = detector._simulated(image, keyed_generator(0, "draem", str(i)))
        assert torch.equal(damaged, again[1]) and torch.equal(truth, image)
        difference = (damaged - image).abs().amax(0)
        assert (difference[mask == 0] == 0).all()
        filled += int(mask.sum() > 0 and (difference > 0.01).sum() > 0.6 * mask.sum())
    assert filled >= 6


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_the_stated_shares_are_damaged_and_turned(ratio: float) -> None:
    detector = started(anomalous_ratio=ratio, turned_ratio=1 - ratio)
    image = torch.rand(3, 32, 32, generator=keyed_generator(0, "i"))
    made = [detector._simulated(image, keyed_generator(0, "share", i)) for i in range(200)]
    rotated = np.mean([not torch.equal(truth, image) for truth, _, _ in made])
    damaged = np.mean([not torch.equal(bad, truth) for truth, bad, _ in made])
    shown = np.mean([bool(perlin_mask((32, 32), keyed_generator(0, "shown", i)).any()) for i in range(200)])
    assert rotated == pytest.approx(1 - ratio, abs=0.1)
    assert damaged == pytest.approx(ratio * shown, abs=0.1)  # a mask may be empty


def test_given_textures_are_what_defects_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    pack("memory://textures/red", "", [("red.png", encode(red))], 1)
    detector = build_detector(
        "draem", {**SMALL, "textures": "memory://textures/red", "turned_ratio": 0, "anomalous_ratio": 1}
    )
    assert isinstance(detector, DRAEM)
    assert detector.load_weights().startswith("from scratch, 1 textures of memory://textures/red sha256:")
    monkeypatch.setattr(draem, "varied", lambda texture, _: texture)
    grey, opacities = torch.full((3, 64, 64), 0.5), []
    for i in range(40):
        _, damaged, mask = detector._simulated(grey, keyed_generator(0, "red", i))
        red, green, blue = damaged[:, mask > 0]
        assert torch.equal(green, blue) and torch.allclose(red - 0.5, 0.5 - green, atol=1e-6)
        opacities += (2 * red - 1)[:1].tolist()
    assert len(opacities) > 20 and 0.1 <= min(opacities) < 0.35 and 0.75 < max(opacities) <= 1
    with pytest.raises(ArtifactError, match="textures"):
        started(textures="memory://textures/none")


@pytest.mark.parametrize(("params", "side"), [({}, 21), ({"smoothing_px": 5}, 5)])
def test_the_score_is_the_largest_mean_of_the_map(params: dict[str, int], side: int) -> None:
    detector = started(**params)
    plan = detector.begin_training(8)
    for epoch in range(3):
        step(detector, plan.optimizer, normal_batch(epoch=epoch))
    detector.end_training()
    images = as_batch([normal_image(77, 64), defect_image(3, "spot", 64)[0]])
    scores = detector.score(images)
    with torch.inference_mode():
        repaired = detector.networks["reconstruction"](images.float() / 255)
        logits = detector.networks["segmentation"](torch.cat([repaired, images.float() / 255], 1)).double()
    expected = torch.softmax(logits, 1)[:, 1].numpy()
    np.testing.assert_allclose(scores.anomaly_map_BHW.numpy(), expected, atol=1e-5)
    means = [uniform_filter(one, side, mode="constant").max() for one in expected]
    np.testing.assert_allclose(scores.image_score_B.numpy(), means, atol=1e-5)


def test_any_size_is_scored_as_if_its_last_row_and_column_went_on() -> None:
    detector = started()
    detector.begin_training(8)
    detector.end_training()
    image = as_batch([normal_image(5, 64)])[:, :, :50, :41]
    wide = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, 14), (0, 23)), mode="edge"))
    found, expected = detector.score(image).anomaly_map_BHW, detector.score(wide).anomaly_map_BHW[:, :50, :41]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_rate_falls_to_a_tenth_after_400_and_600_of_700_epochs() -> None:
    plan = build_detector("draem", {**SMALL, "epochs": 700}).begin_training(8)
    rates = [plan.rate(epoch) for epoch in (0, 399.9, 400, 599.9, 600, 699)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert all(group["lr"] == SMALL["learning_rate"] for group in plan.optimizer.param_groups)


def test_it_finds_the_broken_bottles_and_did_not_before_its_steps(real_data: Path) -> None:
    """A narrow network at 64 px, 6 epochs of 700 at ten times the rate; every second test image."""
    params: dict[str, Any] = {"base_width": 16, "epochs": 6, "learning_rate": 1e-3}
    detector = build_detector("draem", {"image_size": [64, 64], **params})
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 64))
    assert gain.at_least(image=0.3, pixel=0.3)
    assert gain.reaches(image=0.8, pixel=0.8)
