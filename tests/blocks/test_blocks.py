"""Blocks against slow code, scipy and closed forms."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.backbones.patch_embeddings import patch_embeddings
from raydetect.blocks.maps.anomaly_map import negative_log_mean_likelihood, smooth, smooth_upsampled, upsample
from raydetect.blocks.seeding import SkipInitialisation, keyed_generator, keyed_unit, shuffled
from raydetect.errors import ArtifactError, SpecError
from tests.reference import embedding, reference


def features(count: int, dims: int, seed: int, clusters: int = 7) -> torch.Tensor:
    """Clustered, off-centre points, as features are."""
    random = np.random.default_rng(seed)
    centres = random.normal(3, 2, (clusters, dims)) * np.linspace(2, 0.05, dims)
    points = centres[random.integers(clusters, size=count)] + random.normal(0, 0.3, (count, dims))
    return torch.from_numpy(points.astype(np.float32))


def test_patch_embeddings_are_local_means_on_one_grid() -> None:
    random = np.random.default_rng(0)
    levels = [random.normal(size=(2, 3, 6, 8)).astype(np.float32), random.normal(size=(2, 5, 3, 4)).astype(np.float32)]
    found = patch_embeddings([torch.from_numpy(level) for level in levels])
    np.testing.assert_allclose(found.numpy(), reference.patch_embeddings(levels), atol=1e-5)


@pytest.mark.parametrize("dims", [8, 45, 70])  # fewer than, as many as, and more than the numbers of a level
def test_patch_embeddings_of_given_dims_are_those_of_slow_code(dims: int) -> None:
    random = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 5, 6, 7, generator=random), torch.randn(2, 9, 3, 4, generator=random)]
    want = embedding.pooled_patch_embeddings([level.numpy() for level in levels], dims)
    np.testing.assert_allclose(patch_embeddings(levels, dims).numpy(), want, atol=1e-6)
    one = levels[:1]
    torch.testing.assert_close(patch_embeddings(one, 5), patch_embeddings(one))  # nine numbers a channel: means


@pytest.mark.parametrize("sigma", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(40, 56), (5, 9)])
def test_smoothing_is_scipys(sigma: float, shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    found = smooth(torch.from_numpy(picture)[None], sigma)[0].numpy()
    np.testing.assert_allclose(found, gaussian_filter(picture.astype(np.float64), sigma, mode="reflect"), atol=2e-5)


@pytest.mark.parametrize(("grid", "size_px"), [((8, 6), (64, 50)), ((1, 3), (7, 24)), ((9, 13), (9, 13))])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0])
def test_upsampling_and_smoothing_at_once_are_both_in_turn(
    grid: tuple[int, int], size_px: tuple[int, int], sigma: float
) -> None:
    coarse = torch.from_numpy(np.random.default_rng(2).normal(3, 1, (3, *grid)).astype(np.float32))
    found = smooth_upsampled(coarse, size_px, sigma)
    torch.testing.assert_close(found, smooth(upsample(coarse, size_px), sigma), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous() and found.shape == (3, *size_px)
    for i in range(3):
        assert torch.equal(smooth_upsampled(coarse.flip(0), size_px, sigma)[2 - i], found[i])


def test_upsampling_keeps_a_constant_and_smoothing_zero_changes_nothing() -> None:
    grid = torch.full((2, 3, 4), 1.5)
    torch.testing.assert_close(upsample(grid, (17, 9)), torch.full((2, 17, 9), 1.5))
    assert smooth(grid, 0.0) is grid


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_asking_for_widths_changes_nothing(name: str) -> None:
    backbone = Backbone(name, ("layer1", "layer3"), 3)
    next(part for part in backbone.modules() if isinstance(part, torch.nn.BatchNorm2d)).eval()
    modes, digest = [part.training for part in backbone.modules()], backbone.digest()
    assert backbone.widths() == [64, 256]
    assert [part.training for part in backbone.modules()] == modes and backbone.digest() == digest


def test_unlikely_is_minus_the_logarithm_of_the_mean_likelihood_far_beyond_float32() -> None:
    flat = negative_log_mean_likelihood([torch.full((2, 2, 3), -200.0), torch.full((2, 1, 1), -300.0)], (4, 6))
    np.testing.assert_allclose(flat.numpy(), np.full((2, 4, 6), 200 + np.log(2)), rtol=1e-6)
    levels = [torch.randn(2, 3, 4), torch.randn(2, 5, 2)]
    mean = sum(upsample(level.exp(), (7, 9)) for level in levels) / 2
    np.testing.assert_allclose(
        negative_log_mean_likelihood(levels, (7, 9)).numpy(), -np.log(mean.numpy()), rtol=1e-4, atol=1e-5
    )
    assert torch.isfinite(negative_log_mean_likelihood([torch.full((1, 2, 2), -1e4)], (4, 4))).all()


def test_a_frozen_backbone_gives_the_features_of_the_plain_one() -> None:
    backbone = Backbone("resnet18", ("layer1", "layer3"), 3).eval()
    generator = keyed_generator(0, "statistics")
    for name, value in backbone.trunk.state_dict().items():  # batch norms that do something
        if "running_mean" in name or name.endswith("bias"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        if "running_var" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        plain, frozen = backbone(images), backbone.freeze()(images)
    assert [tuple(level.shape) for level in plain] == [(2, 64, 16, 24), (2, 256, 4, 6)]
    for a, b in zip(plain, frozen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["timm/resnet18", "resnet10t"])
def test_timm_backbones_work(name: str) -> None:
    backbone = Backbone(name, ("layer2", "layer3"), 0).freeze()
    with torch.inference_mode():
        levels = backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert [level.shape[-1] for level in levels] == [8, 4]


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t"])
def test_a_backbone_tells_its_shapes_and_passes_gradients_to_normalised_images(name: str) -> None:
    backbone = Backbone(name, ("layer1", "layer2"), 0).freeze()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=generator)
    levels = backbone(images)
    assert [tuple(level.shape[1:]) for level in levels] == backbone.shapes((40, 56))
    for level, again in zip(levels, backbone.features(backbone.normalised(images)), strict=True):
        torch.testing.assert_close(again, level)
    double = backbone.double()
    normal = double.normalised(images).double().requires_grad_()
    (gradient,) = torch.autograd.grad(double.features(normal)[1].square().sum(), normal)
    nudge = 1e-8 * torch.randn(normal.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():  # in float64 a step is small enough to cross no corner of a ReLU
        ends = [double.features(normal + sign * nudge)[1].square().sum() for sign in (1, -1)]
    assert float((gradient * nudge).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-5)


def test_backbone_weights_are_keyed_checked_and_named() -> None:
    backbone = Backbone("resnet18", ("layer1",), 0)
    assert backbone.digest() == Backbone("resnet18", ("layer1",), 0).digest()
    assert backbone.digest() != Backbone("resnet18", ("layer1",), 1).digest()
    weights = backbone.weights()
    assert not any(name.startswith("layer2") for name in weights)
    with pytest.raises(ArtifactError, match=r"no tensor 'conv1\.weight'"):
        backbone.load({k: v for k, v in weights.items() if k != "conv1.weight"}, "file")
    with pytest.raises(ArtifactError, match=r"has shape \(1,\)"):
        backbone.load({**weights, "conv1.weight": torch.zeros(1)}, "file")


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "mobilenet_v3_small"])
def test_what_is_built_to_be_loaded_draws_nothing_and_is_whole_once_loaded(name: str) -> None:
    layers = ("features.1",) if name.startswith("mobile") else ("layer1", "layer2")
    drawn, before = Backbone(name, layers, 3), torch.random.get_rng_state()
    with SkipInitialisation():
        built = Backbone(name, layers, 4)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.randn(2)
    assert not torch.equal(torch.random.get_rng_state(), before)  # only networks go without
    built.load(drawn.weights(), "the test")
    state, expected = built.state_dict(), drawn.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_an_unknown_backbone_or_layer_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="resnet18"):
        Backbone("resnet81", ("layer1",), 0)
    with pytest.raises(SpecError, match="layer3"):
        Backbone("resnet18", ("layer33",), 0)
    with pytest.raises(SpecError, match="layer3"):
        Backbone("timm/resnet18", ("layer33",), 0)


def test_randomness_is_keyed_by_words_alone() -> None:
    keys = [f"k{i}" for i in range(50)]
    assert shuffled(keys, 0, 1) == shuffled(keys[::-1], 0, 1) != shuffled(keys, 0, 2)
    units = [keyed_unit(0, "holdout", key) for key in map(str, range(4000))]
    assert min(units) >= 0.0 and max(units) < 1.0 and abs(np.mean(units) - 0.5) < 0.02
