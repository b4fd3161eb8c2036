"""APRIL-GAN against loops in float64 and autograd through them, on random weights."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from raydetect.artifacts.store import load_artifact, read_record
from raydetect.blocks.augment.mosaic import mosaic
from raydetect.blocks.backbones.clip import TINY_WORDS, TextTower
from raydetect.blocks.backbones.prompts import SCENE_TEMPLATES
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.config import FitSpec, parse_job
from raydetect.detectors._base import Batch, Known
from raydetect.detectors._registry import build_detector
from raydetect.detectors.aprilgan import AprilGAN
from raydetect.errors import SpecError
from raydetect.local import jobs
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.auxiliary import MASKED
from tests.builders.group import together
from tests.builders.images import DEFECTS, defect_image, normal_image
from tests.contracts import cases
from tests.contracts.cases import as_batch
from tests.reference import aprilgan as plain

SIZE = 32
PROMPTS = {"prompts_normal": ["a good {}"], "prompts_anomalous": ["a broken {}", "a {} with a hole"]}
FEW = {**PROMPTS, "image_size": [SIZE, SIZE]}


def build(**params: Any) -> AprilGAN:
    detector = build_detector("april_gan", {**FEW, **params}, preset="smoke")
    assert isinstance(detector, AprilGAN)
    detector.load_weights()
    return detector


def picture(number: int) -> np.ndarray:
    return normal_image(number, SIZE)


def collected(detector: AprilGAN, numbers: list[int], group: Group | None = None) -> FitState:
    state = FitState(group)
    with torch.inference_mode():
        for number in numbers:
            state.add([f"{number:02d}"], detector.collect(Batch(as_batch([picture(number)]), [f"{number:02d}"])))
    state.agree()
    return state


def fitted(**params: Any) -> AprilGAN:
    detector = build(**params)
    detector.begin_training(1)
    detector.end_training()
    detector.finish(collected(detector, list(range(detector.params.k_shot))), lambda *_: None)
    return detector


def slow(detector: AprilGAN) -> plain.Reference:
    tower = detector.tower()
    adapters = detector.networks["adapters"]
    return plain.Reference(tower.visual, tower.pixel_mean, tower.pixel_std, adapters, detector.params.layers)


def slow_level(reference: plain.Reference, normal: list[list[torch.Tensor]], words: torch.Tensor) -> float:
    """The mean highest value of maps of normal images, each compared with the others."""
    highest = []
    for i, tokens in enumerate(normal):
        others = [other for j, other in enumerate(normal) if j != i] or [tokens]
        text = torch.stack(reference.text_maps(tokens, words, 0.01, SIZE)).sum(0)
        highest.append(float((text + reference.memory_map(tokens, others, SIZE)).max()))
    return sum(highest) / len(highest)


@pytest.mark.parametrize(("k_shot", "layers"), [(0, (1, 2)), (1, (1, 2)), (3, (2,))])
def test_scores_and_maps_are_those_of_loops(k_shot: int, layers: tuple[int, ...]) -> None:
    detector = fitted(k_shot=k_shot, layers=layers)
    reference = slow(detector)
    assert detector.words_2D is not None
    words = detector.words_2D.double()
    tested = [picture(900), defect_image(1, "blob", SIZE)[0]]
    scores = detector.score(as_batch(tested))
    normal = [reference.embed(picture(number))[1] for number in range(k_shot)]
    for i, image in enumerate(tested):
        whole_D, tokens = reference.embed(image)
        logits = words.numpy() @ whole_D / 0.01
        score = np.exp(logits[1]) / np.exp(logits).sum()
        map_HW = torch.stack(reference.text_maps(tokens, words, 0.01, SIZE)).sum(0)
        if k_shot:
            map_HW = map_HW + reference.memory_map(tokens, normal, SIZE)
            level = slow_level(reference, normal, words)
            assert detector.facts()["normal_level"] == pytest.approx(level, rel=1e-4)
            spread = max(2 * len(layers) - level, 1)
            score = (score + (float(map_HW.max()) - level) / spread) / 2
        torch.testing.assert_close(scores.anomaly_map_BHW[i].double(), map_HW.detach(), rtol=1e-3, atol=1e-5)
        assert float(scores.image_score_B[i]) == pytest.approx(score, rel=1e-3, abs=1e-5)


def labelled_batch(**changes: Any) -> Batch:
    """Three images with defects and one without, of three categories; one has none."""
    pairs = [defect_image(i, kind, SIZE) for i, kind in enumerate(DEFECTS)]
    images = [image for image, _ in pairs] + [picture(5)]
    masks = torch.from_numpy(np.stack([mask for _, mask in pairs] + [np.zeros((SIZE, SIZE), bool)]))
    categories = ["bolt", "metal_nut", "bolt", None]
    return Batch(as_batch(images), list("abcd"), None, masks_BHW=masks, categories=categories, **changes)


def test_the_loss_and_its_gradients_are_those_of_loops() -> None:
    detector, batch = build(class_name="part"), labelled_batch()
    detector.begin_training(4)
    reference = slow(detector)
    text = detector.networks["text"]
    assert isinstance(text, TextTower) and batch.masks_BHW is not None
    losses = []
    for image, mask_HW, category in zip(batch.images_BCHW, batch.masks_BHW, batch.categories, strict=True):
        _, tokens = reference.embed(image.permute(1, 2, 0).numpy())
        words = detector.embed_words(category or "part").clone().double()
        maps = reference.text_maps(tokens, words, 0.01, SIZE)
        losses.append(torch.stack([plain.loss_of(map_HW, mask_HW, 2.0) for map_HW in maps]).sum())
    expected = torch.stack(losses).mean()
    expected.backward()
    found = detector.training_loss(batch)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    adapters: Any = detector.networks["adapters"]
    for mine, theirs in zip(adapters, reference.adapters, strict=True):
        largest = float(theirs.weight.grad.abs().max())
        torch.testing.assert_close(mine.weight.grad.double(), theirs.weight.grad, rtol=1e-2, atol=1e-4 * largest)
    assert all(p.grad is None for name in ("image", "text") for p in detector.networks[name].parameters())


def test_words_are_the_normalised_mean_of_normalised_embeddings() -> None:
    detector = build(prompts_normal=None, prompts_anomalous=None, class_name="metal nut")
    normal, anomalous = detector.prompts("metal nut")
    assert len(SCENE_TEMPLATES) == len(set(SCENE_TEMPLATES)) == 35
    assert (len(set(normal)), len(set(anomalous))) == (7 * 35, 5 * 35)
    for text in ("a photo of my broken metal nut.", "this is one metal nut with flaw in the scene."):
        assert text in anomalous
    assert "a low resolution photo of the unblemished metal nut." in normal
    text_tower = detector.networks["text"]
    assert isinstance(text_tower, TextTower) and detector.words_2D is not None
    single = [text_tower.embed([one])[0].double() for one in anomalous]
    mean = torch.stack([one / one.norm() for one in single]).mean(0)
    torch.testing.assert_close(detector.words_2D[1].double(), mean / mean.norm(), rtol=1e-4, atol=1e-6)


def test_the_optimizer_is_the_published_one() -> None:
    plan = build().begin_training(10)
    (group,) = plan.optimizer.param_groups
    assert isinstance(plan.optimizer, torch.optim.Adam)
    assert (group["betas"], group["weight_decay"], plan.rate(3)) == ((0.5, 0.999), 0, 1)
    assert {id(p) for p in group["params"]} == {id(p) for p in plan.module.parameters()}
    assert [tuple(p.shape) for p in plan.module.parameters()] == [(32, 64), (32,)] * 2
    assert build_detector("aprilgan", {}).params.layers == (6, 12, 18, 24)  # type: ignore[attr-defined]
    assert TINY_WORDS["vision_cfg"]["width"] == 64


@pytest.mark.parametrize("seed", [0, 1])
def test_training_learns_to_find_defects(seed: int) -> None:
    """With random weights of CLIP, the map by text is chance before the steps, and finds unseen defects after them."""
    learnt = [defect_image(i, DEFECTS[i % 3], 64) for i in range(192)]
    learnt += [(normal_image(i, 64), np.zeros((64, 64), bool)) for i in range(64)]
    images, masks = as_batch([image for image, _ in learnt]), torch.from_numpy(np.stack([mask for _, mask in learnt]))
    detector = build_detector("aprilgan", {"image_size": [64, 64], "learning_rate": 3e-3}, seed, preset="smoke")
    detector.load_weights()
    plan = detector.begin_training(len(images))
    detector.finish(FitState(), lambda *_: None)
    tested, _, tested_masks = cases.test_images()

    def pixel_auroc() -> float:
        return float(roc_auc_score(tested_masks.ravel(), cases.score(detector, tested).anomaly_map_BHW.ravel()))

    before = pixel_auroc()
    plan.module.requires_grad_(True)
    for epoch in range(35):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(plan.batch_size):
            names = [str(i) for i in chosen.tolist()]
            batch = Batch(images[chosen], names, masks_BHW=masks[chosen], categories=["object"] * len(names))
            plan.optimizer.zero_grad()
            detector.training_loss(batch).backward()
            plan.optimizer.step()
    detector.end_training()
    assert before < 0.65 and pixel_auroc() > 0.85


def test_a_mosaic_has_four_shrunk_images_and_masks() -> None:
    images = torch.stack([torch.full((3, 8, 7), value, dtype=torch.uint8) for value in (10, 20, 30, 40)])
    masks = torch.stack([torch.full((8, 7), number in (1, 2)) for number in range(4)])
    masks[3, :2] = True  # becomes the first row of the last quarter
    image_CHW, mask_HW = mosaic(images, masks)
    assert image_CHW.shape == (3, 8, 7) and image_CHW.dtype == torch.uint8 and mask_HW.dtype == torch.bool
    assert image_CHW[0, 3, 2:4].tolist() == [10, 20] and image_CHW[0, 4, 2:4].tolist() == [30, 40]
    assert mask_HW[0].tolist() == [False] * 3 + [True] * 4 and mask_HW[4].all()
    assert mask_HW[7].tolist() == [True] * 3 + [False] * 4
    noise = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    shrunk = torch.nn.functional.interpolate(noise.float(), size=(4, 4), mode="bilinear", antialias=True).round()
    found, _ = mosaic(noise, masks[:, :, :1].expand(-1, -1, 8))
    assert torch.equal(found[:, 4:, :4].float(), shrunk[2])


def mosaics(detector: AprilGAN, known: Mapping[str, Known], epoch: int = 0) -> list[list[str]]:
    batches = detector.begin_training(len(known)).batches
    assert batches is not None
    return batches(known, epoch)


def test_a_share_of_items_are_mosaics_of_one_category() -> None:
    detector = build(mosaic_ratio=0.25, batch_size=8)
    known = {f"{category}{i:03d}": Known(i % 2, category) for category in ("bolt", "nut") for i in range(203)}
    plan = detector.begin_training(len(known))
    assert (plan.images_per_item, plan.batch_size) == (4, 32)
    batches = mosaics(detector, known)
    assert {len(batch) for batch in batches} == {28, 32} and mosaics(detector, dict(reversed(known.items()))) == batches
    assert mosaics(detector, known, 1) != batches
    items = [batch[start : start + 4] for batch in batches for start in range(0, len(batch), 4)]
    assert len(items) == len(known) and all(len({known[key].category for key in item}) == 1 for item in items)
    once = [item[0] for item in items if len(set(item)) == 1]
    assert 0.19 < 1 - len(once) / len(items) < 0.31 and max(Counter(once).values()) == 1


def test_mosaics_are_put_together_where_they_were_drawn() -> None:
    detector = build(mosaic_ratio=0.5)
    whole = [number for number in range(20) if detector._is_mosaic(2, number)]
    kinds = (whole[0], next(number for number in range(20) if number not in whole))
    images = as_batch([picture(i) for i in range(8)])
    masks = torch.rand(8, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.3
    draws = [4 * number + quarter for number in kinds for quarter in range(4)]
    categories = ["bolt"] * 4 + ["nut"] * 4
    batch = Batch(images, list("abcdeeee"), [0] * 8, 2, draws, masks, categories)
    (piece,) = detector.training_pieces(batch)
    assert piece.masks_BHW is not None and piece.keys == ["a", "e"] and piece.categories == ["bolt", "nut"]
    expected = mosaic(images[:4], masks[:4])
    assert torch.equal(piece.images_BCHW[0], expected[0]) and torch.equal(piece.masks_BHW[0], expected[1])
    assert torch.equal(piece.images_BCHW[1], images[4]) and torch.equal(piece.masks_BHW[1], masks[4])
    plain_batch = labelled_batch()
    assert build().training_pieces(plain_batch) == [plain_batch]


def test_a_class_name_can_be_said_at_any_time() -> None:
    images = as_batch([picture(900)])
    expected = fitted(k_shot=2, class_name="screw").score(images)
    changed = fitted(k_shot=2)
    assert not torch.equal(changed.score(images).image_score_B, expected.image_score_B)
    loaded = build(k_shot=2)
    loaded.load_tensors(changed.tensors())
    for detector in (changed, loaded):
        detector.set_class_name("screw")
        assert torch.equal(detector.score(images).image_score_B, expected.image_score_B)
        assert torch.equal(detector.score(images).anomaly_map_BHW, expected.anomaly_map_BHW)
    small = fitted(k_shot=2, keep_text_tower=False)
    assert len(small.tensors()) < len(changed.tensors())
    with pytest.raises(SpecError, match="aprilgan: has no text tower"):
        small.set_class_name("screw")


def test_two_workers_fit_the_same_memory_as_one() -> None:
    expected = fitted(k_shot=3).tensors()
    detectors = [build(k_shot=3) for _ in range(3)]
    for detector in detectors:
        detector.begin_training(1)
        detector.end_training()

    def work(group: Group) -> dict[str, torch.Tensor]:
        state = collected(detectors[group.rank], ([2, 0], [1], [])[group.rank], group)
        detectors[group.rank].finish(state, lambda *_: None)
        return detectors[group.rank].tensors()

    for tensors in together(3, work):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def fit_job(artifact: str, **changes: Any) -> FitSpec:
    values: dict[str, Any] = {
        "kind": "fit",
        "source": {"uri": "memory://april/normal"},
        "auxiliary": {"uri": "memory://april/other", **MASKED},
        "detector": {"name": "aprilgan", "preset": "smoke", "params": {**FEW, "k_shot": 2, "epochs": 2}},
        "artifact": f"memory://april/{artifact}",
        "resources": {"cpus_per_worker": 1},
        **changes,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    return spec


def test_extending_keeps_the_training_and_compares_with_new_images() -> None:
    pack("memory://april/normal", "", normal_files(8), 1)
    pack("memory://april/new", "", normal_files(8, 500), 1)
    pack("memory://april/other", ".tar", mixed_files(4, 2), 1)
    jobs.fit(fit_job("first"), lambda *_: None)
    changes = {"auxiliary": None, "extend": "memory://april/first", "source": {"uri": "memory://april/new"}}
    jobs.fit(fit_job("second", **changes), lambda *_: None)
    first, second = (load_artifact(f"memory://april/{name}", Storage()).detector for name in ("first", "second"))
    old, new = first.tensors(), second.tensors()
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith(("adapters.", "image.", "text")))
    assert not torch.equal(old["memory.1"], new["memory.1"]) and old["memory.1"].shape == new["memory.1"].shape
    record = read_record("memory://april/first", Storage()).body
    assert record["auxiliary"] == {"images": 10, "categories": ["widget"], "bad": 0}
    zero = fitted()
    with pytest.raises(SpecError, match="k_shot: 0 compares with no image"):
        zero.extend(FitState())
