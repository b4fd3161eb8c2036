"""Normalising flows against autograd's Jacobian, their own inverses and a density in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from raydetect.blocks.networks.flows import (
    BothCoupling,
    Chain,
    ChannelAffine,
    HalfCoupling,
    Invertible,
    Permutation,
    Rotation,
    flow_step,
    log_likelihood,
    random_permutation,
    random_rotation,
)
from raydetect.blocks.seeding import keyed_generator


def dense(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inside, 9), nn.Tanh(), nn.Linear(9, outside))


def conv(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inside, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, outside, 3, padding=1))


def restless(flow: Invertible) -> Invertible:
    """In float64, with parameters far from a fresh flow's identity."""
    flow = flow.double()
    with torch.no_grad():
        for number, value in enumerate(flow.parameters()):
            value += 0.7 * torch.randn(value.shape, generator=keyed_generator(number), dtype=value.dtype)
    return flow


def deep(channels: int, subnet: object, mix: object, dims: int = 0) -> Chain:
    assert callable(subnet) and callable(mix)
    return Chain([flow_step(channels, subnet, 1.9, mix(channels, keyed_generator(i)), dims) for i in range(3)])


FLOWS = {
    "half": (lambda: HalfCoupling(5, dense, 1.9), (5,), 0),
    "half-conditional": (lambda: HalfCoupling(6, dense, 2.0, 4), (6,), 4),
    "half-conv": (lambda: HalfCoupling(3, conv, 2.0), (3, 4, 5), 0),
    "both": (lambda: BothCoupling(7, dense, 3.0), (7,), 0),
    "affine": (lambda: ChannelAffine(5), (5,), 0),
    "affine-maps": (lambda: ChannelAffine(3), (3, 2, 4), 0),
    "permutation": (lambda: random_permutation(6, keyed_generator(1)), (6,), 0),
    "rotation": (lambda: random_rotation(6, keyed_generator(1)), (6,), 0),
    "cflow": (lambda: deep(6, dense, random_rotation, 4), (6,), 4),
    "fastflow": (lambda: deep(4, conv, random_permutation), (4, 3, 3), 0),
}


@pytest.mark.parametrize("name", FLOWS)
def test_the_log_determinant_is_that_of_autograds_jacobian_and_the_inverse_undoes(name: str) -> None:
    make, shape, dims = FLOWS[name]
    torch.manual_seed(0)
    flow = restless(make())
    x = 2 * torch.randn(3, *shape, dtype=torch.float64)
    condition = torch.randn(3, dims, dtype=torch.float64) if dims else None
    z, log_det = flow(x, condition)
    assert z.shape == x.shape and log_det.shape == (3,)
    for i in range(3):
        one = None if condition is None else condition[i : i + 1]

        def alone(flat: Tensor, one: Tensor | None = one) -> Tensor:
            return flow(flat.view(1, *shape), one)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(alone, x[i].flatten())
        assert log_det[i].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-6)
    torch.testing.assert_close(flow.inverse(z, condition), x, rtol=1e-6, atol=1e-6)
    if name not in ("permutation", "rotation"):
        assert log_det.abs().max() > 0.1


@pytest.mark.parametrize("make", [lambda: flow_step(6, dense, 1.9, Permutation(torch.arange(6)))])
def test_a_fresh_step_hardly_moves_anything(make: object) -> None:
    assert callable(make)
    x = torch.randn(50, 6)
    z, log_det = make()(x)
    assert (z - x).abs().max() < 0.6 and log_det.abs().max() < 0.6
    assert torch.equal(ChannelAffine(4)(x[:, :4])[0].round(decimals=5), x[:, :4].round(decimals=5))


@pytest.mark.parametrize("clamp", [0.5, 1.9])
def test_no_coupling_scales_by_more_than_its_clamp(clamp: float) -> None:
    for flow in (HalfCoupling(4, dense, clamp), BothCoupling(4, dense, clamp)):
        with torch.no_grad():
            for value in flow.parameters():
                value *= 1000
        log_det = flow(torch.randn(200, 4))[1]
        largest = clamp * (2 if isinstance(flow, HalfCoupling) else 4)
        assert 0.5 * largest < log_det.abs().max() <= largest * (1 + 1e-6)


def test_orders_and_rotations_are_what_they_say() -> None:
    x = torch.arange(8.0)[None]
    assert Permutation(torch.tensor([2, 0, 1]))(x[:, :3])[0].tolist() == [[2.0, 0.0, 1.0]]
    matrix = random_rotation(64, keyed_generator(3)).matrix_CC
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64), atol=1e-6, rtol=0)
    assert abs(float(torch.linalg.slogdet(matrix.double())[1])) < 1e-6
    assert not torch.equal(matrix, random_rotation(64, keyed_generator(4)).matrix_CC)
    turned = Rotation(matrix)(torch.eye(64))[0]
    torch.testing.assert_close(turned, matrix.T)


def test_an_affine_flow_has_the_density_of_its_normal_distribution() -> None:
    flow = ChannelAffine(3).double()
    with torch.no_grad():
        flow.raw_C.copy_(torch.tensor([4.0, 9.0, 20.0]))
        flow.shift_C.copy_(torch.tensor([0.5, -1.0, 3.0]))
    scale, shift = flow._scale(), flow.shift_C
    expected = torch.distributions.MultivariateNormal(-shift / scale, torch.diag(1 / scale.square()))
    x = torch.randn(20, 3, dtype=torch.float64)
    torch.testing.assert_close(log_likelihood(*flow(x)), expected.log_prob(x))


def test_a_flow_trained_on_correlated_numbers_reaches_their_entropy() -> None:
    """The mean log-likelihood of fresh samples cannot exceed minus the entropy, and comes near it."""
    mix = torch.tensor([[1.0, 0.0], [1.5, 0.4]])
    generator = keyed_generator(0)
    torch.manual_seed(0)
    flow = Chain([flow_step(2, dense, 2.0, Permutation(torch.tensor([1, 0]))) for _ in range(4)])
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(400):
        loss = -log_likelihood(*flow(torch.randn(256, 2, generator=generator) @ mix.T)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = 1 + math.log(2 * math.pi) + math.log(float(torch.linalg.det(mix)))
    with torch.no_grad():
        fresh = -log_likelihood(*flow(torch.randn(20_000, 2, generator=generator) @ mix.T)).mean()
    assert entropy - 0.02 < float(fresh) < entropy + 0.06
