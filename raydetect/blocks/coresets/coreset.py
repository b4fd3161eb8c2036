"""Coresets of keyed rows over all workers: exact greedy k-center (farthest first) in few rounds, and two variants.

In each round, every worker offers its farthest rows, all workers gather the union, and run greedy selection on it as
long as the best candidate is farther than every row not offered: these picks equal the global greedy picks. All rows
are then updated against the picks at once. Distances are exact integers (`blocks/coresets/integer_embeddings.py`) and
ties are broken by row order, so the same images yield the same rows in the same order on any number of workers.

Shapes: N rows here, M centres, P projected dims, U offered rows.

Source: PatchCore (arXiv 2106.08265), algorithm 1; Gonzalez, "Clustering to minimize the maximum intercluster
distance" (1985), for the factor 2; composable: Malkomes et al., "Fast distributed k-center clustering with outliers
on massive data", NeurIPS 2015, sec. 3 (two rounds).
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.integer_embeddings import IntegerPoints, integer_points
from raydetect.blocks.coresets.keyed_rows import KeyedRows, RowStore
from raydetect.blocks.seeding import keyed_seed, mixed_hash

CoresetMode = Literal["exact", "composable", "random"]
CANDIDATES = 2048
ROWS_AT_ONCE, CENTRES_AT_ONCE = 1024, 512  # 2 MB per product, which fits in cache
OVERSAMPLING = 2.0
TAKEN = -1.0
ProgressCallback = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Coreset:
    """Selected rows, identical on every worker.

    Attributes:
        rows_MD: their embeddings, float32, in selection order.
        of: number of rows they were selected from.
        keys_M: key of each row's image.
        sha256: of (image key, row within the image) in selection order.
        radius: covering radius in the projected integers, in units of the embeddings (up to projection distortion).
        proven_ratio: upper bound on the ratio of the radius to the optimal one for M centres; None if there is none.
        mode: selection mode.
    """

    rows_MD: Tensor
    of: int
    keys_M: tuple[str, ...]
    sha256: str
    radius: float
    proven_ratio: float | None
    mode: CoresetMode

    def facts(self) -> dict[str, object]:
        """Summary for the artifact's record."""
        return {
            "mode": self.mode,
            "rows": len(self.rows_MD),
            "of": self.of,
            "sha256": self.sha256,
            "covering_radius": self.radius,
            "proven_ratio": self.proven_ratio,
        }


def choose_coreset(
    rows: KeyedRows,
    num_centres: int,
    *,
    seed: int,
    mode: CoresetMode = "exact",
    projected_dims: int | None = 128,
    candidates: int = CANDIDATES,
    device: torch.device | str = "cpu",
    on_progress: ProgressCallback | None = None,
) -> Coreset:
    """Selects M rows from the rows of all workers.

    Args:
        rows: this worker's rows; a collective call, the other arguments must be the same on all workers.
        num_centres: M, 1 <= M <= rows of all workers.
        seed: seed of the projection, and of the selection in mode "random".
        mode: "exact": the same rows as greedy selection with one pass over all rows per centre, starting with the row
            farthest from the mean; "composable": every worker selects among its own rows, then all among these
            (depends on the number of workers); "random": by keyed hash.
        projected_dims: P; None or P >= D keeps all dims.
        candidates: rows offered per round of "exact" by all workers; affects run time, not the result.
        device: where distances are computed; exact on any device.
        tick: called with the number of centres selected since the last call.

    Raises:
        ValueError: M is out of range.
    """
    group = rows.group
    total = rows.total()
    if not 1 <= num_centres <= total:
        raise ValueError(f"{num_centres} centres requested from {total} embeddings")
    points = integer_points(rows, projected_dims, seed, group)
    greedy = _Greedy(points, rows.order(), group, candidates, torch.device(device), on_progress or _silent)
    bound: float | None = None
    if mode == "exact":
        greedy.run(num_centres)
        bound = greedy.farthest() / 4.0  # M + 1 rows are at least this far apart; the optimal radius is at least half
    elif mode == "composable":
        bound = _compose(greedy, num_centres, candidates) / 4.0
    else:
        _random(greedy, num_centres, seed)
    radius = greedy.farthest()
    proven = None if bound is None else 1.0 if radius == 0.0 else math.sqrt(radius / bound) if bound else None
    length, mine = math.sqrt(radius) * points.unit, greedy.mine
    del points, greedy  # free memory before copying the embeddings of the centres
    names, rows_MD = _gathered(rows, mine, group)
    return Coreset(rows_MD, total, tuple(key for key, _ in names), _digest(names), length, proven, mode)


@dataclass(frozen=True, slots=True)
class _Offers:
    """Candidate rows exchanged between workers.

    Attributes:
        distance_U: squared distance to the nearest centre so far, float32.
        order_U: tie-breaking order, int64.
        points_UP: int8.
        location_U2: (rank, local row), int64.
    """

    distance_U: Tensor
    order_U: Tensor
    points_UP: Tensor
    location_U2: Tensor

    def shared(self, group: Group) -> "_Offers":
        """The offers of all workers, sorted by order."""
        parts = (self.distance_U, self.order_U, self.points_UP, self.location_U2)
        found = [torch.cat(group.gather(part)) for part in parts]
        by_order = found[1].argsort()
        return _Offers(*(part[by_order] for part in found))


class _Greedy:
    """Farthest-first selection over all workers' points.

    Attributes:
        nearest_N: squared distance of every local row to its nearest centre, TAKEN for centres.
        mine: (index in selection order, local row) of the local centres.
        count: number of centres selected so far.
    """

    def __init__(
        self,
        points: IntegerPoints,
        order_N: Tensor,
        group: Group,
        candidates: int,
        device: torch.device,
        on_progress: ProgressCallback,
    ) -> None:
        self.points, self.order_N, self.group = points, order_N, group
        self.device, self.on_progress = device, on_progress
        self.candidates = -(-candidates // group.size)
        self.norms_N = points.norms_N.to(device)
        self.nearest_N = torch.full_like(self.norms_N, torch.inf)
        self.mine: list[tuple[int, int]] = []
        self.count = 0

    def run(self, num_centres: int) -> None:
        """Selects until there are `num_centres` centres."""
        if not self.count:
            self.take(self._first())
        while self.count < num_centres:
            rows_O, tau = self._farthest_here()
            offers = self.offer(rows_O, self.nearest_N[rows_O.to(self.device)].cpu()).shared(self.group)
            tau = float(self.group.max(torch.tensor([tau]))[0])
            picks = _picks(offers, tau, num_centres - self.count)
            self.take(_chosen(offers, picks))

    def take(self, chosen: _Offers) -> None:
        """Adds rows as centres, in the given order, and updates all local rows."""
        here = chosen.location_U2[:, 0] == self.group.rank
        rows_H = chosen.location_U2[here, 1]
        self.mine += zip((here.nonzero()[:, 0] + self.count).tolist(), rows_H.tolist(), strict=True)
        self._update(chosen.points_UP.to(self.device).float())
        self.nearest_N[rows_H.to(self.device)] = TAKEN
        self.count += len(chosen.order_U)
        self.on_progress(len(chosen.order_U))

    def farthest(self) -> float:
        """Largest squared distance of a row, over all workers, to its nearest centre."""
        here = self.nearest_N.max().cpu()[None] if len(self.nearest_N) else torch.tensor([TAKEN])
        return max(0.0, float(self.group.max(here.float())[0]))

    def _first(self) -> _Offers:
        """The row of largest norm; ties are broken by smallest order."""
        rows_O = _largest(self.norms_N.cpu(), self.order_N, min(1, len(self.norms_N)))
        offers = self.offer(rows_O, self.norms_N.cpu()[rows_O]).shared(self.group)
        best = int(offers.distance_U.argmax())
        return _chosen(offers, torch.tensor([best]))

    def _farthest_here(self) -> tuple[Tensor, float]:
        """Rows to offer, and the largest distance among the remaining rows."""
        nearest_N = self.nearest_N.cpu()
        rows_O = _largest(nearest_N, self.order_N, min(self.candidates, int((nearest_N != TAKEN).sum())))
        if len(rows_O) == len(nearest_N):
            return rows_O, TAKEN
        rest_N = nearest_N.index_fill(0, rows_O, TAKEN)
        return rows_O, float(rest_N.max())

    def offer(self, rows_O: Tensor, distance_O: Tensor) -> _Offers:
        """Local rows in the format exchanged with other workers."""
        location_O2 = torch.stack([torch.full_like(rows_O, self.group.rank), rows_O], 1)
        return _Offers(distance_O, self.order_N[rows_O], self.points.store.take(rows_O), location_O2)

    def _update(self, centres_MP: Tensor) -> None:
        norms_M = centres_MP.square().sum(1)
        for start, block in self.points.store.blocks():
            for first in range(0, len(block), ROWS_AT_ONCE):
                points_NP = block[first : first + ROWS_AT_ONCE].to(self.device).float()
                here = slice(start + first, start + first + len(points_NP))
                for part in range(0, len(centres_MP), CENTRES_AT_ONCE):
                    of = slice(part, part + CENTRES_AT_ONCE)
                    product = torch.addmm(norms_M[of], points_NP, centres_MP[of].T, alpha=-2)
                    nearest_N = product.amin(1).add_(self.norms_N[here])
                    torch.minimum(self.nearest_N[here], nearest_N, out=self.nearest_N[here])


def _picks(offers: _Offers, tau: float, wanted: int) -> Tensor:
    """Indices among the offers of the next centres, each the farthest of all rows.

    Rows that were not offered are at most `tau` away, so an offered row farther than that is the farthest of all. At
    exactly tau, a row of smaller order may win, so the round ends there unless nothing has been picked yet: the
    first pick is always correct, because every worker offers its farthest rows of smallest order.
    """
    points_UP = offers.points_UP.float()
    norms_U = points_UP.square().sum(1)
    distance_U = offers.distance_U.clone()
    picks: list[int] = []
    while len(picks) < min(wanted, len(points_UP)):
        best = int(distance_U.argmax())  # the first maximum has the smallest order
        if picks and float(distance_U[best]) <= tau:
            break
        picks.append(best)
        product_U = points_UP @ points_UP[best]
        torch.minimum(distance_U, norms_U + norms_U[best] - 2.0 * product_U, out=distance_U)
        distance_U[picks] = TAKEN - 1.0
    return torch.tensor(picks)


def _largest(values_N: Tensor, order_N: Tensor, count: int) -> Tensor:
    """Rows of the `count` largest values; ties are broken by smaller order."""
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    least = values_N.topk(count).values[-1]
    above = (values_N > least).nonzero()[:, 0]
    equal = (values_N == least).nonzero()[:, 0]
    return torch.cat([above, equal[order_N[equal].argsort()[: count - len(above)]]])


def _chosen(offers: _Offers, picks: Tensor) -> _Offers:
    return _Offers(*(part[picks] for part in (offers.distance_U, offers.order_U, offers.points_UP, offers.location_U2)))


def _compose(greedy: _Greedy, num_centres: int, candidates: int) -> float:
    """Two rounds: every worker selects among its own rows, then all select among these.

    Returns:
        Squared distance of the next centre among the offers; M + 1 rows are at least that far apart.
    """
    wanted = min(len(greedy.points), math.ceil(OVERSAMPLING * num_centres / greedy.group.size))
    own = _Greedy(greedy.points, greedy.order_N, Group(), candidates, greedy.device, _silent)
    if wanted:
        own.run(wanted)
    rows_O = torch.tensor([row for _, row in own.mine], dtype=torch.int64)
    offers = greedy.offer(rows_O, greedy.points.norms_N[rows_O]).shared(greedy.group)
    if len(offers.order_U) < num_centres:
        raise ValueError(f"{num_centres} centres requested from {len(offers.order_U)} offered rows; use mode exact")
    store = RowStore(greedy.points.store.dims, torch.int8, greedy.points.store.max_bytes)
    store.append(offers.points_UP)
    union = IntegerPoints(store, offers.points_UP.float().square().sum(1), greedy.points.unit)
    among = _Greedy(union, offers.order_U, Group(), candidates, greedy.device, _silent)
    among.run(num_centres)
    greedy.take(_chosen(offers, torch.tensor([row for _, row in among.mine])))
    return among.farthest()


def _random(greedy: _Greedy, num_centres: int, seed: int) -> None:
    """Selects the rows of smallest keyed hash."""
    mixed_N = mixed_hash(greedy.order_N, keyed_seed(seed, "random"))
    rows_O = mixed_N.argsort()[:num_centres]
    offers = greedy.offer(rows_O, torch.zeros(len(rows_O))).shared(greedy.group)
    greedy.take(_chosen(offers, mixed_hash(offers.order_U, keyed_seed(seed, "random")).argsort()[:num_centres]))


def _gathered(rows: KeyedRows, mine: list[tuple[int, int]], group: Group) -> tuple[list[tuple[str, int]], Tensor]:
    """Names and embeddings of the centres of all workers, in selection order."""
    index_H = torch.tensor([index for index, _ in mine], dtype=torch.int64)
    row_H = torch.tensor([row for _, row in mine], dtype=torch.int64)
    texts = group.gather_bytes(json.dumps(rows.names(row_H)).encode())
    names = [(str(key), int(row)) for text in texts for key, row in json.loads(text)]
    if group.size == 1:  # already in order; avoids copying a large bank
        return names, rows.store.take(row_H)
    by_choice = torch.cat(group.gather(index_H)).argsort()
    rows_MD = torch.cat(group.gather(rows.store.take(row_H)))
    return [names[i] for i in by_choice.tolist()], rows_MD[by_choice]


def _digest(names: list[tuple[str, int]]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _silent(_: int) -> None:
    return None
