"""Rotation against Pillow, planted defects, and differences to nearest patches against loops."""

import numpy as np
import pytest
import torch
from PIL import Image

from raydetect.blocks.difference import (
    NORMAL_PATCHES,
    DifferenceNet,
    joined,
    labelled_differences,
    mean_difference,
    nearest_others,
)
from raydetect.blocks.planted import AREA, plant
from raydetect.blocks.seeding import keyed_generator
from raydetect.blocks.transforms import Transforms, relit, rotate
from tests.made.images import normal_image


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0, -137.5, 180.0])
def test_nearest_rotation_is_pillows(shape: tuple[int, int], degrees: float) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None]
    expected = np.asarray(Image.fromarray(picture).rotate(degrees, Image.Resampling.NEAREST))
    assert (rotate(image, [degrees])[0].permute(1, 2, 0).numpy() == expected).all(-1).mean() > 0.995
    both = rotate(torch.cat([image, image]), [degrees, 45.0])
    assert torch.equal(both[:1], rotate(image, [degrees]))


def test_turning_back_bilinearly_restores_the_inside() -> None:
    rows, columns = np.mgrid[:40, :40] / 40
    image = torch.from_numpy(np.sin(5 * rows) + np.cos(4 * columns))[None, None].float()
    back = rotate(rotate(image, [33.0], "bilinear"), [-33.0], "bilinear")
    assert (back - image)[..., 12:28, 12:28].abs().max() < 0.02


def test_light_is_changed_by_its_shares() -> None:
    image = torch.tensor([[40, 60], [80, 100]], dtype=torch.uint8).expand(2, 3, 2, 2)
    changed = relit(image, [0.5, 0.0], [0.0, -0.5])
    assert changed[0, 0].tolist() == [[60, 90], [120, 150]]
    assert changed[1, 0].tolist() == [[55, 65], [75, 85]]
    assert relit(image, [0.0, 0.0], [0.0, 0.0]) is image


def test_even_transforms_are_spread_over_all_angles_and_random_ones_are_keyed() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    transforms = Transforms(0, 90.0)
    turns = [transforms.even(images, number, 4) for number in range(4)]
    assert [degrees for _, degrees in turns] == [-90.0, -45.0, 0.0, 45.0]
    assert torch.equal(turns[2][0], images) and torch.equal(turns[0][0], torch.rot90(images, -1, (2, 3)))
    whole = transforms.random(images, ["a", "b"], 3)
    assert torch.equal(whole[1:], transforms.random(images[1:], ["b"], 3))
    assert not torch.equal(whole, transforms.random(images, ["a", "b"], 4))


def test_planted_defects_are_keyed_visible_inside_their_mask_and_nowhere_else() -> None:
    image = torch.from_numpy(normal_image(3, 64)).permute(2, 0, 1)
    before, shares = image.clone(), []
    for number in range(60):
        planted, mask = plant(image, keyed_generator(0, number))
        again, _ = plant(image, keyed_generator(0, number))
        assert torch.equal(planted, again)
        change = (planted.float() - image.float()).abs().mean(0)
        assert (change[mask] > 8).all() and (change[~mask] <= 8).all()
        shares.append(mask.float().mean().item())
    assert torch.equal(image, before)
    assert np.mean(np.array(shares) > 0) > 0.8
    assert max(shares) < 1.2 * AREA[1] and len(set(shares)) > 30


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
    patches, bank = torch.arange(400.0)[:, None], torch.randn(30, 1)
    covered = torch.zeros(400)
    covered[:3], covered[3:6] = 0.9, 0.2  # the latter are neither normal nor wholly planted
    nobody = torch.zeros(30, dtype=torch.bool)
    one = labelled_differences(patches, covered, bank, nobody, 2, keyed_generator(0))
    assert one.planted_N.sum() == 3 and len(one.planted_N) == 3 + NORMAL_PATCHES
    assert one.weight_N[one.planted_N == 1].sum().item() == pytest.approx(0.5)
    assert one.weight_N[one.planted_N == 0].sum().item() == pytest.approx(0.5)
    torch.testing.assert_close(
        one.values_ND[:3], mean_difference(patches[:3], bank, nearest_others(patches[:3], bank, nobody, 2))
    )
    normal = labelled_differences(patches, torch.zeros(400), bank, nobody, 2, keyed_generator(0))
    assert normal.planted_N.sum() == 0 and normal.weight_N.sum().item() == pytest.approx(1)
    both = joined([one, normal])
    assert both.weight_N.sum().item() == pytest.approx(2) and len(both.values_ND) == 3 + 2 * NORMAL_PATCHES
    beside = labelled_differences(patches[3:6], torch.zeros(3), bank, nobody, 2, keyed_generator(0)).values_ND
    assert not torch.isin(one.values_ND, beside).any()


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
        planted = torch.arange(64) % 2
        differences = torch.rand(64, 6, generator=random)
        differences[:, :3] *= 0.2
        differences[planted == 1, :3] += 0.3
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(differences), planted.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35 < np.log(2)
    base = torch.full((6,), 0.4)
    gains = [(net((base + 0.3 * torch.eye(6)[d])[None]) - net(base[None])).item() for d in range(6)]
    assert min(gains[:3]) > 2 * max(gains[3:])
