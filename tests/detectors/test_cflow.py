"""CFLOW-AD against autograd's Jacobian, loops and closed forms; on real images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.networks.flows import log_likelihood
from raydetect.blocks.seeding import keyed_generator, keyed_unit
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector, detector_class
from raydetect.detectors.cflow import CFlow, Fibres, LevelFlows, position_codes
from raydetect.errors import SpecError
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch

TINY = {"weights": "random", "backbone": "resnet18", "layers": ["layer1", "layer2"], "image_size": [32, 32]}
SMALL = {**TINY, "n_flows": 2, "position_dims": 8, "batch_size": 4, "fibre_batch": 40}


def built(**params: object) -> CFlow:
    detector = build_detector("cflow", {**SMALL, **params})
    assert isinstance(detector, CFlow)
    detector.load_weights()
    return detector


def images(count: int) -> Batch:
    return Batch(as_batch([normal_image(i, 32) for i in range(count)]), [f"image-{i}" for i in range(count)])


def restless(detector: CFlow) -> LevelFlows:
    """Flows with parameters far from where they begin."""
    flows = detector.networks["flows"]
    assert isinstance(flows, LevelFlows)
    with torch.no_grad():
        for number, value in enumerate(flows.parameters()):
            value += 0.1 * torch.randn(value.shape, generator=keyed_generator(number))
    return flows


@pytest.mark.parametrize("mixing", ["rotation", "permutation"])
def test_the_likelihood_is_the_change_of_variables_by_autograds_jacobian(mixing: str) -> None:
    detector = built(mixing=mixing)
    detector.begin_training(4)
    flows = restless(detector).double()
    features, codes = torch.randn(1, 3, 64, dtype=torch.float64), position_codes(8, 1, 3).double()[None]
    found = flows(Fibres(0, features, codes))
    for place in range(3):
        condition = codes[0, place : place + 1]

        def alone(x: torch.Tensor, condition: torch.Tensor = condition) -> torch.Tensor:
            return flows.flows[0](x[None], condition)[0][0]

        z = alone(features[0, place])
        log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(alone, features[0, place]))[1]
        density = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum() + log_det
        assert found[0, place].item() == pytest.approx(density.item() / 64, abs=1e-7)


def test_the_position_code_is_sines_and_cosines_of_column_and_row() -> None:
    dims, height, width = 12, 3, 5
    codes = position_codes(dims, height, width).view(height, width, dims)
    for row in range(height):
        for column in range(width):
            for k in range(dims // 4):
                rate = 10_000 ** (-4 * k / dims)
                expected = [f(place * rate) for place in (column, row) for f in (math.sin, math.cos)]
                at = [2 * k, 2 * k + 1, dims // 2 + 2 * k, dims // 2 + 2 * k + 1]
                assert codes[row, column, at].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_steps_of_two_workers_are_the_steps_of_one_cut_by_images() -> None:
    detector = built()
    whole = images(4)
    parts = [Batch(whole.images_BCHW[i::2], whole.keys[i::2]) for i in range(2)]
    together = detector.training_pieces(whole)
    shares = [detector.training_pieces(part) for part in parts]
    assert [p.level for p in together] == [p.level for p in shares[0]] == [p.level for p in shares[1]]
    assert len(together) == 64 // 10 + 16 // 10
    for step, *mine in zip(together, *shares, strict=True):
        assert step.features_BSC.shape[1] == 10
        for rank in range(2):
            torch.testing.assert_close(mine[rank].features_BSC, step.features_BSC[rank::2])
            assert torch.equal(mine[rank].codes_BSP, step.codes_BSP[rank::2])
    detector.begin_training(4)
    losses = [detector.training_loss(pieces[0]).item() for pieces in (together, *shares)]
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)


def test_every_position_comes_once_with_its_own_code_in_another_order_each_epoch() -> None:
    detector = built(fibre_batch=32, turn_degrees=0)
    batch = images(2)
    level = detector.networks["backbone"](batch.images_BCHW)[0]
    codes = position_codes(8, *level.shape[2:])
    orders = []
    for epoch in (0, 1):
        pieces = detector.training_pieces(Batch(batch.images_BCHW, batch.keys, epoch=epoch))
        mine = [piece for piece in pieces if piece.level == 0]
        features = torch.cat([piece.features_BSC for piece in mine], 1)
        message = torch.cat([piece.codes_BSP for piece in mine], 1)
        places = torch.cdist(message, codes.expand(2, -1, -1)).argmin(2)
        assert all(sorted(places[i].tolist()) == list(range(64)) for i in range(2))
        for i in range(2):
            assert torch.equal(features[i], level[i].flatten(1).T[places[i]])
        assert places[0].tolist() != places[1].tolist()
        orders.append(places.tolist())
    assert orders[0] != orders[1]


def test_an_image_is_turned_by_another_small_angle_in_each_epoch() -> None:
    detector = built(fibre_batch=256)  # all positions of the first level in one step
    batch = images(2)
    codes = position_codes(8, 8, 8)
    for epoch in (0, 7):
        degrees = [5 * (2 * keyed_unit(0, "turn", key, epoch) - 1) for key in batch.keys]
        pillow = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch.images_BCHW]
        turned = [np.asarray(image.rotate(angle)) for image, angle in zip(pillow, degrees, strict=True)]
        level = detector.networks["backbone"](torch.from_numpy(np.stack(turned)).permute(0, 3, 1, 2))[0]
        step = detector.training_pieces(Batch(batch.images_BCHW, batch.keys, epoch=epoch))[0]
        places = torch.cdist(step.codes_BSP, codes.expand(2, -1, -1)).argmin(2)
        for i in range(2):
            assert sorted(places[i].tolist()) == list(range(64))
            torch.testing.assert_close(step.features_BSC[i], level[i].flatten(1).T[places[i]], rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_softplus_of_minus_the_likelihood_per_dim_and_falls() -> None:
    detector = built(learning_rate=0.01)
    plan = detector.begin_training(4)
    piece = detector.training_pieces(images(4))[0]
    flow = detector.networks["flows"]
    assert isinstance(flow, LevelFlows)
    per_dim = log_likelihood(*flow.flows[0](piece.features_BSC.flatten(0, 1), piece.codes_BSP.flatten(0, 1))) / 64
    expected = torch.log1p(torch.exp(-per_dim)).mean()
    assert detector.training_loss(piece).item() == pytest.approx(expected.item(), rel=1e-5)
    losses = []
    for _ in range(30):
        loss = detector.training_loss(piece)
        plan.optimizer.zero_grad()
        loss.backward()
        plan.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not plan.all_in_every_step


def test_the_rate_climbs_and_then_falls_by_a_cosine_between_meta_epochs() -> None:
    rate = built(epochs=25, sub_epochs=8, warm_up_epochs=2).begin_training(4).rate

    def cosine(meta_epoch: int) -> float:
        return 0.001 + 0.999 * (1 + math.cos(math.pi * meta_epoch / 25)) / 2

    assert rate(0) == pytest.approx(0.1)
    assert rate(8) == pytest.approx((0.1 + cosine(2)) / 2)
    for passes in (16, 17.5, 23.9):
        assert rate(passes) == pytest.approx(cosine(2))
    assert rate(24) == pytest.approx(cosine(3)) and rate(199.9) == pytest.approx(cosine(24))
    assert built(epochs=2, sub_epochs=1, warm_up_epochs=0).begin_training(4).rate(0.5) == 1.0


def fitted() -> tuple[CFlow, Batch]:
    detector, batch = built(), images(5)
    detector.begin_training(5)
    restless(detector)
    detector.end_training()
    state = FitState()
    with torch.inference_mode():
        for part in (range(3), range(3, 5)):
            keys = [batch.keys[i] for i in part]
            state.add(keys, detector.collect(Batch(batch.images_BCHW[list(part)], keys)))
    detector.finish(state, lambda *_: None)
    return detector, batch


def test_the_map_orders_pixels_as_the_papers_sum_of_likelihoods_and_has_no_ceiling() -> None:
    detector, batch = fitted()
    strange = as_batch([defect_image(1, "blob", 32)[0], normal_image(90, 32)])
    scores = detector.score(strange)
    flows = detector.networks["flows"]
    assert isinstance(flows, LevelFlows)

    def grids(pictures: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for number, level in enumerate(detector.networks["backbone"](pictures)):
            height, width = level.shape[2:]
            rows = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])
            codes = position_codes(8, height, width).repeat(len(level), 1)
            likelihood = log_likelihood(*flows.flows[number](rows, codes)) / level.shape[1]
            found.append(likelihood.view(-1, height, width).double())
        return found

    highest = [grid.max() for grid in grids(batch.images_BCHW)]
    torch.testing.assert_close(flows.highest_L.double(), torch.stack(highest), rtol=1e-5, atol=1e-5)
    paper = torch.zeros(2, 32, 32, dtype=torch.float64)
    for grid, top in zip(grids(strange), highest, strict=True):
        paper += F.interpolate((grid - top).exp()[:, None], (32, 32), mode="bilinear")[:, 0]
    np.testing.assert_allclose(scores.anomaly_map_BHW.numpy(), -(paper / 2).log().numpy(), rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.image_score_B, scores.anomaly_map_BHW.flatten(1).amax(1))
    with torch.no_grad():
        flows.highest_L += 40  # the paper's sum is then 1e-17 everywhere; its ceiling minus it shows nothing more
    torch.testing.assert_close(detector.score(strange).anomaly_map_BHW, scores.anomaly_map_BHW + 40, rtol=0, atol=1e-4)


def test_its_other_name_means_it_and_epochs_below_the_warm_up_are_refused() -> None:
    assert detector_class("cflow_ad") is CFlow
    assert isinstance(build_detector("cflow_ad", {"n_flows": 3}), CFlow)
    with pytest.raises(SpecError, match="warm_up_epochs = 2 leaves nothing of epochs = 1"):
        build_detector("cflow", {"epochs": 1})


def test_it_finds_the_broken_bottles(real_data: Path, real_weights: Path) -> None:
    """The paper's settings but for backbone, levels, image size, passes and a learning rate to go with so few.

    Every second training and every third test image.
    """
    params = {"backbone": "resnet18", "weights": str(real_weights), "layers": ["layer2", "layer3"]}
    few = {"image_size": [96, 96], "epochs": 2, "sub_epochs": 1, "warm_up_epochs": 0, "learning_rate": 1e-3}
    few["turn_degrees"] = 0  # two passes are too few to learn rotated images besides
    detector = build_detector("cflow", {**params, **few})
    detector.load_weights()
    gain = gain_by_training(detector, *bottles_of(real_data, 96, 2, 3))
    assert gain.at_least(image=0.3, pixel=0.3)
    assert gain.losses[-1] < 0.7 * gain.losses[0]
    assert gain.reaches(image=0.94, pixel=0.94)
