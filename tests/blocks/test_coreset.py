"""Coresets against one pass per centre, brute force, and the same over any number of workers."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetect.blocks.coresets import keyed_rows as rows_module
from raydetect.blocks.coresets.coreset import Coreset, CoresetMode, choose_coreset
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.integer_embeddings import integer_points
from raydetect.blocks.coresets.keyed_rows import FitState, KeyedRows, RowStore
from raydetect.blocks.search.neighbors import BankSearch
from tests.blocks.test_blocks import features
from tests.builders.group import together
from tests.reference import reference


def images_of(points_ND: torch.Tensor, per_image: int) -> dict[str, torch.Tensor]:
    """Points dealt to images `image-0000`, ... of `per_image` rows, fewer in the last."""
    return {f"image-{i:04d}": part for i, part in enumerate(points_ND.split(per_image))}


def piece(images: dict[str, torch.Tensor], keys: list[str], group: Group, dims: int, max_bytes: int = 1) -> KeyedRows:
    """One worker's rows."""
    found = KeyedRows(dims, group, max_bytes)
    for key in keys:
        found.add(key, images[key])
    return found


def dealt(keys: list[str], size: int, seed: int) -> list[list[str]]:
    """Keys shuffled and dealt to workers, unevenly; some may get none."""
    random = np.random.default_rng(seed)
    owner = random.integers(size, size=len(keys))
    order = random.permutation(len(keys))
    return [[keys[i] for i in order if owner[i] == rank] for rank in range(size)]


def over(images: dict[str, torch.Tensor], size: int, count: int, seed: int = 0, **words: object) -> list[Coreset]:
    """The coreset as every one of `size` workers sees it."""
    dims = next(iter(images.values())).shape[1]
    deal = dealt(sorted(images), size, seed + size)

    def work(group: Group) -> Coreset:
        return choose_coreset(piece(images, deal[group.rank], group, dims), count, seed=seed, **words)  # type: ignore[arg-type]

    return together(size, work)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 200), st.integers(1, 24), st.integers(0, 10_000), st.integers(1, 64), st.booleans(),
    st.sampled_from([1, 2, 3, 4]),
)  # fmt: skip
def test_exact_is_one_pass_per_centre_on_any_number_of_workers(
    count: int, dims: int, seed: int, candidates: int, many_ties: bool, size: int
) -> None:
    points = features(count, dims, seed)
    if many_ties:
        points = points.round()
        points[count // 2 :] = points[: count - count // 2].clone()  # exact duplicates
    images, wanted = images_of(points, 7), max(1, count // 3)
    whole = piece(images, sorted(images), Group(), dims)
    integers = integer_points(whole, 8, seed, Group()).store
    by_order = whole.order().argsort()
    plain = reference.farthest_first(integers.take(by_order).numpy(), wanted)
    expected = whole.names(by_order[torch.tensor(plain)])
    text = str([[k, r] for k, r in expected]).replace("'", '"')
    for found in over(images, size, wanted, seed, projected_dims=8, candidates=candidates):
        assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()
        assert torch.equal(found.rows_MD, whole.store.take(by_order[torch.tensor(plain)]))


@pytest.mark.parametrize("mode", ["exact", "random"])
def test_every_worker_count_gives_one_bank(mode: CoresetMode) -> None:
    images = images_of(features(3000, 40, 1, clusters=20), 64)
    found = [core for size in (1, 2, 3, 4) for core in over(images, size, 300, mode=mode, projected_dims=16)]
    assert len({core.sha256 for core in found}) == 1
    assert all(torch.equal(core.rows_MD, found[0].rows_MD) and core.radius == found[0].radius for core in found)


def test_integer_points_keep_distances_and_their_squares_are_exact() -> None:
    points = features(600, 200, 3)
    for dims in (None, 128, 64):
        made = integer_points(piece({"a": points}, ["a"], Group(), 200), dims, 0, Group())
        block = made.store.block(0).to(torch.float32)
        product, exact = block @ block.T, block.to(torch.int64) @ block.to(torch.int64).T
        assert torch.equal(product.to(torch.int64), exact)
        assert 4 * int(exact.diagonal().max()) < 2**24
        assert torch.equal(made.norms_N.to(torch.int64), exact.diagonal())
        ratio = torch.pdist(block.double()) * made.unit / torch.pdist(points.double())
        spread = 0.02 if dims is None else 2 / math.sqrt(dims)
        assert abs(float(ratio.mean()) - 1) < 0.1 and float(ratio.std()) < spread


def test_the_mean_is_the_mean() -> None:
    from raydetect.blocks.coresets.integer_embeddings import _mean

    points = features(5000, 30, 5)
    images = images_of(points, 50)
    deal = dealt(sorted(images), 3, 0)
    means = together(3, lambda g: _mean(piece(images, deal[g.rank], g, 30), float(points.abs().max()), g))
    np.testing.assert_allclose(means[0].numpy(), points.double().mean(0).numpy(), rtol=1e-6)
    assert torch.equal(means[0], _mean(piece(images, sorted(images), Group(), 30), float(points.abs().max()), Group()))


def brute_force_radius(points: np.ndarray, count: int) -> float:
    """The best covering radius with `count` of the points as centres."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    return min(float(distance[:, list(c)].min(1).max()) for c in itertools.combinations(range(len(points)), count))


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 11), st.integers(1, 3), st.integers(0, 1000), st.sampled_from(["exact", "composable"]))
def test_the_proven_ratio_holds_against_brute_force(count: int, wanted: int, seed: int, mode: CoresetMode) -> None:
    points = features(count, 3, seed)
    images = images_of(points, 2)
    whole = piece(images, sorted(images), Group(), 3)
    integers = integer_points(whole, None, seed, Group())
    best = brute_force_radius(integers.store.block(0).numpy().astype(float), wanted) * integers.unit
    found = over(images, 2, wanted, seed, mode=mode, projected_dims=None)[0]
    assert found.radius >= best * (1 - 1e-6)
    if found.proven_ratio is not None:
        assert found.radius <= found.proven_ratio * best * (1 + 1e-6)
    if mode == "exact":
        assert found.proven_ratio == pytest.approx(2.0) or found.radius == 0.0


def test_composable_covers_almost_as_well_and_random_does_not() -> None:
    points = features(4000, 32, 9, clusters=60)
    images = images_of(points, 80)

    def radius(mode: CoresetMode, size: int) -> float:
        bank = over(images, size, 400, mode=mode, projected_dims=None)[0].rows_MD
        return float(BankSearch(bank).nearest(points)[0].max())

    exact = radius("exact", 1)
    for size in (2, 4):
        assert radius("composable", size) <= 1.15 * exact
    assert radius("random", 1) > 1.15 * exact


def test_rows_lie_in_memory_or_in_a_file_and_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ROWS", 64)
    points = features(1000, 5, 2)
    stores = [RowStore(5, torch.float32, size) for size in (1, 3 * 64 * 20, 1 << 30)]
    for store in stores:
        for part in points.split(37):
            store.append(part)
        assert len(store) == 1000
        assert torch.equal(torch.cat([block for _, block in store.blocks()]), points)
        index = torch.tensor([999, 0, 63, 64, 500, 0, 831])
        assert torch.equal(store.take(index), points[index])
    assert [store._file is None for store in stores] == [False, False, True]


def test_a_key_counts_once_and_padding_never() -> None:
    state = FitState()
    batch = torch.arange(24.0).reshape(3, 2, 4)
    state.add(["a", "", "b"], {"x": batch})
    state.add(["b", "c"], {"x": batch[:2] + 100})
    found = state.rows["x"]
    assert len(found) == 6 and torch.equal(found.store.block(0)[2:4], batch[2])
    assert found.names(torch.tensor([0, 3, 5])) == [("a", 0), ("b", 1), ("c", 1)]


def test_everything_is_the_same_on_every_worker_and_in_one_order_for_all_names() -> None:
    images = images_of(torch.randn(40, 3), 4)
    whole = piece(images, list(images), Group(), 3).all_rows()
    assert torch.equal(whole.sort(0).values, torch.cat(list(images.values())).sort(0).values)
    keys = piece(images, list(images), Group(), 3).all_keys()
    assert torch.equal(whole, torch.cat([images[key] for key in keys]))
    shares = dealt(list(images), 3, 1)
    for found in together(3, lambda group: piece(images, shares[group.rank], group, 3).all_rows()):
        assert torch.equal(found, whole)
    assert together(3, lambda group: piece(images, shares[group.rank], group, 3).all_keys()) == [keys] * 3
    firsts = {key: rows[:1] for key, rows in images.items()}
    assert torch.equal(piece(firsts, list(firsts)[::-1], Group(), 3).all_rows(), whole[::4])


def test_workers_without_images_take_part() -> None:
    def work(group: Group) -> Coreset:
        state = FitState(group)
        if group.rank == 1:
            state.add(["a", "b"], {"x": features(20, 4, 0).reshape(2, 10, 4)})
        state.agree()
        return choose_coreset(state.rows["x"], 5, seed=0)

    found = together(3, work)
    assert found[0].sha256 == found[1].sha256 == found[2].sha256 and found[0].rows_MD.shape == (5, 4)


def test_nan_and_counts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="a: an embedding is NaN"):
        piece({"a": torch.full((3, 2), torch.nan)}, ["a"], Group(), 2)
    zeros = piece({"a": torch.zeros(3, 2)}, ["a"], Group(), 2)
    with pytest.raises(ValueError, match="4 centres"):
        choose_coreset(zeros, 4, seed=0)
    assert choose_coreset(zeros, 3, seed=0).rows_MD.shape == (3, 2)
