"""The Gaussian over keyed rows against numpy, scipy and scikit-learn, and on several workers."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from raydetect.blocks.coresets.gaussian import Gaussian, fit_gaussian, ledoit_wolf, moments
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import KeyedRows
from raydetect.errors import SpecError
from tests.builders.group import together


def points(count: int, dims: int, seed: int = 0) -> np.ndarray:
    """Correlated, far from the origin, of very different spread, float32."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(count, dims)) @ random.normal(size=(dims, dims)) * np.geomspace(1, 0.01, dims)
    return (5 + mixed).astype(np.float32)


def piece(
    rows_ND: np.ndarray, images: list[int], group: Group, per_image: int = 5, max_bytes: int = 1 << 30
) -> KeyedRows:
    """The rows of some images of `per_image` rows each."""
    found = KeyedRows(rows_ND.shape[1], group, max_bytes)
    for i in images:
        found.add(f"image-{i}", torch.from_numpy(rows_ND[i * per_image : (i + 1) * per_image]))
    return found


def test_moments_are_numpys() -> None:
    rows = points(9_000, 12)  # more than one block of a store, and several of exact sums
    found = moments(piece(rows, list(range(1800)), Group()))
    wide = rows.astype(np.float64)
    scale = np.abs(wide).max()
    assert found.count == 9_000
    np.testing.assert_allclose(found.mean_D.numpy(), wide.mean(0), atol=scale * 2**-20)
    np.testing.assert_allclose(found.covariance_DD.numpy(), np.cov(wide.T, bias=True), atol=scale**2 * 2**-20)
    fourth = (((wide - wide.mean(0)) ** 2).sum(1) ** 2).mean()
    assert found.fourth == pytest.approx(fourth, rel=1e-5)


@pytest.mark.parametrize(("count", "dims"), [(200, 8), (40, 60), (15, 120)])  # more rows than dims, and fewer
def test_shrinkage_and_precision_are_scikit_learns(count: int, dims: int) -> None:
    rows = points(count, dims)
    theirs = LedoitWolf().fit(rows.astype(np.float64))
    gaussian, shrinkage = fit_gaussian(piece(rows, list(range(count // 5)), Group()))
    assert shrinkage == pytest.approx(theirs.shrinkage_, rel=1e-4)
    size = np.abs(theirs.precision_).max()
    np.testing.assert_allclose(gaussian.precision_DD.numpy(), theirs.precision_, atol=1e-3 * size)
    probes = points(30, dims, seed=1)
    distances = gaussian(torch.from_numpy(probes)).numpy()
    np.testing.assert_allclose(distances, np.sqrt(theirs.mahalanobis(probes.astype(np.float64))), rtol=1e-3)


def test_distances_are_scipys_and_their_gradient_autograds() -> None:
    gaussian, _ = fit_gaussian(piece(points(100, 6), list(range(20)), Group()))
    probes = torch.from_numpy(points(7, 6, seed=2)).double().requires_grad_(True)
    distances = gaussian(probes)
    mean, precision = gaussian.mean_D.numpy(), gaussian.precision_DD.numpy()
    want = [mahalanobis(probe, mean, precision) for probe in probes.detach().numpy()]
    np.testing.assert_allclose(distances.detach().numpy(), want, rtol=1e-12)
    (slopes,) = torch.autograd.grad(distances.sum(), probes)
    torch.testing.assert_close(gaussian.gradient(probes.detach()), slopes)
    at_mean = gaussian.mean_D[None]
    assert float(gaussian(at_mean)) == 0.0 and not gaussian.gradient(at_mean).any()


def test_any_number_of_workers_and_any_order_give_the_same_bits() -> None:
    rows, images = points(3_000, 20), list(range(600))
    alone, shrinkage = fit_gaussian(piece(rows, images, Group()))
    deals = [images[1::3][::-1], images[::3], images[2::3]]
    many = together(3, lambda group: fit_gaussian(piece(rows, deals[group.rank], group, max_bytes=1 << 10)))
    uneven = together(2, lambda group: fit_gaussian(piece(rows, [images, []][group.rank], group)))
    for other, share in [*many, *uneven]:
        assert share == shrinkage
        assert torch.equal(other.mean_D, alone.mean_D) and torch.equal(other.precision_DD, alone.precision_DD)


def test_equal_rows_shrink_to_the_target_and_no_rows_are_refused() -> None:
    with pytest.raises(SpecError, match=r"all 10 embeddings are equal.*Add normal images"):
        fit_gaussian(piece(np.ones((10, 3), np.float32), [0, 1], Group()))
    with pytest.raises(SpecError, match="no rows"):
        fit_gaussian(KeyedRows(3, Group()))
    isotropic = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    found = moments(piece(isotropic, [0, 1], Group(), per_image=4))
    assert ledoit_wolf(found) == 1.0
    assert Gaussian(4)(torch.eye(4)).tolist() == [1.0] * 4
