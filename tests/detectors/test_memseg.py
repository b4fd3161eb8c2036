"""MemSeg against slow code: memory, attention, fusion, loss, schedule, simulated defects."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import zoom

from raydetect.blocks.augment.foreground import foreground
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.networks.fusion import CoordinateAttention, MaskDecoder, Memory, MultiScaleFusion, deepest_stage
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.memseg import MemSeg, warm_cosine
from raydetect.errors import ArtifactError, SpecError
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.builders.training import loss_of
from tests.contracts.cases import as_batch
from tests.reference import images as plain
from tests.reference.memory import coordinate_attention, recalled

SMALL = {
    "image_size": [64, 64],
    "backbone": "test_resnet",
    "stem": "act1",
    "weights": "random",
    "deepest_layer": None,
    "feature_dim": 32,
    "memory_size": 5,
}


def normal_batch(count: int, epoch: int = 0) -> Batch:
    return Batch(as_batch([normal_image(i, 64) for i in range(count)]), [str(i) for i in range(count)], epoch=epoch)


def collected(images: int = 5, **params: object) -> MemSeg:
    """With the first images in memory."""
    detector = build_detector("memseg", {**SMALL, **params})
    assert isinstance(detector, MemSeg)
    detector.load_weights()
    batch = normal_batch(images)
    with torch.inference_mode():
        state = FitState()
        state.add(batch.keys, detector.collect(batch))
        detector.finish(state, lambda *_: None)
    return detector


def trained(steps: int, **params: object) -> tuple[MemSeg, list[float]]:
    detector = collected(**params)
    plan, losses = detector.begin_training(8), []
    for epoch in range(steps):
        loss = loss_of(detector, normal_batch(8, epoch))
        plan.optimizer.zero_grad()
        loss.backward()
        plan.optimizer.step()
        losses.append(loss.item())
    detector.end_training()
    return detector, losses


@pytest.mark.parametrize("num_neighbors", [1, 3])
def test_memory_recalls_what_a_walk_over_all_memories_does(num_neighbors: int) -> None:
    random = np.random.default_rng(0)
    levels = [random.normal(size=(2, c, s, s)).astype(np.float32) for c, s in ((4, 8), (6, 4), (8, 2))]
    memories = [random.normal(size=(5, s, s, c)).astype(np.float32) for c, s in ((4, 8), (6, 4), (8, 2))]
    memory = Memory([torch.from_numpy(m) for m in memories])
    asked = [torch.from_numpy(level) for level in levels]
    found = memory.recall(asked, num_neighbors)
    hidden = torch.tensor([[False, True, False, False, True], [False] * 5])
    without = memory.recall(asked, num_neighbors, hidden)
    for i in range(2):
        mine = [level[i].astype(np.float64) for level in levels]
        left = [m[~hidden[i].numpy()].astype(np.float64) for m in memories]
        for got, kept in ((found, [m.astype(np.float64) for m in memories]), (without, left)):
            for level, want in zip(got, recalled(mine, kept, num_neighbors), strict=True):
                np.testing.assert_allclose(level[i].numpy(), want, rtol=1e-4, atol=1e-5)


def test_coordinate_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    attention = CoordinateAttention(12).double().eval()
    conv, norm = attention.squeeze[0], attention.squeeze[1]
    assert isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d)
    assert norm.running_var is not None and norm.running_mean is not None and conv.bias is not None
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        squeeze, shift = scale[:, None] * conv.weight[:, :, 0, 0], scale * (conv.bias - norm.running_mean) + norm.bias
        features = torch.randn(1, 12, 5, 7, dtype=torch.float64)
        matrices = []
        for line in (attention.rows, attention.columns):
            assert line.bias is not None
            matrices.append(torch.cat([line.weight[:, :, 0, 0], line.bias[:, None]], 1).numpy())
        expected = coordinate_attention(features[0].numpy(), squeeze.numpy(), shift.numpy(), *matrices)
        np.testing.assert_allclose(attention(features)[0].numpy(), expected, rtol=1e-9)


def doubled(plane: np.ndarray) -> np.ndarray:
    """Bilinear with aligned corners, by scipy."""
    return zoom(plane, 2, order=1)


def test_levels_are_weighted_by_the_differences_of_all_deeper_ones() -> None:
    torch.manual_seed(0)
    fusion = MultiScaleFusion((4, 8, 16)).eval()
    levels = [torch.randn(1, c, s, s) for c, s in ((4, 16), (8, 8), (16, 4))]
    differences = [torch.rand(level.shape) for level in levels]
    with torch.no_grad():
        found = fusion(levels, differences)
        zeros = fusion(levels, [differences[0], torch.zeros_like(differences[1]), differences[2]])
        fused = [
            block(torch.cat(p, 1))[0].numpy() for block, *p in zip(fusion.blocks, levels, differences, strict=True)
        ]
        weights = [difference[0].mean(0).numpy() for difference in differences]
        for i in (1, 0):
            above = torch.from_numpy(np.stack([doubled(plane) for plane in fused[i + 1]]))[None]
            fused[i] = fused[i] + fusion.lift[i](above)[0].numpy()
            weights[i] = weights[i] * doubled(weights[i + 1])
    for level, fine, weight in zip(found, fused, weights, strict=True):
        np.testing.assert_allclose(level[0].numpy(), fine * weight, rtol=1e-4, atol=1e-5)
    assert zeros[0].abs().max() == 0 and zeros[1].abs().max() == 0 and found[0].abs().max() > 0


def test_on_a_resnet18_the_head_has_the_widths_of_the_paper() -> None:
    stage = deepest_stage("resnet18", "layer4", {}, 256, 512)
    decoder = MaskDecoder(64, (64, 128, 256), 512)
    ups = [up[1] for up in (*decoder.up, decoder.up_to_stem, decoder.up_to_mask)]
    assert [(up.in_channels, up.out_channels) for up in ups] == [
        (512, 256), (512, 128), (256, 64), (128, 48), (96, 48)
    ]  # fmt: skip
    sizes = [torch.zeros(1, c, s, s) for c, s in ((64, 16), (128, 8), (256, 4))]
    logits = decoder.eval()(stage.eval()(sizes[-1]), torch.zeros(1, 64, 32, 32), sizes)
    assert logits.shape == (1, 2, 64, 64)


@pytest.mark.parametrize(("layer", "feature_dim"), [(None, 64), ("layer4", 64)])
def test_feature_dim_is_what_the_decoder_begins_with(layer: str | None, feature_dim: int) -> None:
    stage = deepest_stage("resnet18", layer, {}, 256, feature_dim).eval()
    assert stage(torch.zeros(1, 256, 4, 4)).shape == (1, feature_dim, 2, 2)


def test_the_memory_holds_the_features_of_the_stated_number_of_images() -> None:
    detector = collected(images=4)
    assert detector.num_collected() == 5 and detector.facts()["memory_images"] == 4
    memory = detector.networks["memory"]
    assert isinstance(memory, Memory)
    with torch.inference_mode():
        _, *levels = detector.networks["backbone"](normal_batch(4).images_BCHW)
    keys = detector._memory_keys
    assert sorted(keys) == ["0", "1", "2", "3"]
    for level, stored, found in zip(levels, memory.buffers(), memory.recall(levels, 1), strict=True):
        in_order = level.permute(0, 2, 3, 1)[[int(key) for key in keys]]
        torch.testing.assert_close(stored, in_order)
        torch.testing.assert_close(found, level)  # an image in memory is its own nearest
    with pytest.raises(SpecError, match="4 images are in memory, k_neighbors is 5"):
        collected(images=4, k_neighbors=5)


def test_while_training_an_image_passes_over_itself() -> None:
    detector = collected(anomalous_ratio=1e-9)
    detector.begin_training(5)
    asked: list[list[torch.Tensor]] = []
    memory = detector.networks["memory"]
    assert isinstance(memory, Memory)
    inner = memory.recall

    def listened(levels: list[torch.Tensor], *words: object) -> list[torch.Tensor]:
        asked.append([(a - b).abs().amax((1, 2, 3)) for a, b in zip(levels, inner(levels, *words), strict=True)])  # type: ignore[arg-type]
        return inner(levels, *words)  # type: ignore[arg-type]

    memory.recall = listened  # type: ignore[method-assign,assignment]
    loss_of(detector, normal_batch(5))
    detector.end_training()
    detector.score(normal_batch(5).images_BCHW)
    assert all(level.min() > 1e-3 for level in asked[0])
    assert all(level.max() < 1e-4 for level in asked[1])
    one = collected(images=1, memory_size=1)
    one.begin_training(1)
    assert one._themselves(["0"]) is None and torch.isfinite(loss_of(one, normal_batch(2)))


def test_the_loss_is_the_weighted_sum_of_both_and_falls() -> None:
    detector, losses = trained(30, l1_weight=0.7, focal_weight=0.5, anomalous_ratio=1.0)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    batch, parts = normal_batch(2, epoch=4), []
    found = loss_of(detector, batch).item()
    for i, (image, key) in enumerate(zip(batch.images_BCHW, batch.keys, strict=True)):
        damaged, mask = detector._simulated(image, keyed_generator(detector.seed, "memseg", key, 4))
        with torch.inference_mode():
            hidden = detector._themselves([key])
            anomalous = detector._forward(255 * damaged[None], hidden)[0].double().numpy()
        l1 = np.abs(anomalous - mask.numpy()).mean()
        parts.append(0.7 * l1 + 0.5 * plain.focal_loss(np.clip(anomalous, 1e-6, 1 - 1e-6), mask.numpy(), 4.0))
        assert mask.any() or i
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


def test_the_users_parameters_work_together() -> None:
    words = {"memory_size": 1000, "k_neighbors": 3, "feature_dim": 512}
    detector = collected(images=6, **words)
    detector.begin_training(6)
    loss_of(detector, normal_batch(6)).backward()
    detector.end_training()
    assert detector.facts()["memory_images"] == 6
    deepest = detector.networks["memory"].get_buffer("level2").permute(0, 3, 1, 2)
    assert detector.networks["stage"](deepest).shape == (6, 512, 2, 2)
    other = build_detector("memseg", {**SMALL, **words})
    other.load_tensors(detector.tensors())
    images = normal_batch(2).images_BCHW
    assert torch.equal(other.score(images).anomaly_map_BHW, detector.score(images).anomaly_map_BHW)


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
        detector = collected(anomalous_ratio=1.0, texture_ratio=texture_ratio)
        for i in range(12):
            damaged, mask = detector._simulated(image, keyed_generator(0, "d", i))
            again = detector._simulated(image, keyed_generator(0, "d", i))
            assert torch.equal(damaged, again[0]) and torch.equal(mask, again[1])
            assert not (mask.bool() & ~shown).any()
            changed = (damaged - image.float() / 255).abs().amax(0) > 0
            assert not (changed & ~mask.bool()).any()
            sizes.append(int(changed.sum()))
    assert np.count_nonzero(sizes) > 8


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_the_stated_share_is_damaged(ratio: float) -> None:
    detector = collected(anomalous_ratio=ratio, foreground="none")
    image = normal_batch(1).images_BCHW[0]
    masks = [detector._simulated(image, keyed_generator(0, "share", i))[1] for i in range(200)]
    assert 0.5 * ratio < np.mean([bool(mask.any()) for mask in masks]) < ratio + 0.1  # a mask may be empty


def test_the_deepest_stage_begins_with_the_given_weights() -> None:
    words = {"backbone": "resnet18", "stem": "relu", "deepest_layer": "layer4"}
    detector = build_detector("memseg", {**SMALL, **words})
    assert isinstance(detector, MemSeg)
    detector.load_weights()
    stage, given = detector.make_networks()["stage"].state_dict(), Backbone("resnet18", ("layer4",), 0).weights()
    for name, value in given.items():
        if name.startswith("layer4."):
            assert torch.equal(stage[name.replace("layer4.", "0.", 1)], value)
    with pytest.raises(SpecError, match="layer4"):
        build_detector("memseg", {**SMALL, **words, "deepest_layer": "layer44"}).load_weights()
    with pytest.raises(SpecError, match=r"grids .* must be"):
        build_detector("memseg", {**SMALL, **words, "stem": "layer1"}).load_weights()


def test_a_weights_file_that_ends_before_the_deepest_stage_names_what_it_misses(tmp_path: Path) -> None:
    backbone = Backbone("resnet18", ("layer3",), 0)
    save_file({k: v.contiguous() for k, v in backbone.weights().items()}, tmp_path / "cut.safetensors")
    words = {**SMALL, "backbone": "resnet18", "stem": "relu", "weights": str(tmp_path / "cut.safetensors")}
    build_detector("memseg", words).load_weights()
    with pytest.raises(ArtifactError, match=r"layer4\.0\.conv1\.weight"):
        build_detector("memseg", {**words, "deepest_layer": "layer4"}).load_weights()


def test_the_rate_warms_up_and_falls_by_a_cosine_over_the_stated_steps() -> None:
    plan = collected(training_steps=50, batch_size=4).begin_training(10)
    assert plan.epochs == math.ceil(50 / 3)
    assert collected(epochs=7).begin_training(10).epochs == 7
    least = 1e-4 / 3e-3
    assert plan.rate(0) == pytest.approx(least) and plan.rate(plan.epochs) == pytest.approx(least)
    assert [warm_cosine(x, least) for x in (0.05, 0.1, 0.55)] == pytest.approx([(1 + least) / 2, 1, (1 + least) / 2])


def test_it_finds_the_broken_bottles_and_did_not_before_its_steps(real_data: Path, real_weights: Path) -> None:
    """64 px, a new deepest stage and 100 steps of 5,000; every second test image."""
    params: dict[str, Any] = {
        "weights": str(real_weights),
        "deepest_layer": None,
        "training_steps": 100,
    }
    detector = build_detector("memseg", {"image_size": [64, 64], **params})
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 64))
    assert gain.at_least(image=0.3, pixel=0.3)
    assert gain.reaches(image=0.9, pixel=0.88)
