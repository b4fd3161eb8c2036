"""RIAD against slow code, and the property that it stands on: what is hidden cannot be seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.riad import RIAD, InpaintingNet, disjoint_masks
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch
from tests.reference import images as plain

SMALL = {"image_size": [64, 64], "base_width": 4, "smoothing_px": 5, "grid_size": [4, 8], "learning_rate": 3e-3}


def trained(steps: int, **params: object) -> tuple[RIAD, list[float]]:
    detector = build_detector("riad", {**SMALL, **params})
    assert isinstance(detector, RIAD)
    detector.load_weights()
    plan = detector.begin_training(8)
    images, losses = as_batch([normal_image(i, 64) for i in range(8)]), []
    for step in range(steps):
        loss = detector.training_loss(Batch(images, [str(i) for i in range(8)], epoch=step))
        plan.optimizer.zero_grad()
        loss.backward()
        plan.optimizer.step()
        losses.append(loss.item())
    detector.end_training()
    return detector, losses


@pytest.mark.parametrize(("size_px", "cell_px", "sets"), [((32, 48), 8, 3), ((33, 40), 4, 2), ((20, 20), 16, 3)])
def test_masks_are_disjoint_equal_grids_that_cover_everything(
    size_px: tuple[int, int], cell_px: int, sets: int
) -> None:
    masks = disjoint_masks(size_px, cell_px, sets, keyed_generator(0, "m"))
    assert masks.shape == (sets, *size_px) and (masks.sum(0) == 1).all()
    cells = masks[:, ::cell_px, ::cell_px]
    for r, c in np.ndindex(*size_px):
        assert torch.equal(masks[:, r, c], cells[:, r // cell_px, c // cell_px])
    counts = cells.sum((1, 2))
    assert counts.max() - counts.min() <= 1
    others = [disjoint_masks(size_px, cell_px, sets, keyed_generator(0, "m", i)) for i in range(8)]
    assert any(not torch.equal(masks, other) for other in others)


def test_what_a_set_leaves_out_cannot_be_seen_by_what_paints_it() -> None:
    detector, _ = trained(3)
    images = as_batch([normal_image(70, 64)]).float() / 255
    masks = disjoint_masks((64, 64), 8, 3, keyed_generator(0, "m"))[None]
    with torch.inference_mode():
        before = detector._painted(images, masks)
        for number in range(3):
            hidden = masks[:, number : number + 1]
            changed = torch.where(hidden, torch.rand(images.shape), images)
            after = detector._painted(changed, masks)
            here = hidden.expand_as(images)
            assert torch.equal(after[here], before[here])
            assert not torch.equal(after[~here], before[~here])


def test_the_loss_is_equation_5_and_falls() -> None:
    detector, losses = trained(25, ssim_weight=0.7, msgms_weight=1.3)
    assert losses[-1] < 0.6 * losses[0]
    image = as_batch([normal_image(3, 64)])
    generator = keyed_generator(detector.seed, "riad", "key", 5)
    cell_px = (4, 8)[int(torch.randint(2, (), generator=generator))]
    masks = disjoint_masks((64, 64), cell_px, 3, generator)[None]
    with torch.inference_mode():
        found = detector.training_loss(Batch(image, ["key"], epoch=5)).item()
        painted = detector._painted(image.float() / 255, masks)[0].numpy()
    truth = image[0].numpy() / 255
    alike = np.mean([plain.ssim_map(a, b) for a, b in zip(painted, truth, strict=True)])
    expected = np.mean((painted - truth) ** 2) + 0.7 * (1 - alike) + 1.3 * plain.msgms_loss(painted, truth)
    assert found == pytest.approx(expected, rel=1e-4)


def upsampled(plane: np.ndarray, side: int) -> np.ndarray:
    """Bilinear with pixel centres and repeated edges, by scipy."""
    return zoom(plane, side / len(plane), order=1, mode="nearest", grid_mode=True)


def test_the_map_is_the_smoothed_dissimilarity_over_scales_and_cells() -> None:
    detector, _ = trained(2)
    images = as_batch([defect_image(1, "blob", 64)[0]])
    scores = detector.score(images)
    truth, maps = images[0].numpy() / 255, []
    for cell_px in (4, 8):
        masks = disjoint_masks((64, 64), cell_px, 3, keyed_generator(detector.seed, "riad", "score", cell_px))
        with torch.inference_mode():
            painted = detector._painted(images.float() / 255, masks[None])[0].double().numpy()
        first, second, alike = painted, truth, []
        for _ in range(4):
            alike.append(upsampled(plain.gms_map(first, second), 64))
            first, second = plain.halved(first), plain.halved(second)
        maps.append(1 - np.mean(alike, 0))
    rough = np.mean(maps, 0)
    for r, c in np.ndindex(64, 64):
        window = rough[max(r - 2, 0) : r + 3, max(c - 2, 0) : c + 3]
        assert scores.anomaly_map_BHW[0, r, c].item() == pytest.approx(window.mean(), abs=1e-4)
    assert scores.image_score_B[0] == scores.anomaly_map_BHW[0].max()


def test_one_cell_size_means_that_size_alone() -> None:
    detector, _ = trained(2)
    images = as_batch([normal_image(77, 64), defect_image(3, "spot", 64)[0]])
    maps = []
    for grid_size in (4, 8):
        other = build_detector("riad", {**SMALL, "grid_size": grid_size})
        other.load_tensors(detector.tensors())
        maps.append(other.score(images).anomaly_map_BHW)
    assert not torch.equal(maps[0], maps[1])
    torch.testing.assert_close(torch.stack(maps).mean(0), detector.score(images).anomaly_map_BHW, rtol=1e-4, atol=1e-6)


def test_the_rate_drops_to_a_tenth_after_five_sixths() -> None:
    plan = build_detector("riad", {**SMALL, "epochs": 300}).begin_training(8)
    assert [plan.rate(epoch) for epoch in (0, 249.9, 250, 299)] == [1, 1, 0.1, 0.1]


def test_a_pretrained_encoder_takes_the_place_of_the_own_one_and_stays_as_it_is() -> None:
    words = {"backbone": "resnet18", "weights": "random"}
    detector, losses = trained(12, **words)
    assert losses[-1] < 0.8 * losses[0]
    encoder, unet = detector.networks["encoder"], detector.networks["unet"]
    assert isinstance(encoder, Backbone) and isinstance(unet, InpaintingNet)
    assert encoder.digest() == Backbone("resnet18", ("layer1", "layer2", "layer3"), 0).digest()
    assert unet.multiple == 16 and len(unet.down) == 1 and len(unet.grow) == 3
    other = build_detector("riad", {**SMALL, **words})
    other.load_tensors(detector.tensors())
    images = as_batch([normal_image(77, 64), defect_image(3, "spot", 64)[0]])
    assert torch.equal(detector.score(images).anomaly_map_BHW, other.score(images).anomaly_map_BHW)
    encoder.trunk.load_state_dict({name: 0 * value for name, value in encoder.weights().items()}, strict=False)
    encoder.freeze()
    assert not torch.equal(detector.score(images).anomaly_map_BHW, other.score(images).anomaly_map_BHW)


def test_it_finds_the_broken_bottles_and_did_not_before_its_steps(real_data: Path) -> None:
    """A narrow network at 64 px, 3 epochs of 300 at 30 times the rate; every second test image."""
    params: dict[str, Any] = {"base_width": 8, "grid_size": [4, 8], "epochs": 3, "learning_rate": 3e-3}
    detector = build_detector("riad", {"image_size": [64, 64], **params})
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 64))
    assert gain.at_least(image=0.3, pixel=0.3)
    assert gain.reaches(image=0.93, pixel=0.9)
