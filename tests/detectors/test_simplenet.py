"""SimpleNet against slow float64 code and its formulas."""

from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.simplenet import SimpleNet, truncated_l1
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.builders.training import loss_of
from tests.contracts.cases import as_batch
from tests.reference.embedding import resized

SIGMA, MARGIN, LEAK, EPS = 0.05, 0.5, 0.2, 1e-5
KEYS = ["a", "b", "c"]
IMAGES = as_batch([normal_image(i, 64) for i in range(3)])


def build(**params: object) -> SimpleNet:
    words = {"weights": "random", "image_size": [64, 64], "noise_sigma": SIGMA, **params}
    detector = build_detector("simplenet", words, preset="smoke")
    assert isinstance(detector, SimpleNet)
    detector.load_weights()
    return detector


def values(detector: SimpleNet) -> dict[str, np.ndarray]:
    """Parameters and buffers of the trained networks in float64."""
    return {
        f"{name}.{key}": value.detach().double().numpy().copy()
        for name in ("adaptor", "discriminator")
        for key, value in detector.networks[name].state_dict().items()
    }


def by_hand(adapted_ND: np.ndarray, v: dict[str, np.ndarray], mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """The discriminator with the given statistics of its batch norm."""
    hidden = adapted_ND @ v["discriminator.0.weight"].T + v["discriminator.0.bias"]
    normed = (hidden - mean) / np.sqrt(variance + EPS) * v["discriminator.1.weight"] + v["discriminator.1.bias"]
    return np.where(normed > 0, normed, LEAK * normed) @ v["discriminator.3.weight"][0]


def test_the_loss_is_the_papers_on_one_batch_of_normal_and_noisy_features() -> None:
    detector = build()
    detector.begin_training(3)
    v = values(detector)
    loss = float(loss_of(detector, Batch(IMAGES, KEYS, epoch=4)).detach())
    with torch.no_grad():
        embeddings = detector._embed(IMAGES)
    noise = np.stack([detector.prepare_image(IMAGES[0], key, 4, 0)[0].double().numpy() for key in KEYS])
    assert noise.shape == embeddings.shape
    adapted = embeddings.flatten(0, 2).double().numpy() @ v["adaptor.weight"].T
    both = np.concatenate([adapted, adapted + noise.reshape(adapted.shape)])
    hidden = both @ v["discriminator.0.weight"].T + v["discriminator.0.bias"]
    message = by_hand(both, v, hidden.mean(0), hidden.var(0))
    normal, noisy = np.split(message, 2)
    want = np.mean([max(0.0, MARGIN - x) for x in normal]) + np.mean([max(0.0, MARGIN + x) for x in noisy])
    assert abs(loss - want) < 1e-4 * want
    assert float(truncated_l1(torch.tensor([0.5, 9.0]), torch.tensor([-0.5, -9.0]), MARGIN)) == 0.0
    assert abs(float(truncated_l1(torch.tensor([0.2, 0.5]), torch.tensor([-0.1, -0.5]), MARGIN)) - 0.35) < 1e-6


def test_noise_belongs_to_image_and_epoch_and_has_its_sigma() -> None:
    detector = build()
    detector.begin_training(3)

    def noise_of(key: str, epoch: int) -> torch.Tensor:
        return detector.prepare_image(IMAGES[0], key, epoch, 0)[0]

    noise = noise_of("a", 0)
    assert abs(float(noise.std()) / SIGMA - 1) < 0.02 and abs(float(noise.mean())) < 4 * SIGMA / noise.numel() ** 0.5
    assert torch.equal(noise, noise_of("a", 0))
    others = [noise_of("b", 0), noise_of("a", 1)]
    assert all(abs(float((noise * other).mean())) < 0.03 * SIGMA**2 for other in others)
    loss = loss_of(detector, Batch(IMAGES, KEYS))
    turned = loss_of(detector, Batch(IMAGES.flip(0), KEYS[::-1]))
    torch.testing.assert_close(loss, turned, rtol=1e-5, atol=0)


def test_the_score_is_what_the_discriminator_denies() -> None:
    detector = build()
    plan = detector.begin_training(3)
    backbone = detector.networks["backbone"].digest()
    assert [group["lr"] for group in plan.optimizer.param_groups] == [2.5e-3, 5e-3]
    for epoch in range(10):
        plan.optimizer.zero_grad()
        loss_of(detector, Batch(IMAGES, KEYS, epoch=epoch)).backward()
        plan.optimizer.step()
    detector.end_training()
    assert detector.networks["backbone"].digest() == backbone
    v = values(detector)
    images = as_batch([normal_image(7, 64), defect_image(3, "spot", 64)[0]])
    with torch.inference_mode():
        embeddings = detector._embed(images)
    adapted = embeddings.double().numpy() @ v["adaptor.weight"].T
    want = -by_hand(adapted, v, v["discriminator.1.running_mean"], v["discriminator.1.running_var"])
    scores = detector.score(images)
    np.testing.assert_allclose(scores.image_score_B.numpy(), want.max((1, 2)), rtol=1e-4, atol=1e-5)
    wide = resized(resized(want, 1, 64), 2, 64)
    smoothed = np.stack([gaussian_filter(one, 4.0, mode="reflect") for one in wide])
    np.testing.assert_allclose(scores.anomaly_map_BHW.numpy(), smoothed, rtol=1e-3, atol=1e-4)


def test_it_finds_the_broken_bottles(real_data: Path, real_weights: Path) -> None:
    """The paper's settings but for backbone, widths, image size and epochs; every third test image."""
    params = {"backbone": "resnet18", "weights": str(real_weights), "image_size": [96, 96], "embedding_dims": None}
    detector = build_detector("simplenet", {**params, "epochs": 4})
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 96, 1, 3))
    assert gain.at_least(image=0.3, pixel=0.3)
    assert gain.losses[-1] < 0.92 * gain.losses[0]
    assert gain.reaches(image=0.97, pixel=0.93)
