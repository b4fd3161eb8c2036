"""UniAD against loops over tokens, torch's own attention and closed forms; on real images of four categories."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.networks.attention import Attention, KeyedDropout, neighbor_mask
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.uniad import UniAD, resized
from raydetect.errors import SpecError
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.fitting.train import Trainer
from raydetect.images.preprocess import Preprocess
from tests.builders.categories import CATEGORIES, read_category
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch

GRID, NEIGHBORS, HEADS, DIMS = (4, 6), 3, 2, 8
SMALL = {
    "backbone": "resnet18",
    "layers": ["layer1", "layer2"],
    "weights": "random",
    "image_size": [64, 96],
    "token_px": 16,
    "neighbor_size": NEIGHBORS,
    "hidden_dims": DIMS,
    "n_heads": HEADS,
    "n_encoder_layers": 2,
    "n_decoder_layers": 2,
    "feedforward_dims": 12,
    "pooling_px": 5,
}
IMAGES = as_batch([np.concatenate([normal_image(i, 64), normal_image(i + 9, 64)[:, :32]], 1) for i in range(4)])
KEYS = ["a", "b", "c", "d"]
Values = Mapping[str, np.ndarray]


def built(**params: object) -> UniAD:
    """A detector with random weights, as at the beginning of a training but for its first zeros."""
    detector = build_detector("uniad", {**SMALL, **params})
    assert isinstance(detector, UniAD)
    detector.load_weights()
    detector.begin_training(4)
    with torch.no_grad():
        for number, value in enumerate(detector.networks["reconstruction"].parameters()):
            value += 0.2 * torch.randn(value.shape, generator=keyed_generator(number))
    return detector


def values_of(detector: UniAD) -> Values:
    """The transformer's tensors in float64."""
    state = detector.networks["reconstruction"].state_dict()
    return {name: value.double().numpy() for name, value in state.items()}


def normed(tokens: np.ndarray, v: Values, name: str) -> np.ndarray:
    """Layer norm, token by token."""
    spread = tokens - tokens.mean(1, keepdims=True)
    return spread / np.sqrt((spread**2).mean(1, keepdims=True) + 1e-5) * v[f"{name}.weight"] + v[f"{name}.bias"]


def linear(tokens: np.ndarray, v: Values, name: str) -> np.ndarray:
    return tokens @ v[f"{name}.weight"].T + v[f"{name}.bias"]


def visible(token: int) -> list[int]:
    """The tokens outside the square around a token."""
    row, column = divmod(token, GRID[1])
    return [
        other
        for other in range(GRID[0] * GRID[1])
        if abs(other // GRID[1] - row) > NEIGHBORS // 2 or abs(other % GRID[1] - column) > NEIGHBORS // 2
    ]


def attended(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, v: Values, name: str) -> np.ndarray:
    """Attention by a loop over tokens and heads; only visible tokens take part."""
    weights, biases = np.split(v[f"{name}.inputs.weight"], 3), np.split(v[f"{name}.inputs.bias"], 3)
    q, k, x = (rows @ w.T + b for rows, w, b in zip((queries, keys, values), weights, biases, strict=True))
    width = DIMS // HEADS
    found = np.zeros_like(q)
    for token in range(len(q)):
        for part in (slice(head * width, (head + 1) * width) for head in range(HEADS)):
            raw = np.array([q[token, part] @ k[other, part] / np.sqrt(width) for other in visible(token)])
            shares = np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
            found[token, part] = sum(s * x[other, part] for s, other in zip(shares, visible(token), strict=True))
    return linear(found, v, f"{name}.outputs")


def fed(tokens: np.ndarray, v: Values, name: str) -> np.ndarray:
    return linear(np.maximum(linear(tokens, v, f"{name}.inner"), 0), v, f"{name}.outer")


def reconstructed(features_Chw: np.ndarray, v: Values) -> np.ndarray:
    """The whole transformer on one image, without dropout."""
    tokens = linear(features_Chw.reshape(len(features_Chw), -1).T, v, "input")
    places = [np.concatenate([v["columns_wD"][n % GRID[1]], v["rows_hD"][n // GRID[1]]]) for n in range(len(tokens))]
    at = np.stack(places)
    for name in ("encoder.0", "encoder.1"):
        tokens = normed(
            tokens + attended(tokens + at, tokens + at, tokens, v, f"{name}.attention"), v, f"{name}.norms.0"
        )
        tokens = normed(tokens + fed(tokens, v, f"{name}.feed_forward"), v, f"{name}.norms.1")
    encoded, before = tokens, tokens
    for name in ("decoder.0", "decoder.1"):
        found = v[f"{name}.queries_ND"]  # every layer begins again
        found = normed(
            found + attended(found + at, encoded + at, encoded, v, f"{name}.of_encoder"), v, f"{name}.norms.0"
        )
        found = normed(found + attended(found + at, before + at, before, v, f"{name}.of_layer"), v, f"{name}.norms.1")
        before = normed(found + fed(found, v, f"{name}.feed_forward"), v, f"{name}.norms.2")
    return linear(normed(before, v, "norm"), v, "output").T.reshape(features_Chw.shape)


def aligned(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation in which the first and last points of both axes fall together."""
    for axis, count in enumerate(size):
        places = np.linspace(0, grid.shape[axis] - 1, count)
        grid = np.apply_along_axis(lambda line, at=places: np.interp(at, np.arange(len(line)), line), axis, grid)
    return grid


def test_the_mask_hides_exactly_the_square_around_each_token() -> None:
    mask = neighbor_mask(GRID, NEIGHBORS)
    for token in range(GRID[0] * GRID[1]):
        assert mask[token].isfinite().nonzero().flatten().tolist() == visible(token)
        assert set(mask[token].tolist()) == {0.0, -float("inf")}
    published = neighbor_mask((14, 14), 7).view(14, 14, 14, 14)
    assert published[6, 7].isinf().sum() == 49 and published[0, 0].isinf().sum() == 16
    assert neighbor_mask((5, 3), 1).isinf().equal(torch.eye(15, dtype=torch.bool))


def test_attention_is_torchs() -> None:
    torch.manual_seed(0)
    mine, theirs = Attention(24, 4), nn.MultiheadAttention(24, 4, batch_first=True)
    for value in mine.parameters():
        nn.init.normal_(value)
    state = {"in_proj_weight": mine.inputs.weight, "in_proj_bias": mine.inputs.bias}
    theirs.load_state_dict({**state, "out_proj.weight": mine.outputs.weight, "out_proj.bias": mine.outputs.bias})
    queries, keys, values = torch.randn(3, 2, 24, 24)
    mask = neighbor_mask(GRID, NEIGHBORS)
    want = theirs(queries, keys, values, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(mine(queries, keys, values, mask, KeyedDropout()), want, rtol=1e-4, atol=1e-4)


def test_dropout_drops_its_share_and_belongs_to_the_image() -> None:
    seeds = torch.tensor([3, 4, 2**62])
    ones = torch.ones(3, 7, 11_111)
    drop = KeyedDropout(0.1, seeds)
    first, second = drop(ones), drop(ones)
    for dropped in (first, second):
        for image in dropped:
            share = (image == 0).float().mean().item()
            assert abs(share - 0.1) < 5 * (0.1 * 0.9 / image.numel()) ** 0.5
    kept = first[first != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept)) and abs(kept[0].item() - 1 / 0.9) < 1e-4
    masks = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in _pairs([*first, *second])]
    assert max(map(abs, masks)) < 0.02
    neighbours = torch.corrcoef(torch.stack([first.flatten()[:-1], first.flatten()[1:]]))[0, 1]
    assert abs(neighbours) < 0.01
    alone = KeyedDropout(0.1, seeds[1:2])
    assert torch.equal(alone(ones[1:2]), first[1:2]) and torch.equal(alone(ones[1:2]), second[1:2])
    assert torch.equal(KeyedDropout(0.1)(ones), ones) and torch.equal(KeyedDropout(0.0, seeds)(ones), ones)


def _pairs(parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((a, b) for number, a in enumerate(parts) for b in parts[:number])


def test_the_reconstruction_is_that_of_loops_over_tokens() -> None:
    detector = built()
    features = torch.randn(2, 192, *GRID, generator=keyed_generator(5))
    with torch.no_grad():
        mine = detector.networks["reconstruction"](features, KeyedDropout())
    for one, found in zip(features.double().numpy(), mine.numpy(), strict=True):
        np.testing.assert_allclose(found, reconstructed(one, values_of(detector)), rtol=1e-4, atol=1e-4)


def test_a_token_is_reconstructed_without_a_look_at_its_neighbourhood() -> None:
    """With one encoder layer and no residual path, as in the first attention of the decoder."""
    detector = built()
    attention = detector.networks["reconstruction"].decoder[0].of_encoder  # type: ignore[union-attr, index]
    seen = torch.randn(1, 24, DIMS, requires_grad=True)
    queries, mask = torch.randn(1, 24, DIMS), neighbor_mask(GRID, NEIGHBORS)
    attention(queries, seen, seen, mask, KeyedDropout())[0, 9].sum().backward()  # type: ignore[operator]
    assert seen.grad is not None
    assert seen.grad[0].abs().sum(1).nonzero().flatten().tolist() == visible(9)


def test_jitter_has_the_published_sigma_and_belongs_to_image_and_epoch() -> None:
    detector = built(jitter_scale=7.0)
    features = torch.randn(4, 192, *GRID, generator=keyed_generator(6)) * torch.arange(1, 5)[:, None, None, None]
    noise = detector._jitter(features, Batch(IMAGES, KEYS))
    want = 7.0 * features.double().square().sum(1).sqrt() / 192
    found = noise.double().square().mean(1).sqrt()
    assert ((found / want - 1).abs() < 5 / (2 * 192) ** 0.5).all() and abs((found / want).mean() - 1) < 0.02
    turned = detector._jitter(features.flip(0), Batch(IMAGES, KEYS[::-1])).flip(0)
    assert torch.equal(noise, turned)
    later = detector._jitter(features, Batch(IMAGES, KEYS, epoch=1))
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), later.flatten()]))[0, 1]) < 0.02


def test_the_loss_is_the_mean_squared_error_against_the_features_without_jitter() -> None:
    detector = built(dropout=0.0)
    features = detector._features(IMAGES)
    jittered = features + detector._jitter(features, Batch(IMAGES, KEYS))
    rebuilt = [reconstructed(one, values_of(detector)) for one in jittered.double().numpy()]
    want = np.mean((np.stack(rebuilt) - features.double().numpy()) ** 2)
    assert detector.training_loss(Batch(IMAGES, KEYS)).item() == pytest.approx(want, rel=1e-4)
    assert built(dropout=0.3).training_loss(Batch(IMAGES, KEYS)).item() != pytest.approx(want, rel=1e-3)


def test_the_loss_of_a_batch_is_the_mean_over_its_parts() -> None:
    detector = built(dropout=0.3)
    whole = detector.training_loss(Batch(IMAGES, KEYS, epoch=2)).item()
    parts = [detector.training_loss(Batch(IMAGES[rank::2], KEYS[rank::2], epoch=2)).item() for rank in range(2)]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-5) and parts[0] != pytest.approx(parts[1], rel=1e-3)


def test_map_and_score_are_those_of_slow_code() -> None:
    detector = built()
    v = values_of(detector)
    detector.end_training()
    scores = detector.score(IMAGES)
    with torch.inference_mode():
        levels = [level.double().numpy() for level in detector.networks["backbone"](IMAGES)]
    for number in range(len(IMAGES)):
        features = np.concatenate([np.stack([aligned(channel, GRID) for channel in level[number]]) for level in levels])
        error = np.sqrt(((reconstructed(features, v) - features) ** 2).sum(0))
        want = aligned(error, (64, 96))
        np.testing.assert_allclose(scores.anomaly_map_BHW[number].numpy(), want, rtol=1e-4, atol=1e-5)
        means = [want[y : y + 5, x : x + 5].mean() for y in range(60) for x in range(92)]
        assert scores.image_score_B[number].item() == pytest.approx(max(means), rel=1e-4)


def test_the_defaults_are_published() -> None:
    detector = build_detector("uniad", {"weights": "random"})
    assert isinstance(detector, UniAD)
    detector.load_weights()
    p = detector.params
    assert p.image_size == (224, 224) and p.grid() == (14, 14) and p.neighbor_size == 7
    assert (p.jitter_scale, p.dropout, p.epochs, p.batch_size, p.pooling_px) == (20.0, 0.1, 1000, 8, 16)
    plan = detector.begin_training(100)
    backbone = detector.networks["backbone"]
    assert backbone.shapes((224, 224)) == [  # type: ignore[operator]
        (24, 112, 112),
        (32, 56, 56),
        (56, 28, 28),
        (160, 14, 14),
    ]
    assert isinstance(plan.optimizer, torch.optim.AdamW) and plan.max_gradient_norm == 0.1
    group = plan.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 1e-4, (0.9, 0.999))
    assert [plan.rate(done) for done in (0, 799.9, 800, 999)] == [1.0, 1.0, 0.1, 0.1]
    shapes = {name: tuple(value.shape) for name, value in plan.module.named_parameters()}
    assert shapes["input.weight"] == (256, 272) and shapes["rows_hD"] == (14, 128)
    assert [shapes[f"decoder.{n}.queries_ND"] for n in range(4)] == [
        (196, 256)
    ] * 4 and "encoder.3.norms.1.bias" in shapes
    assert shapes["encoder.0.feed_forward.inner.weight"] == (1024, 256)
    assert sum(value.numel() for value in plan.module.parameters()) == 7_717_392  # as in the authors' code


def test_what_hides_everything_is_refused() -> None:
    with pytest.raises(SpecError, match=r"hides all of the \(7, 7\) tokens of image_size \(112, 112\)"):
        build_detector("uniad", {"image_size": [112, 112]})
    build_detector("uniad", {"image_size": [112, 128]})  # the outermost columns stay visible to the centre
    detector = built()
    detector.end_training()
    with pytest.raises(SpecError, match=r"fitted on images of \(64, 96\) px, given \(64, 64\)"):
        detector.score(IMAGES[..., :64])


@pytest.mark.parametrize(
    ("backbone", "layers", "size"),
    [
        ("resnet18", ["layer1", "layer2", "layer3"], [160, 128]),
        ("tf_efficientnet_b4.aa_in1k", ["blocks.0", "blocks.1", "blocks.2", "blocks.4"], [130, 150]),
        ("vit_tiny_patch16_224", ["blocks.1", "blocks.3"], [128, 144]),
    ],
)
def test_other_backbones_and_oblong_grids(backbone: str, layers: list[str], size: list[int]) -> None:
    params = {"backbone": backbone, "layers": layers, "image_size": size, "hidden_dims": 16, "weights": "random"}
    detector = build_detector("uniad", {**params, "n_encoder_layers": 1, "n_decoder_layers": 1})
    detector.load_weights()
    detector.begin_training(1)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    detector.training_loss(Batch(images, ["a", "b"])).backward()
    detector.end_training()
    scores = detector.score(images)
    assert scores.anomaly_map_BHW.shape == (2, *size) and scores.image_score_B.isfinite().all()


def test_resizing_aligns_corners() -> None:
    grid = torch.randn(1, 1, 5, 3)
    np.testing.assert_allclose(
        resized(grid, (9, 11))[0, 0].numpy(), aligned(grid[0, 0].double().numpy(), (9, 11)), rtol=1e-5, atol=1e-6
    )


def test_a_planted_defect_is_where_the_map_is_highest() -> None:
    case = build_detector("uniad", {"weights": "random", "epochs": 10}, preset="smoke")
    case.load_weights()
    cache = ImageCache(Preprocess((64, 64)))
    for i in range(24):
        cache.add(CachedImage(str(i), None, None), normal_image(i, 64))
    losses = Trainer(case, cache, list(cache.images), Group()).run(lambda *_: None)
    assert losses[-1] < 0.7 * losses[0]
    image, mask = defect_image(3, "spot", 64)
    found = case.score(as_batch([image])).anomaly_map_BHW[0].numpy()
    assert found[mask].mean() > found[~mask].mean()


def test_one_model_learns_four_categories(real_data: Path, real_weights: Path) -> None:
    """A small transformer at 128 px; the gain is over the same network before its first step."""
    params = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "weights": str(real_weights)}
    params |= {"image_size": [128, 128], "neighbor_size": 5, "hidden_dims": 64, "feedforward_dims": 128, "n_heads": 4}
    params |= {"n_encoder_layers": 1, "n_decoder_layers": 2, "epochs": 25, "learning_rate": 3e-3}
    detector = build_detector("uniad", params)
    detector.load_weights()
    categories = {name: read_category(real_data, name, 128, most=20) for name in CATEGORIES}
    cache = ImageCache(Preprocess((128, 128)))
    for name, image in (item for category in categories.values() for item in category.train.items()):
        cache.add(CachedImage(name, None, None), image)

    def aurocs() -> dict[str, float]:
        found = {}
        for name, category in categories.items():
            scores = detector.score(torch.from_numpy(category.test).permute(0, 3, 1, 2)).image_score_B
            found[name] = float(roc_auc_score(category.labels, scores.numpy()))
        return found

    detector.begin_training(1)
    detector.end_training()
    before = aurocs()
    losses = Trainer(detector, cache, list(cache.images), Group()).run(lambda *_: None)
    after = aurocs()
    print(f"before {before}\nafter {after}\nlosses {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < 0.5 * losses[0]
    assert np.mean(list(after.values())) >= np.mean(list(before.values())) + 0.15
    assert after["mvtec_bottle_256"] >= 0.9 and after["hazelnut_toy"] >= 0.9
