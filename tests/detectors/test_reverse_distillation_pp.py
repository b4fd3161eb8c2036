"""RD++ and Reverse Distillation against loops, the formulas of their papers and code, and on real images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.networks.reverse_resnet import RESNETS, Decoder, OneClassEmbedding, resnet_plan
from raydetect.blocks.networks.sinkhorn import sinkhorn_divergence
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors import reverse_distillation_pp as module
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector, detector_class
from raydetect.detectors.reverse_distillation_pp import Projectors, ReverseDistillationPP
from raydetect.errors import SpecError
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.builders.training import loss_of, prepared
from tests.contracts.cases import as_batch

KEYS = ["a", "b", "c", "d"]
SSOT = {"ssot_weight": 1.0}


def built(**params: Any) -> ReverseDistillationPP:
    small = {"weights": "random", "backbone": "resnet18", "image_size": [64, 64]}
    detector = build_detector("reverse_distillation_pp", {**small, **params})
    assert isinstance(detector, ReverseDistillationPP)
    detector.load_weights()
    if detector.phases[0] == "collect":
        state = FitState()
        with torch.inference_mode():
            state.add(KEYS, detector.collect(batch()))
        detector.finish(state, lambda *_: None)
    return detector


def batch(epoch: int = 0) -> Batch:
    return Batch(as_batch([normal_image(i, 64) for i in range(4)]), KEYS, None, epoch, range(4))


def pyramid(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(3, width, side, side) for width, side in ((4, 8), (6, 4), (8, 2))]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_published_defaults() -> None:
    params = detector_class("reverse_distillation_pp").Params()
    assert isinstance(params, ReverseDistillationPP.Params)
    assert params.backbone == "wide_resnet50_2" and params.image_size == (256, 256) and params.projector
    assert (params.learning_rate, params.projector_learning_rate) == (5e-3, 1e-3)
    assert (params.batch_size, params.epochs) == (2 * 16, 200)
    assert (params.projector_weight, params.noise_strength, params.smoothing_sigma) == (0.2, 0.2, 4.0)
    assert params.ssot_weight == 0  # as its gradient in the authors' code
    assert (module.RECONSTRUCTION_WEIGHT, module.CONTRAST_WEIGHT, module.CONTRAST_MARGIN) == (0.01, 0.1, 0.5)


def test_projectors_learn_at_a_rate_of_their_own_and_the_teacher_not_at_all() -> None:
    detector = built()
    before = detector._teacher.digest()
    plan = detector.begin_training(4)
    rates = {id(p): group["lr"] for group in plan.optimizer.param_groups for p in group["params"]}
    for name, rate in (("projector", 1e-3), ("embedding", 5e-3), ("decoder", 5e-3)):
        assert {rates.pop(id(p)) for p in detector.networks[name].parameters()} == {rate}
    assert not rates and plan.optimizer.defaults["betas"] == (0.5, 0.999)
    loss_of(detector, batch()).backward()
    assert all(p.grad is not None for p in plan.module.parameters())
    plan.optimizer.step()
    assert detector._teacher.digest() == before


def test_losses_are_those_of_loops_over_images_levels_and_positions() -> None:
    first, second = pyramid(0), pyramid(1)
    shared = [a + 0.5 * b for a, b in zip(first, second, strict=True)]  # some cosines above the margin
    pairs = list(zip(first, shared, strict=True))
    whole = [[cosine(a[i].numpy(), b[i].numpy()) for i in range(3)] for a, b in pairs]
    assert float(module.distillation_loss(first, shared)) == pytest.approx(
        sum(1 - np.mean(values) for values in whole), abs=1e-5
    )
    assert float(module.contrast_loss(first, shared)) == pytest.approx(
        sum(np.mean([max(0.0, value - 0.5) for value in values]) for values in whole), abs=1e-5
    )
    at = [
        [cosine(a[i, :, y, x].numpy(), b[i, :, y, x].numpy()) for i, y, x in np.ndindex(3, *a.shape[2:])]
        for a, b in pairs
    ]
    assert float(module.reconstruction_loss(first, shared)) == pytest.approx(
        sum(1 - np.mean(values) for values in at), abs=1e-5
    )


@pytest.mark.parametrize("params", [{}, {"projector": False}], ids=["rd++", "rd"])
def test_the_loss_is_put_together_as_published(params: dict[str, Any]) -> None:
    detector = built(**params)
    detector.begin_training(4)
    found = loss_of(detector, batch())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = batch().images_BCHW / 255
    trunk = detector._teacher.trunk
    levels = list(trunk((pixels - mean) / std).values())
    networks, extra = detector.networks, torch.zeros(())
    projected = levels
    if not params:
        noise = [module.noise_patch((64, 64), keyed_generator(0, "simplex", k, 0, i)) for i, k in enumerate(KEYS)]
        noised = list(trunk((pixels + 0.2 * torch.stack(noise) - mean) / std).values())
        projected, repaired = networks["projector"](levels), networks["projector"](noised)
        target = -torch.ones(4)
        for e, p, q in zip(noised, projected, repaired, strict=True):
            extra = extra + 0.01 * (1 - F.cosine_similarity(q, p)).mean()
            extra = extra + 0.1 * F.cosine_embedding_loss(e.flatten(1), p.flatten(1), target, margin=0.5)
    rebuilt = networks["decoder"](networks["embedding"](projected))
    expected = 0.2 * extra / 1.11
    for a, b in zip(levels, rebuilt, strict=True):
        expected = expected + (1 - F.cosine_similarity(a.flatten(1), b.flatten(1))).mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


@pytest.mark.parametrize("params", [{}, SSOT, {"projector": False}], ids=["rd++", "ssot", "rd"])
def test_an_images_loss_does_not_depend_on_the_others(params: dict[str, Any]) -> None:
    """So a batch may be split over workers; batch norms, which share statistics, are at rest here."""
    detector = built(**params)
    detector.begin_training(4).module.eval()
    whole = batch(epoch=2)
    singles = [Batch(whole.images_BCHW[i : i + 1], [KEYS[i]], None, 2, range(i, i + 1)) for i in range(len(whole.keys))]
    with torch.no_grad():
        together = float(loss_of(detector, whole))
        alone = float(torch.stack([loss_of(detector, one) for one in singles]).mean())
    assert together == pytest.approx(alone, abs=2e-5)


def test_partners_are_others_and_change_with_the_epoch() -> None:
    detector = built(**SSOT)
    assert detector.phases == ("collect", "train") and detector.num_collected() == 64
    images = dict(zip(KEYS, batch().images_BCHW, strict=True))
    partners: list[list[str]] = []
    for epoch in range(20):
        chosen = detector._partners(batch(epoch))
        partners.append([next(k for k, image in images.items() if torch.equal(image, c)) for c in chosen])
    assert all(k != p for row in partners for k, p in zip(KEYS, row, strict=True))
    assert {p for row in partners for p in row[:1]} == {"b", "c", "d"}


def test_optimal_transport_changes_the_training_but_not_between_a_batch_and_its_permutation() -> None:
    plain, with_it = built(), built(**SSOT)
    gradients = []
    for detector in (plain, with_it):
        detector.begin_training(4)
        loss_of(detector, batch()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in detector.networks["projector"].parameters()]))  # type: ignore[union-attr]
    assert (gradients[1] - gradients[0]).norm() > 0.1 * gradients[0].norm()

    features = torch.randn(1, 8, 500, generator=keyed_generator(0)).requires_grad_()
    images = features.softmax(2)  # as the authors' code: each image is one point
    loss = sinkhorn_divergence(images, images[:, torch.randperm(8, generator=keyed_generator(1))], 0.05, 2.0)
    loss.sum().backward()
    assert features.grad is not None and float(loss.detach()) < 1e-7 and features.grad.abs().max() < 1e-7


def test_noise_is_a_patch_of_the_published_size_and_keyed() -> None:
    heights, widths, spread = set(), set(), []
    for number in range(150):
        noise = module.noise_patch((256, 256), keyed_generator(number))
        rows, columns = (noise[0].abs().sum(dim).nonzero()[:, 0] for dim in (1, 0))
        heights.add(int(rows[-1] - rows[0]) + 1)
        widths.add(int(columns[-1] - columns[0]) + 1)
        spread.append(float(noise[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].std()))
    assert (min(heights), max(heights)) == (min(widths), max(widths)) == (10, 31)
    assert 0.15 < np.mean(spread) < 0.4
    detector = built()
    first, again, later = (prepared(detector, batch(epoch)).prepared[0] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert len({float(image.sum()) for image in first}) == 4


@pytest.mark.parametrize(
    ("name", "embedding", "decoder", "projector"),
    [
        ("resnet18", 11_680_000, 3_703_168, 968_688),
        ("wide_resnet50_2", 58_885_120, 24_917_504, 15_486_912),
    ],
)
def test_networks_have_the_parameters_of_the_authors_code(
    name: str, embedding: int, decoder: int, projector: int
) -> None:
    """Without two layers of its embedding that it never runs."""
    plan = resnet_plan(name)
    counts = [
        sum(p.numel() for p in network.parameters())
        for network in (OneClassEmbedding(plan), Decoder(plan), Projectors(plan.widths))
    ]
    assert counts == [embedding, decoder, projector]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2"])
def test_the_decoder_mirrors_every_resnet(name: str) -> None:
    with torch.device("meta"):
        plan = resnet_plan(name)
        assert name in RESNETS
        levels = [torch.zeros(2, c, side, side // 2) for c, side in zip(plan.widths, (16, 8, 4), strict=True)]
        code = OneClassEmbedding(plan)(levels)
        rebuilt = Decoder(plan)(code)
    assert code.shape == (2, 2 * plan.widths[2], 2, 1)
    assert [level.shape for level in rebuilt] == [level.shape for level in levels]
    assert plan.widths == Backbone(name, module.LAYERS, 0).widths()


def test_the_map_sums_the_levels_and_the_score_is_its_maximum() -> None:
    detector = built(smoothing_sigma=2.0)
    detector.begin_training(4)
    loss_of(detector, batch())
    detector.end_training()
    images = as_batch([normal_image(77, 64), defect_image(3, "spot", 64)[0]])
    scores = detector.score(images)
    networks = detector.networks
    with torch.no_grad():
        levels = networks["teacher"](images)
        rebuilt = networks["decoder"](networks["embedding"](networks["projector"](levels)))
    total = np.zeros((2, 64, 64))
    for a, b in zip(levels, rebuilt, strict=True):
        grid = 1 - (F.normalize(a.double(), dim=1) * F.normalize(b.double(), dim=1)).sum(1, keepdim=True)
        total += F.interpolate(grid, (64, 64), mode="bilinear")[:, 0].numpy()
    expected = np.stack([gaussian_filter(each, 2.0) for each in total])
    np.testing.assert_allclose(scores.anomaly_map_BHW.numpy(), expected, atol=1e-5)
    assert torch.equal(scores.image_score_B, scores.anomaly_map_BHW.flatten(1).amax(1))


def test_names_and_what_is_refused() -> None:
    assert detector_class("rd++") is detector_class("rdpp") is ReverseDistillationPP
    for name in ("reverse_distillation", "rd4ad", "rd"):
        with pytest.raises(SpecError, match=r"is reverse_distillation_pp with params \{projector: false"):
            detector_class(name)
    assert "projector" not in built(projector=False).make_networks()
    with pytest.raises(SpecError, match=r"backbone 'convnext_tiny' has no mirrored decoder\. Choose one of resnet18"):
        built(backbone="convnext_tiny")
    with pytest.raises(SpecError, match=r"48 x 64 px cannot be halved five times\. Resize it"):
        fitted = built()
        fitted.begin_training(4)
        fitted.end_training()
        fitted.score(torch.zeros(1, 3, 48, 64, dtype=torch.uint8))


@pytest.mark.parametrize("projector", [True, False], ids=["rd++", "rd"])
def test_it_finds_the_broken_bottles_and_did_not_before_its_steps(
    projector: bool, real_data: Path, real_weights: Path
) -> None:
    """Three epochs of 200, ResNet-18, 128 px; the Gaussian is as wide on the part as at 256 px."""
    params = {"backbone": "resnet18", "weights": str(real_weights), "image_size": [128, 128], "projector": projector}
    short = {"epochs": 3, "batch_size": 16, "smoothing_sigma": 2.0}
    detector = build_detector("reverse_distillation_pp", {**params, **short})
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 128, 1, 1))
    assert gain.losses[-1] < 0.4 * gain.losses[0]
    assert gain.reaches(image=0.98, pixel=0.95) and gain.at_least(image=0.3, pixel=0.3)
