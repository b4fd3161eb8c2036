"""Optimal transport between clouds of equally weighted points: the debiased Sinkhorn divergence.

Shapes: B pairs of clouds, N and M points, D feature dim.
"""

import math
from functools import partial

import torch
from torch import Tensor

SCALING = 0.7  # of the regularisation from one iteration to the next
LAST_ITERATIONS = 40  # at the final regularisation


def sinkhorn_divergence(first_BND: Tensor, second_BMD: Tensor, blur: float, largest_cost: float) -> Tensor:
    """OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 of every pair of clouds, float32 (B), with gradients to both.

    OT is entropic, with half the squared distance as cost and regularisation `blur` squared: as `blur` goes to 0, the
    divergence becomes half the squared 2-Wasserstein distance. It is 0 for equal clouds, and at least 0 if converged.
    Regularisation starts at `largest_cost`, a bound that must not depend on the batch; iterations are then the same for
    every pair. The gradient holds the transport plan fixed, which is exact at convergence (envelope theorem).

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", AISTATS 2019,
    eqs. 3 and 8; alternating updates under decreasing regularisation.
    """
    x, y = first_BND.float(), second_BMD.float()
    transport = partial(_transport, blur=blur, largest_cost=largest_cost)
    return transport(x, y) - 0.5 * (transport(x, x) + transport(y, y))


def _transport(x_BND: Tensor, y_BMD: Tensor, blur: float, largest_cost: float) -> Tensor:
    """Entropic transport cost, (B)."""
    squares = x_BND.square().sum(2)[:, :, None] + y_BMD.square().sum(2)[:, None]
    cost_BNM = 0.5 * squares - x_BND @ y_BMD.transpose(1, 2)
    with torch.no_grad():
        f_BN, g_BM = _potentials(cost_BNM, blur**2, largest_cost)
        value_B = f_BN.mean(1) + g_BM.mean(1)
        exponents_BNM = (f_BN[:, :, None] + g_BM[:, None] - cost_BNM) / blur**2
        plan_BNM = exponents_BNM.exp() / (x_BND.shape[1] * y_BMD.shape[1])
    carried_B = (plan_BNM * cost_BNM).sum((1, 2))  # for its gradient only
    return value_B + carried_B - carried_B.detach()


def _potentials(cost_BNM: Tensor, least: float, largest: float) -> tuple[Tensor, Tensor]:
    """Dual potentials (B, N) and (B, M); `g` is the exact answer to `f`, so the plan's columns sum to 1 / M."""
    steps = max(0, math.ceil(math.log(least / largest, SCALING)))
    schedule = [max(largest * SCALING**step, least) for step in range(steps)] + [least] * LAST_ITERATIONS
    f_BN, g_BM = cost_BNM.new_zeros(cost_BNM.shape[:2]), cost_BNM.new_zeros(cost_BNM.shape[::2])
    for epsilon in schedule:
        f_BN = _answer(cost_BNM, g_BM, epsilon, 2)
        g_BM = _answer(cost_BNM, f_BN, epsilon, 1)
    return f_BN, g_BM


def _answer(cost_BNM: Tensor, other: Tensor, epsilon: float, dim: int) -> Tensor:
    """The optimal potential of one side given that of the other, which runs along `dim`."""
    exponents = (other.unsqueeze(3 - dim) - cost_BNM) / epsilon
    return -epsilon * (exponents.logsumexp(dim) - math.log(cost_BNM.shape[dim]))
