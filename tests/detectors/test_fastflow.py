"""FastFlow against autograd's Jacobian, convolutions written as loops, and closed forms; on real images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.fastflow import FastFlow, LevelFlow
from raydetect.errors import SpecError
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch

SMALL = {
    "weights": "random",
    "backbone": "resnet18",
    "layers": ["layer1", "layer2"],
    "image_size": [32, 32],
    "n_flow_steps": 2,
    "learning_rate": 0.01,
}


def built(**params: object) -> FastFlow:
    detector = build_detector("fastflow", {**SMALL, **params})
    assert isinstance(detector, FastFlow)
    detector.load_weights()
    return detector


def level_flows(detector: FastFlow, shift: float = 0.0) -> list[LevelFlow]:
    """The flows of all levels, moved away from where they begin."""
    flows = detector.networks["flows"]
    with torch.no_grad():
        for number, value in enumerate(flows.parameters()):
            value += shift * torch.randn(value.shape, generator=keyed_generator(number))
    assert isinstance(flows, nn.ModuleList)
    return [flow for flow in flows if isinstance(flow, LevelFlow)]


def test_the_log_determinant_is_that_of_autograds_jacobian_norm_scale_included() -> None:
    torch.manual_seed(0)
    shape = (4, 3, 2)
    flow = LevelFlow(shape, built(n_flow_steps=4)._flow(0, 4)).double()
    with torch.no_grad():
        for value in flow.parameters():
            value += 0.4 * torch.randn_like(value)
    features = torch.randn(2, *shape, dtype=torch.float64)
    log_det = flow(features)[1]
    for i in range(2):
        normed = F.layer_norm(features[i : i + 1], shape).flatten()

        def after_norm(x: Tensor) -> Tensor:
            scaled = x.view(1, *shape) * flow.norm.weight + flow.norm.bias
            return flow.flow(scaled)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(after_norm, normed)
        assert log_det[i].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-6)
        torch.testing.assert_close(after_norm(normed), flow(features[i : i + 1])[0].flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("only", "sizes"), [(False, [3, 1, 3, 1, 3]), (True, [3] * 5)])
def test_kernels_alternate_or_are_all_3x3_and_hidden_layers_have_their_width(only: bool, sizes: list[int]) -> None:
    flow = built(n_flow_steps=5, conv3x3_only=only, hidden_ratio=0.5)._flow(0, 12)
    convolutions = [part for part in flow.modules() if isinstance(part, nn.Conv2d)]
    assert [part.kernel_size[0] for part in convolutions[::2]] == sizes
    assert all((a.in_channels, a.out_channels) == (6, 3) for a in convolutions[::2])
    assert all((b.in_channels, b.out_channels) == (3, 12) for b in convolutions[1::2])


def test_the_loss_is_the_negative_log_likelihood_without_its_constant_and_falls() -> None:
    detector = built()
    plan = detector.begin_training(6)
    batch = Batch(as_batch([normal_image(i, 32) for i in range(6)]), [str(i) for i in range(6)])
    flows = level_flows(detector)
    expected = 0.0
    for flow, level in zip(flows, detector.networks["backbone"](batch.images_BCHW), strict=True):
        z, log_det = flow(level.contiguous())
        density = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) + log_det
        expected -= (density + 0.5 * np.log(2 * np.pi) * z[0].numel()).mean().item()
    losses = []
    for _ in range(25):
        loss = detector.training_loss(batch)
        plan.optimizer.zero_grad()
        loss.backward()
        plan.optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]


def test_shrinking_all_features_costs_what_it_gains() -> None:
    """Where the norm's scale is left out of the determinant, the loss falls by making it zero."""
    detector = built()
    detector.begin_training(4)
    batch = Batch(as_batch([normal_image(i, 32) for i in range(4)]), [str(i) for i in range(4)])
    before = detector.training_loss(batch).item()
    with torch.no_grad():
        for flow in level_flows(detector):
            flow.norm.weight *= 1e-3
    assert detector.training_loss(batch).item() > before


def test_the_map_orders_pixels_as_the_mean_likelihood_and_the_score_is_its_maximum() -> None:
    detector = built()
    detector.begin_training(4)
    flows = level_flows(detector, 0.05)
    detector.end_training()
    images = as_batch([defect_image(1, "blob", 32)[0], normal_image(90, 32)])
    scores = detector.score(images)
    mean = torch.zeros(2, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        for flow, level in zip(flows, detector.networks["backbone"](images), strict=True):
            likelihood = torch.exp(-0.5 * flow(level.contiguous())[0].double().square().mean(1))
            mean += F.interpolate(likelihood[:, None], (32, 32), mode="bilinear")[:, 0] / 2
    np.testing.assert_allclose(scores.anomaly_map_BHW.numpy(), -mean.log().numpy(), rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.image_score_B, scores.anomaly_map_BHW.flatten(1).amax(1))
    order = scores.anomaly_map_BHW.flatten().argsort()
    reference = (-mean).flatten()[order]
    assert (reference.diff() >= -1e-6).all()


def test_images_of_another_size_are_refused_by_both_sizes() -> None:
    detector = built()
    detector.begin_training(4)
    detector.end_training()
    with pytest.raises(SpecError, match=r"\(32, 32\) px, given \(48, 32\)"):
        detector.score(torch.zeros(1, 3, 48, 32, dtype=torch.uint8))


def test_it_finds_the_broken_bottles(real_data: Path, real_weights: Path) -> None:
    """The paper's settings but for backbone, image size, steps of the flow and epochs.

    Every second training and every third test image.
    """
    params = {"backbone": "resnet18", "weights": str(real_weights), "layers": ["layer2", "layer3"]}
    detector = build_detector("fastflow", {**params, "image_size": [96, 96], "epochs": 6, "batch_size": 16})
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 96, 2, 3))
    assert gain.at_least(image=0.3, pixel=0.3)
    assert gain.losses[-1] < gain.losses[0] - 0.5 * abs(gain.losses[0])
    assert gain.reaches(image=0.9, pixel=0.9)
