"""Image losses and synthetic defects against slow reference code and closed forms."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydetect.blocks.augment import synthesis, textures
from raydetect.blocks.augment.foreground import foreground
from raydetect.blocks.networks import losses
from raydetect.blocks.networks.unet import keyed_init, padded
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors import _textures
from raydetect.detectors._textures import load_textures
from raydetect.errors import ArtifactError
from tests.builders.archives import pack
from tests.builders.images import encode
from tests.reference import images as plain


def pair(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A structured image and a noisy copy, float32 in [0, 1]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    grey = 0.5 + 0.3 * np.sin(rows * 0.4) * np.cos(columns * 0.3)
    first = np.clip(grey + 0.1 * random.normal(size=(3, height, width)), 0, 1)
    second = np.clip(first + 0.2 * random.normal(size=first.shape), 0, 1)
    return first.astype(np.float32), second.astype(np.float32)


def batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image)[None]


def test_ssim_matches_the_formula_at_every_pixel() -> None:
    first, second = pair(17, 23)
    expected = np.stack([plain.ssim_map(a, b) for a, b in zip(first, second, strict=True)])
    found = losses.ssim_map(batch(first), batch(second))
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-5)
    assert losses.ssim_loss(batch(first), batch(second)).item() == pytest.approx(1 - expected.mean(), abs=1e-5)
    assert losses.ssim_loss(batch(first), batch(first)).item() == pytest.approx(0, abs=1e-6)


def test_gradient_similarity_matches_the_formula_at_every_pixel_and_scale() -> None:
    first, second = pair(37, 26)
    found = losses.gms_map(batch(first), batch(second))[0].numpy()
    np.testing.assert_allclose(found, plain.gms_map(first, second), atol=2e-5)
    loss = losses.msgms_loss(batch(first), batch(second)).item()
    assert loss == pytest.approx(plain.msgms_loss(first, second), abs=1e-5)
    assert len(losses.msgms_maps(batch(first), batch(second))) == 4
    assert losses.msgms_loss(batch(first), batch(first)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 4.0])
def test_the_focal_loss_matches_the_formula(gamma: float) -> None:
    random = np.random.default_rng(3)
    anomalous, mask = random.uniform(0.02, 0.98, (9, 11)), random.uniform(size=(9, 11)) < 0.3
    found = losses.focal_loss(torch.from_numpy(anomalous)[None], torch.from_numpy(mask)[None], gamma)
    assert found.item() == pytest.approx(plain.focal_loss(anomalous, mask, gamma), rel=2e-3)


def test_losses_have_finite_gradients_for_flat_images_and_certain_classes() -> None:
    flat = torch.full((1, 3, 24, 24), 0.5, requires_grad=True)
    (losses.ssim_loss(flat, torch.zeros(1, 3, 24, 24)) + losses.msgms_loss(flat, flat.detach())).backward()
    certain = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    losses.focal_loss(certain, torch.tensor([[[1.0, 1.0]]]), 2.0).backward()
    for tensor in (flat, certain):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


def test_autocast_does_not_affect_the_losses() -> None:
    first, second = map(batch, pair(32, 32))
    expected = [losses.ssim_loss(first, second), losses.msgms_loss(first, second)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [losses.ssim_loss(first, second), losses.msgms_loss(first, second)]
    assert [x.item() for x in found] == [x.item() for x in expected]


@pytest.mark.parametrize(("size_px", "cells"), [((24, 32), (4, 8)), ((25, 33), (4, 8)), ((16, 16), (1, 32))])
def test_perlin_noise_matches_the_reference(size_px: tuple[int, int], cells: tuple[int, int]) -> None:
    found = synthesis.perlin_noise(size_px, cells, keyed_generator(0, "noise"))
    angles = 2 * np.pi * torch.rand(cells[0] + 1, cells[1] + 1, generator=keyed_generator(0, "noise")).double().numpy()
    np.testing.assert_allclose(found.numpy(), plain.perlin_noise(size_px, angles), atol=1e-5)


def test_masks_depend_on_their_keys_and_cover_a_small_part() -> None:
    masks = torch.stack([synthesis.perlin_mask((64, 48), keyed_generator(0, "mask", i)) for i in range(60)])
    again = synthesis.perlin_mask((64, 48), keyed_generator(0, "mask", 7))
    assert torch.equal(masks[7], again) and not torch.equal(masks[7], masks[8])
    share = masks.float().mean((1, 2))
    assert 0.005 < share.mean() < 0.2 and share.max() < 0.7 and (share > 0).float().mean() > 0.6


def test_blending_changes_nothing_but_the_mask() -> None:
    image, source = map(torch.from_numpy, pair(20, 30))
    mask = torch.rand(20, 30, generator=keyed_generator(0, "m")) < 0.4
    found = synthesis.blend(image, source, mask, 0.3)
    expected = np.where(mask.numpy(), 0.7 * image.numpy() + 0.3 * source.numpy(), image.numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_shuffled_tiles_are_the_same_tiles() -> None:
    image = torch.arange(3 * 13 * 26).view(3, 13, 26)
    found = synthesis.shuffled_tiles(image, (4, 8), keyed_generator(0, "tiles"))
    assert torch.equal(found[:, 12:], image[:, 12:]) and torch.equal(found[:, :, 24:], image[:, :, 24:])
    assert not torch.equal(found, image)

    def tiles(picture: torch.Tensor) -> list[list[int]]:
        positions = [(r, c) for r in range(4) for c in range(8)]
        return sorted(picture[:, 3 * r : 3 * r + 3, 3 * c : 3 * c + 3].flatten().tolist() for r, c in positions)

    assert tiles(found) == tiles(image)


def test_the_foreground_is_the_object_on_a_plain_border() -> None:
    """Whatever its brightness: an object with parts as bright as the background is covered whole."""
    yy, xx = np.mgrid[:80, :80]
    disc = torch.from_numpy((yy - 42) ** 2 + (xx - 38) ** 2 < 25**2)
    shade = torch.where(torch.from_numpy(xx < 38), 60, 225).to(torch.uint8)  # half of it is as bright as the border
    picture = torch.stack([torch.where(disc, shade, 225), torch.where(disc, shade, 200), torch.where(disc, shade, 40)])
    for image in (picture.to(torch.uint8), 255 - picture.to(torch.uint8)):
        found = foreground(image)
        assert (found & disc).sum() >= 0.98 * disc.sum() and (found & ~disc).sum() <= 0.02 * disc.sum()
    noisy = picture + torch.randint(-6, 7, picture.shape, generator=torch.Generator().manual_seed(0))
    found = foreground(noisy.clamp(0, 255).to(torch.uint8))
    assert (found & disc).sum() >= 0.98 * disc.sum() and (found & ~disc).sum() <= 0.05 * disc.sum()


def test_without_a_plain_border_or_an_object_defects_may_lie_anywhere() -> None:
    striped = (torch.arange(40) // 5 % 2 * 200).to(torch.uint8).expand(3, 40, 40)
    plain_picture = torch.full((3, 40, 40), 90, dtype=torch.uint8)
    speck = plain_picture.clone()
    speck[:, 20:23, 20:23] = 250
    line = plain_picture.clone()
    line[:, 20, 3:37] = 250
    for image in (striped, plain_picture, speck, line):
        assert foreground(image).all()


def test_the_foreground_covers_nuts(real_data: Path) -> None:
    """By brightness alone, less than half of a nut was covered; it is what is less yellow than the background."""
    for path in sorted((real_data / "hazelnut_toy" / "train").rglob("*.jpg"))[:8]:
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((128, 128)))).permute(2, 0, 1)
        red, _, blue = image.int()
        nut = (blue > 0.6 * red) & (blue > 60)
        assert nut.float().mean() > 0.03 and (foreground(image) & nut).sum() > 0.98 * nut.sum()


def test_every_procedural_texture_and_variation_is_a_valid_image() -> None:
    for field in textures.FIELDS:
        first, second = (field((40, 56), keyed_generator(0, i)) for i in range(2))
        assert first.shape == (40, 56) and torch.isfinite(first).all() and not torch.equal(first, second)
    texture = textures.Textures().draw((40, 56), keyed_generator(0, "x"))
    assert texture.shape == (3, 40, 56) and texture.min() >= 0 and texture.max() <= 1
    assert torch.equal(texture, textures.procedural_texture((40, 56), keyed_generator(0, "x")))
    for i in range(30):
        found = textures.varied(texture, keyed_generator(1, i))
        assert found.shape == texture.shape and found.min() >= 0 and found.max() <= 1


def test_variations_do_what_their_names_say() -> None:
    image = torch.from_numpy(pair(24, 24)[0])
    generator = keyed_generator(0, "v")
    assert torch.allclose(textures._inverted(image, generator), 1 - image)
    posterised = textures._posterised(image, keyed_generator(0, 3))
    assert len(posterised.unique()) <= 2 ** int(torch.randint(1, 9, (), generator=keyed_generator(0, 3)))
    stretched = textures._autocontrast(0.3 + 0.2 * image, generator)
    assert stretched.amin((1, 2)).abs().max() < 1e-5 and (stretched.amax((1, 2)) - 1).abs().max() < 1e-5
    exponent = 0.5 + 1.5 * torch.rand(3, 1, 1, generator=keyed_generator(0, 4))
    np.testing.assert_allclose(
        textures._gamma(image, keyed_generator(0, 4)), image.numpy() ** exponent.numpy(), rtol=1e-5
    )


def test_an_adjusted_image_is_mirrored_rotated_and_recoloured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = torch.from_numpy(pair(32, 32)[0])
    found = [textures.adjusted(image, keyed_generator(0, i)) for i in range(20)]
    assert all(one.shape == image.shape and one.min() >= 0 and one.max() <= 1 for one in found)
    again = textures.adjusted(image, keyed_generator(0, 3))
    assert torch.equal(found[3], again) and not torch.equal(found[3], found[4])
    for name in ("_rotated", "_brightness", "_hue_and_saturation"):
        monkeypatch.setattr(textures, name, lambda picture, _: picture)
    plain_or_mirrored = [textures.adjusted(image, keyed_generator(0, i)) for i in range(200)]
    mirrored = [torch.equal(one, image.flip(2)) for one in plain_or_mirrored]
    assert 70 < sum(mirrored) < 130
    assert all(torch.equal(one, image) for one, other in zip(plain_or_mirrored, mirrored, strict=True) if not other)


def texture_files(count: int) -> list[tuple[str, bytes]]:
    random = np.random.default_rng(5)
    return [(f"{i:03d}.png", encode(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))) for i in range(count)]


@pytest.mark.parametrize("ending", ["", ".tar", ".zip"])
def test_textures_are_read_from_folders_and_archives_in_order(ending: str) -> None:
    files = texture_files(5)
    pack("memory://textures/all", ending, files, 1)
    found, message = load_textures("memory://textures/all", (10, 15))
    pictures = [Image.open(io.BytesIO(data)).resize((15, 10), Image.Resampling.BILINEAR) for _, data in files]
    assert torch.equal(found, torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2))
    assert message.startswith("5 textures of memory://textures/all sha256:")
    drawn = textures.Textures(found).draw((10, 15), keyed_generator(0, "d"))
    assert any(torch.equal(drawn, one.float() / 255) for one in found)
    assert textures.Textures(found).draw((7, 9), keyed_generator(0, "d")).shape == (3, 7, 9)


def test_the_choice_among_too_many_textures_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_textures, "MAX_TEXTURES", 3)
    pack("memory://textures/many", "", texture_files(9), 4)
    found, message = load_textures("memory://textures/many", (20, 30))
    again, message_again = load_textures("memory://textures/many", (20, 30))
    assert (
        len(found) == 3
        and message.startswith("3 of 9 textures")
        and message == message_again
        and torch.equal(found, again)
    )


def test_bad_textures_are_refused_with_what_to_do() -> None:
    with pytest.raises(ArtifactError, match=r"textures: .*nowhere"):
        load_textures("memory://textures/nowhere", (8, 8))
    pack("memory://textures/text", "", [("a.txt", b"x")], 1)
    with pytest.raises(ArtifactError, match="textures"):
        load_textures("memory://textures/text", (8, 8))
    pack("memory://textures/broken", "", [*texture_files(1), ("b.png", b"no picture")], 1)
    with pytest.raises(ArtifactError, match=r"b\.png: cannot be decoded .*Remove it"):
        load_textures("memory://textures/broken", (8, 8))


def test_keyed_init_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with keyed_init(0, "a"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with keyed_init(0, "a"):
        assert torch.equal(torch.rand(3), first)


def test_padding_repeats_the_last_row_and_column() -> None:
    image = torch.arange(15.0).view(1, 1, 3, 5)
    found = padded(image, 4)
    np.testing.assert_array_equal(found[0, 0].numpy(), np.pad(image[0, 0].numpy(), ((0, 1), (0, 3)), mode="edge"))
    assert padded(found, 4) is found
