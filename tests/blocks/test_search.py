"""Searches of a memory bank against slow float64 code, and against each other bit for bit."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetect.blocks.search import exact_search, faiss_search
from raydetect.blocks.search.exact_search import largest_approx, least_distance
from raydetect.blocks.search.faiss_search import FaissSearch, IvfPqSearch, recall_at_1
from raydetect.blocks.search.neighbors import BankSearch, HalfProduct, Product, Pruner
from raydetect.blocks.search.search import SETTLED, Search, ShardedSearch, settled_distance, split_bank
from raydetect.errors import ArtifactError, SpecError
from tests.blocks.test_blocks import features
from tests.reference import reference

EXACT: dict[str, Callable[[torch.Tensor], Search]] = {
    "exact": BankSearch,
    "bfloat16": lambda bank_MD: BankSearch(bank_MD, "bfloat16"),
    "faiss": FaissSearch,
    "sharded": lambda bank_MD: ShardedSearch(
        [BankSearch(bank_MD[a:b]) for a, b in split_bank(len(bank_MD), min(3, len(bank_MD)))]
    ),
}
every_exact_search = pytest.mark.parametrize("build", EXACT.values(), ids=EXACT.keys())


def near_duplicates(rows: int, dims: int, seed: int) -> torch.Tensor:
    """A few centres, each many times, moved by single bits or not at all: products in any precision cannot tell."""
    random = np.random.default_rng(seed)
    centres = features(9, dims, seed)[random.integers(9, size=rows)]
    ulps = torch.from_numpy(random.integers(-1, 2, (rows, dims)).astype(np.float32)) * 2.0**-23
    return centres * (1 + ulps * torch.from_numpy((random.random((rows, 1)) < 0.5).astype(np.float32)))


def the_answer(patches_ND: torch.Tensor, bank_MD: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K smallest (settled distance, row), by sorting all of them."""
    all_NM = settled_distance(bank_MD, patches_ND[:, None])
    distance_NM, order_NM = all_NM.sort(dim=1, stable=True)
    return distance_NM[:, :count], order_NM[:, :count]


@every_exact_search
@pytest.mark.parametrize("rows", [1, 5, 127, 1024, 2300])
def test_the_nearest_row_is_the_nearest(rows: int, build: Callable[[torch.Tensor], Search]) -> None:
    bank, patches = features(rows, 64, 1), features(300, 64, 2)
    patches[7] = bank[rows // 2]  # distance zero
    distance_NK, index_NK = build(bank).nearest(patches)
    expected, index = reference.nearest_rows(patches.numpy(), bank.numpy())
    best = expected.min(1)
    np.testing.assert_allclose(distance_NK[:, 0].numpy(), best, rtol=1e-5, atol=1e-6)
    ties = expected[np.arange(300), index_NK[:, 0].numpy()]
    np.testing.assert_allclose(ties, best, rtol=1e-5, atol=1e-6)
    assert (index_NK[:, 0].numpy() == index).mean() > 0.99
    assert distance_NK[7, 0] == 0.0


@every_exact_search
@pytest.mark.parametrize("rows", [40, 2300])
@pytest.mark.parametrize("neighbours", [2, 9, 40])
def test_several_neighbours_come_ascending(rows: int, neighbours: int, build: Callable[[torch.Tensor], Search]) -> None:
    bank, patches = features(rows, 48, 3), features(60, 48, 4)
    distance_NK, _ = build(bank).nearest(patches, neighbours)
    expected, _ = reference.nearest_rows(patches.numpy(), bank.numpy())
    np.testing.assert_allclose(distance_NK.numpy(), np.sort(expected, 1)[:, :neighbours], rtol=1e-5, atol=1e-6)


def test_pruning_gives_what_the_whole_product_gives() -> None:
    bank, patches = features(5000, 200, 5), features(3000, 200, 6)
    pruned = BankSearch(bank)
    plain = BankSearch(bank)
    plain.pruner = None
    (a, i), (b, j) = pruned.nearest(patches), plain.nearest(patches)
    assert pruned.pruner is not None
    assert torch.equal(i, j) and torch.equal(a, b)


def test_pruning_survives_duplicates_and_constant_dims() -> None:
    bank = features(1, 96, 7).repeat(2000, 1)
    bank[1500:, 3] += 1.0
    distance_N1, index_N1 = BankSearch(bank).nearest(bank[[0, 1999]])
    assert distance_N1.flatten().tolist() == [0.0, 0.0]
    assert index_N1[0] < 1500 <= index_N1[1]


def test_a_large_offset_costs_no_precision() -> None:
    bank, patches = features(2000, 64, 8) + 1000.0, features(50, 64, 9) + 1000.0
    expected, _ = reference.nearest_rows(patches.numpy(), bank.numpy())
    found = BankSearch(bank).nearest(patches)[0][:, 0].numpy()
    np.testing.assert_allclose(found, expected.min(1), rtol=1e-3)


def test_search_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        BankSearch(torch.zeros(0, 4))
    search = BankSearch(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="5 dims"):
        search.nearest(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="4 neighbours"):
        search.nearest(torch.zeros(2, 4), 4)


@every_exact_search
@pytest.mark.parametrize("neighbours", [1, 5])
@pytest.mark.parametrize("made", [features, near_duplicates])
def test_every_exact_search_gives_the_same_bits(
    made: Callable[..., torch.Tensor], neighbours: int, build: Callable[[torch.Tensor], Search]
) -> None:
    bank, patches = made(1500, 96, 1), torch.cat([made(150, 96, 1), features(20, 96, 2), torch.zeros(1, 96)])
    distance_NK, index_NK = build(bank).nearest(patches, neighbours)
    expected, index = the_answer(patches, bank, neighbours)
    assert torch.equal(distance_NK, expected) and torch.equal(index_NK, index)
    assert torch.equal(build(bank).rows(index_NK), bank[index_NK])


def sheet(rows: int, dims: int, seed: int) -> torch.Tensor:
    """Points of three true dims, so that few are nearly as near as the nearest; real features are like this."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 3, generator=generator) @ features(3, dims, 5)


@pytest.mark.parametrize(("made", "least", "most"), [(sheet, 0.9, 1.0), (near_duplicates, 0.0, 0.1)])
def test_bfloat16_proves_what_it_can_and_asks_again_for_the_rest(
    made: Callable[..., torch.Tensor], least: float, most: float
) -> None:
    bank, patches = made(1500, 96, 1), made(150, 96, 1 if made is near_duplicates else 2)
    search = BankSearch(bank, "bfloat16")
    assert search.half is not None
    expected = the_answer(patches, bank, 1)[0]
    proven_N = expected[:, 0] < search.half.propose(patches - search.mean_D, 1).least_N
    assert least <= proven_N.double().mean() <= most
    assert torch.equal(search.nearest(patches)[0], expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dims", [1, 31, 384])
def test_no_product_errs_by_more_than_its_bound(dims: int, scale: float) -> None:
    bank, patches = features(1100, dims, 1) * scale, features(200, dims, 2) * scale
    patches[:100] = bank[:100] * (1 + 2.0**-9)  # roundings of both sides in one direction
    bank[3], patches[3] = 0.0, 0.0
    centred_MD, centred_ND = bank - bank.mean(0), patches - bank.mean(0)
    square_N = centred_ND.square().sum(1)
    exact_NM = torch.cdist(centred_ND.double(), centred_MD.double(), compute_mode="donot_use_mm_for_euclid_dist")
    product, half, pruner = Product(centred_MD), HalfProduct(centred_MD), Pruner(centred_MD)
    thin_NM = pruner.product.norms_M + pruner.thin(centred_ND, square_N) @ pruner.thin_ME.T
    cases = [
        (product.block(centred_ND, slice(None)), exact_NM, product.share),
        (half.block(centred_ND, slice(None)), exact_NM, half.half_share(centred_ND)[:, None]),
        (thin_NM, exact_NM[:, pruner.rows_M], pruner.thin_share),
    ]
    for value_NM, distance_NM, share in cases:
        approx_NM = value_NM + square_N[:, None]
        norm_N1 = square_N.sqrt()[:, None]
        assert (least_distance(approx_NM, norm_N1, share) <= distance_NM * (1 + SETTLED)).all()
        assert (approx_NM <= largest_approx(distance_NM * (1 + SETTLED), norm_N1, share)).all()
    assert half.half_share(centred_ND).max() < 0.0122 + product.share
    ratio = half.half_share(centred_ND).min() / product.share
    assert ratio > 3  # the bounds are not one and the same


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_of_the_bank_gives_the_same_answer(data: st.DataObject) -> None:
    rows, dims = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    bank = features(rows, dims, data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        bank = bank.round()  # many exact duplicates and ties
    patches = torch.cat([bank[:5].flip(0), features(4, dims, 5).round()])
    edges = sorted(data.draw(st.sets(st.integers(1, rows - 1), max_size=6))) if rows > 1 else []
    pieces = [BankSearch(bank[a:b]) for a, b in zip([0, *edges], [*edges, rows], strict=True)]
    neighbours = data.draw(st.integers(1, rows))
    whole, cut = BankSearch(bank).nearest(patches, neighbours), ShardedSearch(pieces).nearest(patches, neighbours)
    assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])
    assert torch.equal(ShardedSearch(pieces).rows(whole[1]), bank[whole[1]])
    for k, n in ((0, 0), (neighbours - 1, len(patches) - 1)):
        assert whole[0][n, k] == settled_distance(bank[whole[1][n, k]], patches[n])


@given(st.integers(1, 1000), st.integers(1, 50))
def test_pieces_cover_the_bank_evenly(rows: int, pieces: int) -> None:
    if pieces > rows:
        with pytest.raises(ValueError, match="cannot be cut"):
            split_bank(rows, pieces)
        return
    cut = split_bank(rows, pieces)
    assert [n for start, stop in cut for n in range(start, stop)] == list(range(rows))
    sizes = {stop - start for start, stop in cut}
    assert len(cut) == pieces and max(sizes) - min(sizes) <= 1


def test_pieces_of_different_banks_are_refused() -> None:
    with pytest.raises(ValueError, match="same dims"):
        ShardedSearch([BankSearch(torch.zeros(2, 3)), BankSearch(torch.zeros(2, 4))])


@pytest.mark.parametrize("shape", [(1,), (7,), (8192,), (64, 9), (1, 1500)])
def test_a_settled_distance_depends_on_its_pair_alone(shape: tuple[int, ...]) -> None:
    rows, patch = features(1500, 384, 1), features(1, 384, 2)[0]
    index = torch.arange(int(np.prod(shape))).view(shape) % 1500
    alone = torch.stack([settled_distance(rows[i], patch) for i in range(1500)])
    assert torch.equal(settled_distance(rows[index], patch), alone[index])
    exact = (rows.double() - patch.double()).square().sum(1).sqrt()
    assert ((alone.double() - exact).abs() <= SETTLED * exact).all()


@every_exact_search
def test_features_that_are_not_finite_get_distances_that_are_not_finite(
    build: Callable[[torch.Tensor], Search],
) -> None:
    patches = features(40, 32, 2)
    patches[3] = torch.nan
    distance_NK, index_NK = build(features(1500, 32, 1)).nearest(patches, 2)
    assert not torch.isfinite(distance_NK[3]).any() and torch.isfinite(distance_NK[:3]).all()
    assert int(index_NK.min()) >= 0 and int(index_NK.max()) < 1500


def test_ivfpq_finds_most_and_tells_the_true_distance_of_what_it_finds() -> None:
    bank, patches = features(3000, 32, 1, clusters=40), features(500, 32, 2, clusters=40)
    search = IvfPqSearch(bank, seed=3)
    distance_NK, index_NK = search.nearest(patches, 3)
    all_NM, _ = reference.nearest_rows(patches.numpy(), bank.numpy())
    np.testing.assert_allclose(distance_NK.numpy(), np.take_along_axis(all_NM, index_NK.numpy(), 1), rtol=1e-5)
    recall = (all_NM[np.arange(500), index_NK[:, 0].numpy()] <= all_NM.min(1) * (1 + 1e-6)).mean()
    assert recall_at_1(search, bank, patches) == pytest.approx(recall, abs=0.003)
    assert 0.7 < recall < 1.0 and not search.exact


def test_ivfpq_is_repeatable_and_survives_saving() -> None:
    bank, patches = features(2000, 32, 1), features(100, 32, 2)
    first, again, other = (IvfPqSearch(bank, seed=seed) for seed in (1, 1, 2))
    stored = first.tensors()[faiss_search.BANK_INDEX]
    assert stored.dtype == torch.uint8 and torch.equal(stored, again.tensors()[faiss_search.BANK_INDEX])
    assert not torch.equal(stored, other.tensors()[faiss_search.BANK_INDEX])
    loaded = IvfPqSearch(bank, stored=stored)
    for a, b in zip(first.nearest(patches, 2), loaded.nearest(patches, 2), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ArtifactError, match="its bank"):
        IvfPqSearch(bank[:-1], stored=stored)
    with pytest.raises(ArtifactError, match="not a faiss index"):
        IvfPqSearch(bank, stored=stored[:40])


def test_ivfpq_searches_in_full_where_its_lists_hold_too_few() -> None:
    bank, patches = features(2000, 16, 1), features(30, 16, 2)
    found = IvfPqSearch(bank).nearest(patches, 1999)
    for a, b in zip(found, BankSearch(bank).nearest(patches, 1999), strict=True):
        assert torch.equal(a, b)


def test_ivfpq_refuses_a_small_bank() -> None:
    with pytest.raises(SpecError, match=r"needs a bank of 624 rows, this one has 600\. Set it to exact"):
        IvfPqSearch(features(600, 16, 1))


def test_without_faiss_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for build in (FaissSearch, IvfPqSearch):
        with pytest.raises(SpecError, match=r"raydetect\[cpu\]"):
            build(features(700, 16, 1))


def test_faiss_uses_the_threads_of_torch() -> None:
    import faiss

    before = torch.get_num_threads()
    search = FaissSearch(features(200, 16, 1))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        search.nearest(features(50, 16, 2))
        assert faiss.omp_get_max_threads() == threads
    torch.set_num_threads(before)


def test_ties_across_blocks_are_settled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = near_duplicates(300, 24, 1)
    whole = BankSearch(bank).nearest(bank[:90], 7)
    monkeypatch.setattr(exact_search, "BLOCK_ROWS", 37)
    monkeypatch.setattr(exact_search, "TIE_PATCHES", 11)
    monkeypatch.setattr(exact_search, "TIE_PAIRS", 53)
    for a, b in zip(whole, BankSearch(bank).nearest(bank[:90], 7), strict=True):
        assert torch.equal(a, b)
