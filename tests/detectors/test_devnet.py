"""DevNet against its formulas, slow code and autograd on unfused networks in float64."""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from raydetect import create_model
from raydetect.blocks.augment.rotation import randomly_turned
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.seeding import keyed_generator, keyed_unit
from raydetect.check import find_problems
from raydetect.config import FitSpec, parse_job
from raydetect.detectors._base import Batch, Known
from raydetect.detectors._registry import build_detector
from raydetect.detectors.devnet import DevNet, deviation_loss, worst_mean
from raydetect.errors import SpecError
from raydetect.local import jobs
from tests.builders.archives import normal_files, pack
from tests.builders.bottle import gain_by_training, read_bottles
from tests.builders.images import DEFECTS, defect_image, encode, normal_image
from tests.contracts.cases import CASES, as_batch

IMAGES = as_batch([*(normal_image(i, 64) for i in range(4)), *(defect_image(i, "spot", 64)[0] for i in range(4))])
KEYS, LABELS = [f"image-{i}" for i in range(8)], [0, 0, 0, 0, 1, 1, 1, 1]
CASE = next(case for case in CASES if case.name == "devnet")


def build(**params: object) -> DevNet:
    detector = build_detector("devnet", {"weights": "random", **params}, preset="smoke")
    assert isinstance(detector, DevNet)
    detector.load_weights()
    return detector


def trained(steps: int = 4, **params: object) -> DevNet:
    detector = build(**params)
    plan = detector.begin_training(8)
    for step in range(steps):
        plan.optimizer.zero_grad()
        draws = range(12 * step, 12 * step + 8)
        detector.training_loss(Batch(IMAGES, KEYS, LABELS, draws=draws)).backward()
        plan.optimizer.step()
    detector.end_training()
    return detector


def by_hand(detector: DevNet, normal: torch.Tensor, scales: int) -> torch.Tensor:
    """Image scores in float64 by unfused networks: every other pixel for the next scale, a loop over patches."""
    backbone, head = (copy.deepcopy(detector.networks[name]).double().eval() for name in ("backbone", "head"))
    assert isinstance(backbone, Backbone)
    scores = []
    for image in normal:
        each = []
        for scale in range(scales):
            every = 2**scale
            (level,) = backbone.trunk(image[None, :, ::every, ::every]).values()
            values = [head(level[:, :, r : r + 1, c : c + 1]).abs().squeeze() for r in range(level.shape[2])
                      for c in range(level.shape[3])]  # fmt: skip
            worst = sorted(values, key=lambda value: value.item())[-max(1, len(values) // 10) :]
            each.append(torch.stack(worst).mean())
        scores.append(torch.stack(each).mean())
    return torch.stack(scores)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    return (images.double() / 255 - mean) / std


def test_the_loss_is_the_papers() -> None:
    random = np.random.default_rng(0)
    scores, labels, prior = random.normal(2, 4, 30), random.integers(0, 2, 30), random.normal(0.3, 1.7, 5000)
    want = 0.0
    for score, label in zip(scores, labels, strict=True):
        deviation = (score - prior.mean()) / prior.std(ddof=1)
        want += abs(deviation) if label == 0 else max(0.0, 2.5 - deviation)
    tensors = (torch.from_numpy(values) for values in (scores, labels.astype(float), prior))
    assert float(deviation_loss(*tensors, 2.5)) == pytest.approx(want / 30, rel=1e-12)


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(37, 0.1, 3), (9, 0.1, 1), (20, 1.0, 20)])
def test_the_image_score_is_the_mean_of_the_largest(patches: int, ratio: float, kept: int) -> None:
    scores = torch.randn(5, patches, generator=keyed_generator(0))
    want = np.sort(scores.numpy(), 1)[:, -kept:].mean(1)
    np.testing.assert_allclose(worst_mean(scores, ratio).numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("hidden_dims", [[], [16, 8]])
def test_scores_and_gradient_maps_are_those_of_slow_code(hidden_dims: list[int]) -> None:
    detector = trained(hidden_dims=hidden_dims)
    head = detector.networks["head"]
    assert [part.out_channels for part in head.modules() if isinstance(part, nn.Conv2d)] == [*hidden_dims, 1]
    normal = normalised(IMAGES[2:6]).requires_grad_(True)
    want = by_hand(detector, normal, 2)
    scores = detector.score(IMAGES[2:6])
    np.testing.assert_allclose(scores.image_score_B.numpy(), want.detach().numpy(), rtol=1e-3)
    (slopes,) = torch.autograd.grad(want.sum(), normal)
    cut = [np.minimum(slope, np.percentile(slope, 99)) for slope in slopes.abs().sum(1).numpy()]
    maps = [gaussian_filter(slope, 4.0, mode="reflect") for slope in cut]
    np.testing.assert_allclose(scores.anomaly_map_BHW.numpy(), np.stack(maps), rtol=1e-2, atol=1e-3 * np.max(maps))


def test_the_map_of_patches_is_the_mean_of_both_scales() -> None:
    detector = trained(map="patches", smoothing_sigma=0)
    scores = detector.score(IMAGES)
    with torch.inference_mode():
        patches = detector._scores(normalised(IMAGES).float())[1]
    assert [patch.shape[1:] for patch in patches] == [(8, 8), (4, 4)] and all((patch >= 0).all() for patch in patches)
    wide = [nn.functional.interpolate(patch[:, None], (64, 64), mode="bilinear")[:, 0] for patch in patches]
    torch.testing.assert_close(scores.anomaly_map_BHW, (wide[0] + wide[1]) / 2, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores.image_score_B, trained().score(IMAGES).image_score_B, rtol=1e-4, atol=1e-6)


def test_a_step_scores_turned_images_against_its_own_prior() -> None:
    detector = build(prior_draws=50)
    plan = detector.begin_training(8)
    plan.module.eval()
    draws = range(24, 32)  # of the third batch
    loss = float(detector.training_loss(Batch(IMAGES, KEYS, LABELS, epoch=3, draws=draws)).detach())
    rotated = torch.stack([randomly_turned(IMAGES[i], 180, 0, KEYS[i], 3, draws[i]) for i in range(8)])
    prior = torch.randn(50, generator=keyed_generator(0, "prior", 3, 2)).double().numpy()
    deviation = (by_hand(detector, normalised(rotated), 2).detach().numpy() - prior.mean()) / prior.std(ddof=1)
    want = np.where(np.array(LABELS) == 0, np.abs(deviation), np.maximum(0, 5 - deviation)).mean()
    assert loss == pytest.approx(want, rel=1e-4)
    half = detector.training_loss(Batch(IMAGES[1::2], KEYS[1::2], LABELS[1::2], epoch=3, draws=draws[1::2]))
    other = detector.training_loss(Batch(IMAGES[::2], KEYS[::2], LABELS[::2], epoch=3, draws=draws[::2]))
    assert float((half + other).detach()) / 2 == pytest.approx(loss, rel=1e-5)  # two workers have the same prior


def test_images_are_turned_as_pillow_turns_them_by_angles_of_their_draw() -> None:
    image = as_batch([normal_image(3, 64)])[0]
    for draw in range(5):
        degrees = 120 * (2 * keyed_unit(0, "turn", "a", 1, draw) - 1)
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).rotate(degrees)
        same = np.asarray(theirs) == randomly_turned(image, 120, 0, "a", 1, draw).permute(1, 2, 0).numpy()
        assert same.mean() > 0.97
    assert torch.equal(randomly_turned(image, 0, 0, "a", 0, 0), image)


def test_batches_are_half_labelled_and_in_rounds() -> None:
    detector = build(batch_size=7, steps_per_epoch=10)
    plan = detector.begin_training(30)
    known = {f"n{i}": Known(0, None) for i in range(10)} | {f"a{i}": Known(1, None) for i in range(8)}
    assert plan.batches is not None
    batches = plan.batches(known, 0)
    assert [sum(known[key].label for key in batch) for batch in batches] == [4] * 10
    assert {len(batch) for batch in batches} == {7}
    counts = Counter(key for batch in batches for key in batch)
    assert {counts[f"n{i}"] for i in range(10)} == {3} and {counts[f"a{i}"] for i in range(8)} == {5}
    assert plan.batches(dict(reversed(known.items())), 0) == batches != plan.batches(known, 1)
    for kept, missing in ((0, "labelled anomalous"), (1, "normal")):
        with pytest.raises(SpecError, match=f"devnet: none of [0-9]+ images to fit on is {missing}"):
            plan.batches({key: image for key, image in known.items() if image.label == kept}, 0)


def test_learning_rates_fall_and_gradients_are_cut() -> None:
    detector = build(decay_epochs=10, max_gradient_norm=0.05)
    plan = detector.begin_training(8)
    assert [plan.rate(done) for done in (0, 9.95, 10, 25.5)] == pytest.approx([1, 1, 0.1, 0.01])
    assert plan.max_gradient_norm == 0.05


def job(place: str, pattern: str | None, **words: object) -> FitSpec:
    source = {"uri": f"memory://{place}"} | ({"pattern": pattern} if pattern else {})
    params = {**CASE.sized(), "epochs": 1, "steps_per_epoch": 1}
    spec = parse_job(
        {
            "kind": "fit",
            "source": source,
            "detector": {"name": "devnet", "preset": "smoke", "params": params},
            "artifact": "memory://devnet/artifact",
            **words,
        },
        "devnet",
    )
    assert isinstance(spec, FitSpec)
    return spec


PATTERN = "{category}/train/{defect}/{name}.png"
NORMAL = normal_files(6)
SPOILT = [(f"widget/train/spot/{i}.png", encode(defect_image(i, DEFECTS[i % 3])[0])) for i in range(3)]


def test_a_fit_without_a_labelled_anomalous_image_is_refused_in_one_sentence() -> None:
    pack("memory://loose", "", NORMAL, 1)
    pack("memory://packed", ".tar", NORMAL, 1)
    pack("memory://both", "", [*NORMAL, *SPOILT], 1)
    for spec in (job("loose", PATTERN), job("both", None)):
        (sentence,) = find_problems(spec)
        assert sentence.startswith("source.pattern: devnet needs labelled anomalous images, and no path is labelled")
    assert find_problems(job("both", PATTERN)) == [] == find_problems(job("packed", PATTERN))
    assert find_problems(job("loose", PATTERN, detector={"name": "riad"})) == []
    for place in ("loose", "packed"):
        with pytest.raises(
            SpecError, match="devnet needs labelled anomalous images, and none of 5 is labelled anomalous"
        ):
            jobs.fit(job(place, PATTERN), lambda *_: None)
    facts = jobs.fit(job("both", PATTERN), lambda *_: None).facts
    assert facts["images"] == {"fitted": 8, "held_out": 1, "labelled_anomalous_left_out": 0, "bad": 0}


def test_every_category_of_a_fleet_needs_one() -> None:
    other = [(name.replace("widget", "gadget"), data) for name, data in NORMAL]
    pack("memory://two", "", [*NORMAL, *SPOILT, *other], 1)
    spec = job("two", PATTERN, per_category=True)
    (sentence,) = find_problems(spec)
    assert "no path of category 'gadget' is labelled" in sentence
    with pytest.raises(SpecError, match=r"category 'gadget': .*none of 5 is labelled anomalous"):
        jobs.fit(spec, lambda *_: None)
    pack("memory://two", "", [(name.replace("widget", "gadget"), data) for name, data in SPOILT], 1)
    assert find_problems(spec) == [] and jobs.fit(spec, lambda *_: None).facts["categories"] == 2


def test_in_python_labels_are_given_beside_the_images() -> None:
    words = {**CASE.sized(), "hidden_dims": [128, 64], "margin": 5.0, "epochs": 1, "steps_per_epoch": 2}
    images = IMAGES.permute(0, 2, 3, 1).numpy()
    for y in (None, [0] * 8):
        with pytest.raises(SpecError, match=r"devnet: needs labelled anomalous images\. Call fit\(images, y=labels\)"):
            create_model("devnet", "smoke", **words).fit(images, y)
    with pytest.raises(SpecError, match="usable normal image"):
        create_model("devnet", "smoke", **words).fit(images, [1] * 8)
    found = create_model("devnet", "smoke", **words).fit(images, y=np.array(LABELS))
    assert found.predict_proba(images).shape == (8,) and found.predict_anomaly_map(images).shape == (8, 64, 64)


def test_it_finds_the_kinds_of_defects_that_it_was_shown(real_data: Path, real_weights: Path) -> None:
    """Eight defects of the test images, of all kinds, are shown in the fit and left out of the evaluation."""
    words = {"weights": str(real_weights), "last_layer": "layer3", "image_size": [72, 72], "map": "patches"}
    detector = build_detector("devnet", {**words, "epochs": 5, "decay_epochs": 2, "steps_per_epoch": 5})
    detector.load_weights()
    test = read_bottles(real_data, "test", 72)
    kinds = [np.flatnonzero(test.defects == kind) for kind in np.unique(test.defects[test.labels == 1])]
    shown = np.array([kind[i] for i in range(8) for kind in kinds][:8])
    train = read_bottles(real_data, "train", 72).joined(test.only(shown))
    rest = test.only(np.setdiff1d(np.arange(len(test.names)), shown)[::2])
    gain = gain_by_training(detector, train, rest)
    assert gain.reaches(image=0.85, pixel=0) and gain.at_least(image=0.2, pixel=0)
