"""Planted defects, and differences to nearest patches against loops."""

import numpy as np
import pytest
import torch

from raydetect.blocks.augment.simulated_defect import simulate_defect
from raydetect.blocks.search.difference import (
    NORMAL_PATCHES,
    DifferenceNet,
    Differences,
    NormalPatches,
    labelled_differences,
    mean_difference,
    nearest_others,
)
from raydetect.blocks.seeding import keyed_generator
from tests.builders.images import normal_image


def test_planted_defects_are_keyed_visible_inside_their_mask_and_nowhere_else() -> None:
    image = torch.from_numpy(normal_image(3, 64)).permute(2, 0, 1)
    before, shares = image.clone(), []
    for number in range(60):
        made, mask = simulate_defect(image, keyed_generator(0, number))
        assert made.dtype == torch.uint8 and torch.equal(made, simulate_defect(image, keyed_generator(0, number))[0])
        change = (made.float() - image.float()).abs().mean(0)
        assert (change[mask] > 8).all() and (change[~mask] <= 8).all()
        shares.append(mask.float().mean().item())
    assert torch.equal(image, before)
    assert np.mean(np.array(shares) > 0) > 0.8
    assert max(shares) < 0.5 and len(set(shares)) > 30


def test_neighbours_of_other_images_and_mean_differences_are_those_of_a_loop() -> None:
    patches, bank = torch.randn(6, 4), torch.randn(20, 4)
    own = torch.arange(20) % 3 == 0
    index = nearest_others(patches, bank, own, 5)
    found = mean_difference(patches, bank, index)
    for n in range(6):
        others = [m for m in range(20) if m % 3]
        others.sort(key=lambda m: float((patches[n] - bank[m]).norm()))
        assert index[n].tolist() == others[:5]
        expected = sum((patches[n] - bank[m]).abs() for m in others[:5]) / 5
        torch.testing.assert_close(found[n], expected)


def test_an_image_teaches_its_planted_and_its_normal_patches_with_equal_weight() -> None:
    patches, bank = torch.arange(400.0).view(20, 20, 1), torch.randn(30, 1)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:2, :6] = True  # the first three patches wholly
    mask[:1, 6:12:2] = True  # the next three by a quarter: neither normal nor planted
    nobody = torch.zeros(30, dtype=torch.bool)
    one = labelled_differences(patches, mask, bank, nobody, 2, keyed_generator(0))
    assert one.simulated_N.sum() == 3 and len(one.simulated_N) == 3 + NORMAL_PATCHES
    assert one.weight_N[one.simulated_N == 1].sum().item() == pytest.approx(0.5)
    assert one.weight_N[one.simulated_N == 0].sum().item() == pytest.approx(0.5)
    flat = patches.flatten(0, 1)

    def differences(rows: torch.Tensor) -> torch.Tensor:
        return mean_difference(rows, bank, nearest_others(rows, bank, nobody, 2))

    torch.testing.assert_close(one.values_ND[:3], differences(flat[:3]))
    assert not torch.isin(one.values_ND, differences(flat[3:6])).any()
    normal = labelled_differences(patches, torch.zeros_like(mask), bank, nobody, 2, keyed_generator(0))
    assert normal.simulated_N.sum() == 0 and normal.weight_N.sum().item() == pytest.approx(1)
    both = Differences.joined([one, normal])
    assert both.weight_N.sum().item() == pytest.approx(2) and len(both.values_ND) == 3 + 2 * NORMAL_PATCHES
    net = DifferenceNet(1, 4)
    losses = [net.loss(piece).item() for piece in (one, normal, both)]
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    nothing = labelled_differences(patches[:1, 3:4], mask[:2, 6:8], bank, nobody, 2, keyed_generator(0))
    assert len(nothing.values_ND) == 0 and net.loss(nothing).item() == 0
    assert net.loss(Differences.joined([one, nothing])).item() == pytest.approx(losses[0], rel=1e-5)


def test_fewer_normal_patches_than_neighbours_are_all_compared_with() -> None:
    bank, patches = torch.randn(3, 4), torch.randn(5, 4)
    normal = NormalPatches(bank, 7)
    torch.testing.assert_close(normal.distance(patches), torch.cdist(patches, bank).mean(1))
    torch.testing.assert_close(normal.difference(patches), (patches[:, None] - bank).abs().mean(1))


def test_to_differ_more_always_means_to_be_more_anomalous() -> None:
    torch.manual_seed(0)
    net = DifferenceNet(6, 8)
    with torch.no_grad():
        for value in net.parameters():
            value += torch.randn_like(value)
    differences = torch.rand(50, 6).requires_grad_()
    (slope,) = torch.autograd.grad(net(differences).sum(), differences)
    assert (slope > 0).all()


def test_the_network_learns_which_dims_tell_and_a_constant_is_no_minimum() -> None:
    """Dims that differ among normal patches as well lose their say; the loss falls well below that of any constant."""
    torch.manual_seed(0)
    random = keyed_generator(1)
    net = DifferenceNet(6, 8)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(300):
        anomalous = torch.arange(64) % 2
        differences = torch.rand(64, 6, generator=random)
        differences[:, :3] *= 0.2
        differences[anomalous == 1, :3] += 0.3
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(differences), anomalous.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35 < np.log(2)
    base = torch.full((6,), 0.4)
    gains = [(net((base + 0.3 * torch.eye(6)[d])[None]) - net(base[None])).item() for d in range(6)]
    assert min(gains[:3]) > 2 * max(gains[3:])
