"""Cutting and pasting on images whose pixels tell where they come from; light and place against closed forms."""

import math

import numpy as np
import pytest
import torch

from raydetect.blocks.augment import cut_and_paste
from raydetect.blocks.seeding import keyed_generator

HEIGHT, WIDTH = 60, 80
AREA, ASPECT = (0.02, 0.15), (0.3, 3.3)


def addresses(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Every pixel holds its row, its column and nothing, as shares of 128."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).float() / 128


def moved(before: torch.Tensor, after: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Places (row, column) of changed pixels, and the places that they show."""
    changed = (before != after).any(0).numpy()
    shown = (after[:2, torch.from_numpy(changed)] * 128).round().long().numpy().T
    return np.argwhere(changed), shown


def test_cutpaste_moves_a_rectangle_of_the_stated_sizes_and_leaves_the_rest() -> None:
    image = addresses()
    areas, aspects, offsets = [], [], set()
    for number in range(300):
        made = cut_and_paste.paste_patch(image, AREA, ASPECT, 0.0, keyed_generator(0, "test", number))
        places, shown = moved(image, made)
        if not len(places):
            continue  # pasted where it was cut
        tall, wide = places.max(0) - places.min(0) + 1
        assert len(places) == tall * wide
        assert len(np.unique(shown - places, axis=0)) == 1
        offsets.add(tuple((shown - places)[0]))
        areas.append(tall * wide / (HEIGHT * WIDTH))
        aspects.append(wide / tall)
        half = (tall + wide) / 2 / (HEIGHT * WIDTH)  # what rounding both sides can change
        assert AREA[0] - half <= areas[-1] <= AREA[1] + half
        assert ASPECT[0] * (1 - 1 / tall - 1 / wide) <= aspects[-1] <= ASPECT[1] * (1 + 1 / tall + 1 / wide)
    assert len(areas) > 290 and len(offsets) > 250
    assert np.mean(areas) == pytest.approx(np.mean(AREA), abs=0.01)
    assert np.mean(np.log(aspects)) == pytest.approx(0.0, abs=0.15)
    assert torch.equal(image, addresses())


@pytest.mark.parametrize(("height", "width", "degrees"), [(20, 5, 33.0), (7, 16, -45.0), (1, 9, 10.0), (24, 2, -71.5)])
def test_a_turned_patch_shows_at_every_pixel_what_turns_there(height: int, width: int, degrees: float) -> None:
    rotated, mask = cut_and_paste.rotated(addresses(height, width), degrees)
    tall, wide = mask.shape
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for row, column in np.argwhere(mask.numpy()):
        from_row, from_column = (rotated[:2, row, column] * 128).round().tolist()
        down, across = from_row - (height - 1) / 2, from_column - (width - 1) / 2
        # counter-clockwise, rows growing downwards: a point to the right goes up
        lands = cosine * down - sine * across + (tall - 1) / 2, sine * down + cosine * across + (wide - 1) / 2
        assert math.dist(lands, (row, column)) <= math.sqrt(0.5) + 1e-5
    assert abs(int(mask.sum()) - height * width) <= height + width


def test_quarter_turns_are_exact() -> None:
    patch = addresses(4, 7)
    for quarters, degrees in enumerate([0.0, 90.0, 180.0]):
        rotated, mask = cut_and_paste.rotated(patch, degrees)
        assert mask.all() and torch.equal(rotated, torch.rot90(patch, quarters, (1, 2)))


def test_a_scar_is_long_thin_turned_and_from_one_place() -> None:
    image, angles = addresses(), []
    for number in range(100):
        made = cut_and_paste.paste_scar(image, (2, 4), (15, 25), 45.0, 0.0, keyed_generator(0, "test", number))
        places, _ = moved(image, made)
        assert 2 * 15 * 0.6 <= len(places) <= 4 * 25 * 1.4
        spread, axes = np.linalg.eigh(np.cov((places - places.mean(0)).T))
        assert spread[1] > 5 * spread[0]
        angles.append(math.degrees(math.atan(axes[1, 1] / axes[0, 1])))  # from upright
    assert max(map(abs, angles)) < 50 and np.std(angles) == pytest.approx(90 / math.sqrt(12), rel=0.25)


def test_a_shift_shows_a_window_of_the_mirrored_image() -> None:
    image = addresses()
    padded = np.pad(image.numpy(), ((0, 0), (7, 7), (10, 10)), mode="reflect")
    windows = {padded[:, r : r + HEIGHT, c : c + WIDTH].tobytes() for r in range(15) for c in range(21)}
    seen = {cut_and_paste.shifted(image, 0.125, keyed_generator(0, n)).numpy().tobytes() for n in range(60)}
    assert seen <= windows and len(seen) > 45
    assert torch.equal(cut_and_paste.shifted(image, 0.0, keyed_generator(0)), image)


def test_jitter_of_grey_is_brightness_alone_and_of_strength_zero_nothing() -> None:
    """On an even grey image contrast, saturation and hue have nothing to change."""
    grey = torch.full((3, 6, 6), 0.4)
    made = torch.stack([cut_and_paste.jittered(grey, 0.1, keyed_generator(0, n)) for n in range(300)])
    factors = (made / 0.4).flatten(1)
    assert float(factors.std(1).max()) < 1e-5
    factor = factors.mean(1)
    assert 0.9 - 1e-5 <= float(factor.min()) < 0.91 and 1.09 < float(factor.max()) <= 1.1 + 1e-5
    assert abs(float(factor.mean()) - 1) < 0.012
    image = torch.rand(3, 5, 5, generator=keyed_generator(1))
    assert cut_and_paste.jittered(image, 0.0, keyed_generator(0)) is image
    assert len({cut_and_paste.jittered(image, 0.1, keyed_generator(0, n)).numpy().tobytes() for n in range(9)}) == 9
