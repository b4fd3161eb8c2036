"""Sinkhorn divergences against closed forms, an exact linear program and slow iterations in float64."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from raydetect.blocks.networks.sinkhorn import sinkhorn_divergence


def clouds(points: int = 8, dims: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    normal = torch.nn.functional.normalize
    return normal(torch.randn(3, points, dims), dim=2), normal(torch.randn(3, points, dims) + 0.3, dim=2)


def slow_transport(x_ND: np.ndarray, y_MD: np.ndarray, blur: float) -> float:
    """Entropic transport by alternating updates until they stand still."""
    epsilon = blur**2
    cost = 0.5 * ((x_ND[:, None] - y_MD[None]) ** 2).sum(2)
    kernel, u = np.exp(-cost / epsilon), np.ones(len(x_ND))
    for _ in range(5000):
        v = 1 / (kernel.T @ u / len(x_ND))
        u = 1 / (kernel @ v / len(y_MD))
    return float(epsilon * (np.log(u).mean() + np.log(v).mean()))


def slow_divergence(x_ND: np.ndarray, y_MD: np.ndarray, blur: float) -> float:
    itself = slow_transport(x_ND, x_ND, blur) + slow_transport(y_MD, y_MD, blur)
    return slow_transport(x_ND, y_MD, blur) - itself / 2


def test_value_and_gradient_are_those_of_slow_iterations() -> None:
    x, y = clouds()
    x.requires_grad_()
    found = sinkhorn_divergence(x, y, 0.2, 2.0)
    found.sum().backward()
    assert x.grad is not None
    xs, ys = x.detach().double().numpy(), y.double().numpy()
    for i in range(3):
        assert float(found[i].detach()) == pytest.approx(slow_divergence(xs[i], ys[i], 0.2), abs=5e-4)
    for point, dim in [(0, 0), (3, 2), (7, 4)]:
        step = np.zeros_like(xs[0])
        step[point, dim] = 1e-4
        rise = slow_divergence(xs[0] + step, ys[0], 0.2) - slow_divergence(xs[0] - step, ys[0], 0.2)
        assert float(x.grad[0, point, dim]) == pytest.approx(rise / 2e-4, abs=2e-3)


def test_a_shift_costs_half_its_square_and_nothing_costs_nothing() -> None:
    x, _ = clouds()
    shift = torch.tensor([0.3, -0.2, 0.1, 0.0, 0.4])
    found = sinkhorn_divergence(x, x + shift, 0.2, 2.0)
    np.testing.assert_allclose(found.numpy(), 0.5 * float(shift.square().sum()), atol=1e-3)
    assert sinkhorn_divergence(x, x.flip(1), 0.2, 2.0).abs().max() < 1e-4  # the order of points is nothing


def test_with_little_blur_it_nears_the_exact_transport() -> None:
    x, y = clouds()
    cost = 0.5 * torch.cdist(x.double(), y.double()).square().numpy()
    rows = np.kron(np.eye(8), np.ones(8))
    columns = np.kron(np.ones(8), np.eye(8))
    exact = [linprog(c.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.full(16, 1 / 8)).fun for c in cost]
    np.testing.assert_allclose(sinkhorn_divergence(x, y, 0.05, 2.0).numpy(), exact, atol=0.01)


def test_a_pair_does_not_depend_on_the_others() -> None:
    x, y = clouds()
    together = sinkhorn_divergence(x, y, 0.2, 2.0)
    alone = torch.cat([sinkhorn_divergence(x[i : i + 1], y[i : i + 1], 0.2, 2.0) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
