"""Greedy k-center (farthest first) coreset, exact in a few rounds, with rounding taken out.

Shapes: N embeddings, D feature dim, P projected dims, M centres.

Source: PatchCore (arXiv 2106.08265), algorithm 1; Gonzalez 1985 for the factor 2.
"""

import torch
from torch import Tensor

from raydetect.blocks.seeding import keyed_generator

CANDIDATES = 2048
EXACT_BELOW = 1 << 24  # integers of this size and less are exact in float32
BLOCK_ROWS = 16384


def greedy_coreset(
    embeddings_ND: Tensor,
    num_centres: int,
    *,
    seed: int,
    projected_dims: int | None = 128,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Rows chosen farthest first: each is the farthest from all before it.

    The embeddings are projected (Johnson-Lindenstrauss) and rounded to integers, so that every squared distance is
    exact whatever the block size, device or order of summation; ties go to the smaller row. The first centre is the
    row of largest norm about the mean. The result is the same as one pass per centre, in a few dozen passes.

    Args:
        embeddings_ND: float32; rows in a fixed order (of image keys).
        num_centres: M, 1 <= M <= N.
        seed: keys the projection.
        projected_dims: P; None or P >= D leaves the dims as they are.
        candidates: rows looked at in a round; changes the time, not the result.

    Returns:
        Row numbers, int64, in order of choice.

    Raises:
        ValueError: M is out of range or an embedding is not finite.
    """
    if not 1 <= num_centres <= len(embeddings_ND):
        raise ValueError(f"{num_centres} centres asked of {len(embeddings_ND)} embeddings")
    points_NP = quantise(project(embeddings_ND, projected_dims, seed))
    norms_N = points_NP.square().sum(1)
    first = int(norms_N.argmax())
    chosen = [first]
    taken_N = torch.zeros(len(points_NP), dtype=torch.bool)
    taken_N[first] = True
    nearest_N = torch.full_like(norms_N, torch.inf)
    _update(nearest_N, points_NP, norms_N, torch.tensor([first]))
    while len(chosen) < num_centres:
        picks = _round(points_NP, norms_N, nearest_N, taken_N, num_centres - len(chosen), candidates)
        taken_N[picks] = True
        chosen += picks.tolist()
        _update(nearest_N, points_NP, norms_N, picks)
    return torch.tensor(chosen)


def project(embeddings_ND: Tensor, projected_dims: int | None, seed: int) -> Tensor:
    """Gaussian random projection to `projected_dims`, float32, centred."""
    dims = embeddings_ND.shape[1]
    if not torch.isfinite(embeddings_ND).all():
        raise ValueError("an embedding is NaN or infinite; check the weights and the images")
    centred_ND = embeddings_ND.float() - embeddings_ND.double().mean(0).float()
    if projected_dims is None or projected_dims >= dims:
        return centred_ND
    generator = keyed_generator(seed, "projection", dims, projected_dims)
    matrix_DP = torch.randn(dims, projected_dims, generator=generator).to(embeddings_ND.device)
    return centred_ND @ matrix_DP / projected_dims**0.5


def quantise(points_NP: Tensor) -> Tensor:
    """Integers in float32, as fine as 8 bits and exact products allow: 4 * max |p|^2 stays below 2^24."""
    largest = float(points_NP.abs().max())
    if largest == 0.0:
        return points_NP
    scale = 127.0 / largest
    while True:
        rounded_NP = (points_NP * scale).round()
        if 4.0 * float(rounded_NP.double().square().sum(1).max()) < EXACT_BELOW:
            return rounded_NP
        scale *= 0.9


def covering_radius(embeddings_ND: Tensor, centres_MD: Tensor) -> float:
    """Largest distance of an embedding to its nearest centre."""
    from raydetect.blocks.neighbors import BankSearch

    return float(BankSearch(centres_MD).nearest(embeddings_ND)[0].max())


def _round(
    points_NP: Tensor, norms_N: Tensor, nearest_N: Tensor, taken_N: Tensor, wanted: int, candidates: int
) -> Tensor:
    """The next centres, each truly the farthest of all points.

    Every point outside the candidates is at most `tau` away, so a candidate farther than that is the farthest of
    all; at tau itself the smaller row would win, so the round ends there unless nothing has been picked yet.
    """
    open_rows = _farthest(torch.where(taken_N, -1.0, nearest_N), min(candidates, int((~taken_N).sum())))
    outside = len(open_rows) < int((~taken_N).sum())
    tau = float(nearest_N[open_rows[-1]]) if outside else -1.0
    rows = open_rows.sort().values
    points_BP, norms_B, distance_B = points_NP[rows], norms_N[rows], nearest_N[rows].clone()
    picks: list[int] = []
    while len(picks) < min(wanted, len(rows)):
        best = int(distance_B.argmax())
        if picks and float(distance_B[best]) <= tau:
            break
        picks.append(best)
        product_B = points_BP @ points_BP[best]
        distance_B = torch.minimum(distance_B, norms_B + norms_B[best] - 2.0 * product_B)
        distance_B[picks] = -2.0
    return rows[picks]


def _farthest(distance_N: Tensor, count: int) -> Tensor:
    """Rows of the `count` largest distances, ties to the smaller row, descending."""
    least = distance_N.topk(count).values[-1]
    above = (distance_N > least).nonzero().flatten()
    equal = (distance_N == least).nonzero().flatten()[: count - len(above)]
    return torch.cat([above, equal])


def _update(nearest_N: Tensor, points_NP: Tensor, norms_N: Tensor, picks: Tensor) -> None:
    """Takes new centres into account, in place."""
    centres_PM, centre_norms_M = points_NP[picks].T.contiguous(), norms_N[picks]
    for start in range(0, len(points_NP), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        for part in range(0, centres_PM.shape[1], 1024):
            columns = slice(part, part + 1024)
            product = torch.addmm(centre_norms_M[columns], points_NP[block], centres_PM[:, columns], alpha=-2)
            torch.minimum(nearest_N[block], product.amin(1) + norms_N[block], out=nearest_N[block])
