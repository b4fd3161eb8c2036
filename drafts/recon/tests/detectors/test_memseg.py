"""MemSeg against slow code: memory, attention, fusion, loss, schedule, simulated defects."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from raydetect.blocks.fusion import CoordinateAttention, Memory, MultiScaleFusion
from raydetect.blocks.rows import FitState
from raydetect.blocks.seeding import keyed_generator
from raydetect.blocks.synthesis import foreground
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.memseg import MemSeg, warm_cosine
from raydetect.errors import ArtifactError, SpecError
from tests.contracts.cases import as_batch
from tests.made.images import defect_image, normal_image
from tests.plain import images as plain

SMALL = {"image_size": [64, 64], "weights": "random", "deepest_layer": None, "feature_dim": 32, "memory_size": 5}


def collected(images: int = 7, **params: object) -> MemSeg:
    detector = build_detector("memseg", {**SMALL, **params})
    assert isinstance(detector, MemSeg)
    detector.load_weights()
    batch = normal_batch(images)
    with torch.inference_mode():
        state = FitState()
        state.add(batch.keys, detector.collect(batch))
        detector.finish(state, lambda *_: None)
    return detector


def normal_batch(count: int, epoch: int = 0) -> Batch:
    return Batch(as_batch([normal_image(i, 64) for i in range(count)]), [str(i) for i in range(count)], epoch=epoch)


def trained(steps: int, **params: object) -> tuple[MemSeg, list[float]]:
    detector = collected(**params)
    plan, losses = detector.begin_training(8), []
    for epoch in range(steps):
        loss = detector.training_loss(normal_batch(8, epoch))
        plan.optimizer.zero_grad()
        loss.backward()
        plan.optimizer.step()
        losses.append(loss.item())
    detector.end_training()
    return detector, losses


@pytest.mark.parametrize("num_neighbors", [1, 3])
def test_memory_recalls_what_a_walk_over_all_memories_does(num_neighbors: int) -> None:
    random = np.random.default_rng(0)
    levels = [random.normal(size=(2, c, s, s)) for c, s in ((4, 8), (6, 4), (8, 2))]
    memories = [random.normal(size=(5, *level.shape[1:])) for level in levels]
    memory = Memory([torch.from_numpy(m) for m in memories])
    found = memory.recall([torch.from_numpy(level) for level in levels], num_neighbors)
    for i in range(2):
        expected = plain.recalled([level[i] for level in levels], memories, num_neighbors)
        for level, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(level[i].numpy(), want, rtol=1e-9, atol=1e-12)


def test_coordinate_attention_is_the_formula() -> None:
    attention = CoordinateAttention(12).double().eval()
    with torch.no_grad():
        for part in attention.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.normal_()  # type: ignore[union-attr]
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    features = torch.randn(1, 12, 5, 7, dtype=torch.float64)
    conv, norm = attention.squeeze[0], attention.squeeze[1]
    assert isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d) and conv.bias is not None
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    squeeze, shift = scale[:, None] * conv.weight[:, :, 0, 0], scale * (conv.bias - norm.running_mean) + norm.bias
    rows, columns = (
        torch.cat([c.weight[:, :, 0, 0], c.bias[:, None]], 1)  # type: ignore[index]
        for c in (attention.rows, attention.columns)
    )
    expected = plain.coordinate_attention(*(x.detach().numpy() for x in (features[0], squeeze, shift, rows, columns)))
    np.testing.assert_allclose(attention(features)[0].detach().numpy(), expected, rtol=1e-9)


def doubled(plane: np.ndarray) -> np.ndarray:
    """Bilinear with aligned corners, by scipy."""
    return zoom(plane, 2, order=1)


def test_levels_are_weighted_by_the_differences_of_all_deeper_ones() -> None:
    fusion = MultiScaleFusion((4, 8, 16)).eval()
    features = [torch.randn(1, c, s, s) for c, s in ((4, 16), (8, 8), (16, 4))]
    differences = [torch.rand(level.shape) for level in features]
    with torch.no_grad():
        found = fusion(features, differences)
        zeros = fusion(features, [differences[0], torch.zeros_like(differences[1]), differences[2]])
        fused = [block(torch.cat(p, 1)) for block, *p in zip(fusion.blocks, features, differences, strict=True)]
    deep, middle, shallow = (d[0].mean(0).double().numpy() for d in reversed(differences))
    weight = middle * doubled(deep)
    np.testing.assert_allclose(found[2][0].numpy(), fused[2][0].numpy() * deep, rtol=1e-4, atol=1e-6)
    lifted = fusion.lift[1](
        torch.nn.functional.interpolate(fused[2], scale_factor=2, mode="bilinear", align_corners=True)
    )
    expected = (fused[1] + lifted)[0].detach().numpy() * weight
    np.testing.assert_allclose(found[1][0].numpy(), expected, rtol=1e-4, atol=1e-6)
    assert zeros[0].abs().max() == 0 and zeros[1].abs().max() == 0 and found[0].abs().max() > 0
    assert shallow.shape == (16, 16)


def test_the_memory_holds_the_features_of_the_stated_number_of_images() -> None:
    detector = collected(images=4)
    assert detector.num_collected() == 5 and detector.num_memories == 4
    memory = detector.networks["memory"]
    assert isinstance(memory, Memory)
    with torch.inference_mode():
        _, *levels = detector.networks["backbone"](normal_batch(4).images_BCHW)
        recalled = memory.recall(levels, 1)
    for level, stored, found in zip(levels, memory.buffers(), recalled, strict=True):
        assert sorted(level.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(stored.sum((1, 2, 3)).tolist()), rel=1e-5)
        torch.testing.assert_close(found, level)  # an image in memory is its own nearest
    with pytest.raises(SpecError, match="4 images are in memory, k_neighbors is 5"):
        collected(images=4, k_neighbors=5)


def test_the_loss_is_the_weighted_sum_of_both_and_falls() -> None:
    detector, losses = trained(30, l1_weight=0.7, focal_weight=0.5, anomalous_ratio=1.0)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    batch, parts = normal_batch(2, epoch=4), []
    found = detector.training_loss(batch).item()
    for image, key in zip(batch.images_BCHW, batch.keys, strict=True):
        damaged, mask = detector._simulated(image, keyed_generator(detector.seed, "memseg", key, 4))
        with torch.inference_mode():
            anomalous = detector._forward(255 * damaged[None])[0].double().numpy()
        l1 = np.abs(anomalous - mask.numpy()).mean()
        parts.append(0.7 * l1 + 0.5 * plain.focal_loss(np.clip(anomalous, 1e-6, 1 - 1e-6), mask.numpy(), 4.0))
    assert found == pytest.approx(np.mean(parts), rel=5e-3)


def test_k_1_is_the_default_and_more_neighbours_change_the_map() -> None:
    detector, _ = trained(3)
    images = as_batch([normal_image(70, 64), defect_image(1, "blob", 64)[0]])
    maps = []
    for params in ({}, {"k_neighbors": 1}, {"k_neighbors": 3}):
        other = build_detector("memseg", {**SMALL, **params})
        other.load_tensors(detector.tensors())
        maps.append(other.score(images).anomaly_map_BHW)
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def test_the_score_is_the_mean_of_the_largest_values_and_other_sizes_are_refused() -> None:
    detector, _ = trained(2, top_pixels=10)
    scores = detector.score(as_batch([normal_image(70, 64), defect_image(1, "blob", 64)[0]]))
    for score, plane in zip(scores.image_score_B, scores.anomaly_map_BHW, strict=True):
        assert score.item() == pytest.approx(np.sort(plane.numpy().ravel())[-10:].mean(), rel=1e-5)
    with pytest.raises(SpecError, match="64 x 96 px does not fit"):
        detector.score(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))


def test_defects_lie_on_the_foreground_and_are_made_of_textures_or_tiles() -> None:
    picture = np.full((64, 64, 3), 240, np.uint8)
    picture[16:48, 16:48] = normal_image(0, 32)
    image = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    shown, sizes = foreground(image), []
    for texture_ratio in (0.0, 1.0):
        detector = collected(images=5, anomalous_ratio=1.0, texture_ratio=texture_ratio)
        for i in range(12):
            damaged, mask = detector._simulated(image, keyed_generator(0, "d", i))
            assert not (mask.bool() & ~shown).any()
            changed = (damaged - image.float() / 255).abs().amax(0) > 0
            assert not (changed & ~mask.bool()).any()
            sizes.append(int(changed.sum()))
    assert np.count_nonzero(sizes) > 8


def test_the_deepest_stage_begins_with_the_given_weights_and_a_file_without_it_is_refused() -> None:
    detector = build_detector("memseg", {**SMALL, "deepest_layer": "layer4"})
    assert isinstance(detector, MemSeg)
    detector.load_weights()
    stage = detector.make_networks()["stage"].state_dict()
    assert {name.removeprefix("0.") for name in stage} >= set(detector.stage_weights)
    assert all(torch.equal(stage[f"0.{name}"], value) for name, value in detector.stage_weights.items())
    assert stage["1.weight"].shape == (32, 512, 1, 1)  # 512 channels to a feature_dim of 32
    with pytest.raises(SpecError, match="layer4"):
        build_detector("memseg", {**SMALL, "deepest_layer": "layer44"}).load_weights()


def test_a_weights_file_that_ends_before_the_deepest_stage_names_what_it_misses(tmp_path: object) -> None:
    from safetensors.torch import save_file

    detector = collected(images=5)
    path = f"{tmp_path}/cut.safetensors"
    backbone = detector.networks["backbone"]
    save_file({k: v.contiguous() for k, v in backbone.weights().items()}, path)  # type: ignore[operator]
    build_detector("memseg", {**SMALL, "weights": path}).load_weights()
    with pytest.raises(ArtifactError, match=r"layer4\.0\.conv1\.weight"):
        build_detector("memseg", {**SMALL, "weights": path, "deepest_layer": "layer4"}).load_weights()


def test_the_rate_warms_up_and_falls_by_a_cosine_over_the_stated_steps() -> None:
    plan = collected(images=5, training_steps=50, batch_size=4).begin_training(10)
    assert plan.epochs == math.ceil(50 / 3)
    least = 1e-4 / 3e-3
    assert plan.rate(0) == pytest.approx(least) and plan.rate(plan.epochs) == pytest.approx(least)
    assert [warm_cosine(x, least) for x in (0.05, 0.1, 0.55)] == pytest.approx([(1 + least) / 2, 1, (1 + least) / 2])
