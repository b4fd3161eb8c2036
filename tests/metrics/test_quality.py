"""Mergeable summaries: figures against scikit-learn and slow sweeps, proven bounds, merging, memory, intervals."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from raydetect.metrics import pixels
from raydetect.metrics.curves import Estimate, ranking_figures
from raydetect.metrics.figures import image_figures, pixel_figures
from raydetect.metrics.pixels import ANOMALOUS, COLUMNS, NORMAL, UNIT, aupro_of, pixels_of
from raydetect.metrics.quality import ImageGroup, Quality, counted
from raydetect.metrics.score_bins import ScoreBins, ScoreBinsBuilder, order_of
from tests.reference import reference

GOOD, BAD = ImageGroup("bottle", 0, "good"), ImageGroup("bottle", 1, "crack")
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def histogram(scores: list[float], limit: int = 1 << 18) -> ScoreBins:
    return ScoreBins.of(np.array(scores), limit)


def same(one: ScoreBins, two: ScoreBins) -> bool:
    pairs = ((one.bins_B, two.bins_B), (one.counts_BC, two.counts_BC))
    return one.shift == two.shift and all(np.array_equal(a, b) for a, b in pairs)


def slow_figures(normal: np.ndarray, anomalous: np.ndarray) -> dict[str, float]:
    """scikit-learn's, and a sweep over all thresholds."""
    scores = np.concatenate([normal, anomalous]).astype(np.float64)
    labels = np.repeat([0, 1], [len(normal), len(anomalous)])
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {
        "auroc": roc_auc_score(labels, scores),
        "ap": average_precision_score(labels, scores),
        "f1_max": max(f1_score(labels, scores >= threshold) for threshold in set(scores.tolist())),
        "fpr_at_95_tpr": min(f for f, t in zip(false, true, strict=True) if t >= 0.95 - 1e-12),
    }


def maps_of(seed: int, count: int, levels: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random maps with the masks of a few regions; of few values when `levels` is given."""
    random, found = np.random.default_rng(seed), []
    for i in range(count):
        mask = (random.random((8, 9)) < (0.25 if i % 2 else 0.0)).astype(np.uint8)
        values = random.normal(size=(8, 9)) if levels is None else random.integers(0, levels, (8, 9))
        found.append(((values + 1.5 * mask).astype(np.float32), mask))
    return found


@given(st.lists(floats, min_size=2, max_size=30))
def test_the_order_of_floats_is_kept_and_the_two_zeros_are_one(scores: list[float]) -> None:
    values = np.array(scores, np.float32)
    order = order_of(values)
    assert np.array_equal(values[:, None] < values[None], order[:, None] < order[None])
    assert order.min() >= 0 and order.max() < 1 << 32
    assert len(set(order_of(np.array([0.0, -0.0])).tolist())) == 1


@settings(deadline=None)  # scikit-learn is slow when it is called for the first time
@given(
    st.lists(st.one_of(st.integers(-3, 3).map(float), floats), min_size=1, max_size=25),
    st.lists(st.one_of(st.integers(-3, 3).map(float), floats), min_size=1, max_size=25),
    st.sampled_from([2, 5, 1000]),
)
def test_figures_are_scikit_learns_and_a_sweeps_and_bins_keep_their_bounds(
    normal: list[float], anomalous: list[float], limit: int
) -> None:
    slow = slow_figures(np.array(normal, np.float32), np.array(anomalous, np.float32))
    exact = ranking_figures(histogram(normal), histogram(anomalous))
    for name, value in slow.items():
        assert exact[name].value == pytest.approx(value, abs=1e-12), name
        assert exact[name].error == 0, name
    for name, figure in ranking_figures(histogram(normal, limit), histogram(anomalous, limit)).items():
        assert figure.low - 1e-12 <= slow[name] <= figure.high + 1e-12, name
        assert figure.low - 1e-12 <= figure.value <= figure.high + 1e-12, name


@pytest.mark.parametrize(("normal", "anomalous"), [([1.0, 1.0, 1.0], [1.0]), ([0.0], [1.0]), ([1.0], [0.0])])
def test_all_ties_and_perfect_and_wrong_orders(normal: list[float], anomalous: list[float]) -> None:
    found = ranking_figures(histogram(normal), histogram(anomalous))
    for name, value in slow_figures(np.array(normal), np.array(anomalous)).items():
        assert found[name].value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("normal", "anomalous", "message"), [([], [1.0], "nothing normal"), ([1.0], [], "nothing anom")]
)
def test_one_class_alone_is_refused_with_a_sentence(normal: list[float], anomalous: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking_figures(histogram(normal), histogram(anomalous))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_a_sentence_and_changes_nothing(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        histogram([1.0, bad])
    quality, values = Quality(), np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quality.add(GOOD, "a", bad, values, values)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quality.add(GOOD, "a", 1.0, np.full((2, 2), bad, np.float32), values)
    assert counted(quality) == {"normal": 0, "anomalous": 0, "without_mask": 0}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([None, 2, 6]), st.sampled_from([4, 12, 1 << 16]))
def test_pixel_figures_are_those_of_a_sweep_and_bins_keep_their_bounds(
    seed: int, levels: int | None, limit: int
) -> None:
    pairs = maps_of(seed, 3, levels)
    assume(any(mask.any() for _, mask in pairs))
    found = ScoreBins.empty(limit, COLUMNS).merge(*[pixels_of(*pair, limit) for pair in pairs])
    for fpr_limit in (0.3, 0.05, 1.0):
        slow = reference.aupro([m for m, _ in pairs], [k for _, k in pairs], fpr_limit)
        figure = aupro_of([found], fpr_limit)
        assert figure.low - 1e-9 <= slow <= figure.high + 1e-9
        if found.shift == 0:
            assert figure.value == pytest.approx(slow, abs=2 / UNIT)
    values, labels = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    slow_pixels = slow_figures(values[labels == 0], values[labels == 1])
    for name, figure in ranking_figures(found, found, (NORMAL, ANOMALOUS)).items():
        assert figure.low - 1e-12 <= slow_pixels[name] <= figure.high + 1e-12, name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 16, 1 << 16]))
def test_merging_is_associative_and_commutative_to_the_bit(seed: int, limit: int) -> None:
    one, two, three = parts = [pixels_of(*pair, limit) for pair in maps_of(seed, 3, None)]
    builder = ScoreBinsBuilder(limit, COLUMNS)
    for part in parts:
        builder.add(part)
        if seed % 2:
            builder.whole()
    whole = builder.whole()
    assert same(one.merge(two).merge(three), one.merge(two.merge(three)))
    assert same(one.merge(two), two.merge(one))
    assert same(whole, three.merge(one).merge(two))
    assert len(whole.bins_B) <= limit
    assert whole.counts_BC[:, NORMAL].sum() + whole.counts_BC[:, ANOMALOUS].sum() == 3 * 8 * 9
    assert whole.counts_BC[:, 2].sum() == UNIT * sum(len(reference.regions(k)) for _, k in maps_of(seed, 3, None))


def test_histograms_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not merge"):
        ScoreBins.empty(8).merge(ScoreBins.empty(8, COLUMNS))
    with pytest.raises(ValueError, match="at least 2"):
        ScoreBins.empty(1)
    with pytest.raises(ValueError, match="must be equal"):
        pixels_of(np.zeros((2, 2), np.float32), np.zeros((3, 3)), 8)
    with pytest.raises(ValueError, match="at least one anomalous region"):
        aupro_of([ScoreBins.empty(8, COLUMNS)], 0.3)
    with pytest.raises(ValueError, match="fpr_limit"):
        aupro_of([ScoreBins.empty(8, COLUMNS)], 0.0)


def random_quality(seed: int, count: int) -> Quality:
    random, quality = np.random.default_rng(seed), Quality()
    for number, (map_HW, mask_HW) in enumerate(maps_of(seed, count, None)):
        label = int(mask_HW.any())
        quality.add(BAD if label else GOOD, f"{seed}/{number}", random.normal() + label, map_HW, mask_HW)
    return quality


def test_a_merged_archive_gives_the_figures_of_a_whole_one() -> None:
    parts, whole = [random_quality(seed, 12) for seed in range(3)], Quality()
    for seed in range(3):
        random = np.random.default_rng(seed)
        for number, (map_HW, mask_HW) in enumerate(maps_of(seed, 12, None)):
            label = int(mask_HW.any())
            whole.add(BAD if label else GOOD, f"{seed}/{number}", random.normal() + label, map_HW, mask_HW)
    merged = parts[2].merge(parts[0]).merge(parts[1])
    for figures in (image_figures, pixel_figures):
        assert figures(merged, 0, 20) == figures(whole, 0, 20)
    assert counted(merged) == {"normal": 18, "anomalous": 18, "without_mask": 0}


def test_defects_are_judged_with_all_normal_images_and_masks_that_lack_are_counted() -> None:
    quality, map_HW = random_quality(0, 20), np.zeros((2, 2), np.float32)
    quality.add(ImageGroup("bottle", 1, "hole"), "x", 9.0, map_HW, None)
    quality.add(ImageGroup("cable", 0, "good"), "y", 9.0, map_HW, map_HW)
    assert quality.categories == ["bottle", "cable"] and quality.of("bottle").defects("bottle") == ["crack", "hole"]
    hole = quality.of("bottle", "hole")
    assert counted(hole) == {"normal": 10, "anomalous": 1, "without_mask": 1}
    assert image_figures(hole, 0)["image_auroc"].estimate.value == 1.0
    assert pixel_figures(hole, 0) == {}


def test_intervals_are_repeatable_and_hold_the_true_auroc_as_often_as_they_say() -> None:
    held = 0
    truth = 0.760250  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for seed in range(60):
        random, quality = np.random.default_rng(seed), Quality()
        for i in range(80):
            quality.add(BAD if i % 2 else GOOD, str(i), random.normal() + i % 2, None, None)
        low, high = image_figures(quality, 0, 100)["image_auroc"].spread or (1, 0)
        held += low <= truth <= high
    assert held >= 51  # 57 expected; P(fewer than 51 of 60 | 0.95) = 0.3 %, 0.93 still gives 3 %
    assert image_figures(quality, 3) == image_figures(quality, 3) != image_figures(quality, 4)


def test_pixel_intervals_surround_the_figure_and_narrow_with_more_images() -> None:
    few, many = (pixel_figures(random_quality(5, count), 0) for count in (24, 240))
    for name in ("pixel_auroc", "aupro_0.3"):
        widths = []
        for measured in (few[name], many[name]):
            assert measured.spread is not None
            assert measured.spread[0] <= measured.estimate.value <= measured.spread[1]
            widths.append(measured.spread[1] - measured.spread[0])
        assert widths[1] < widths[0]


MEMORY = """
import resource, sys
import numpy as np
from raydetect.metrics.figures import pixel_figures
from raydetect.metrics.quality import ImageGroup, Quality

def run(count):
    random, quality = np.random.default_rng(0), Quality()
    for i in range(count):
        mask = np.zeros((16, 16), np.uint8)
        mask[3:7, 4:9] = i % 2
        values = random.gamma(2.0, size=(16, 16)).astype(np.float32) + mask
        quality.add(ImageGroup("c", i % 2, "d" if i % 2 else "good"), str(i), float(values.max()), values, mask)
    return quality

run(2000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quality = run(int(sys.argv[1]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = pixel_figures(quality, 0, 2)
print(after - before, found["pixel_auroc"].estimate.error, found["aupro_0.3"].estimate.error)
"""


def test_memory_does_not_grow_with_the_number_of_maps() -> None:
    command = [sys.executable, "-c", MEMORY, "40000"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    grown_kib, auroc_error, aupro_error = (float(word) for word in ended.stdout.split())
    print(f"40,000 maps: {grown_kib / 1024:.1f} MiB more than 2,000; bounds {auroc_error:.1e}, {aupro_error:.1e}")
    assert grown_kib < 16 * 1024  # the maps themselves are 39 MiB, their scores and masks not counted
    assert auroc_error < 1e-4 and aupro_error < 1e-3


def test_a_figure_tells_the_larger_side_of_its_bounds() -> None:
    assert Estimate(0.5, 0.4, 0.8).error == pytest.approx(0.3)


@pytest.mark.parametrize("limit", [64, 1 << 20])
def test_pixels_counted_in_parts_give_the_same_bins(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    map_HW, mask_HW = random.normal(size=(90, 70)).astype(np.float32), np.zeros((90, 70), bool)
    mask_HW[10:30, 5:40], mask_HW[80:, 60:] = True, True
    whole = pixels.pixels_of(map_HW, mask_HW, limit)
    monkeypatch.setattr(pixels, "PIXELS", 1000)
    parts = pixels.pixels_of(map_HW, mask_HW, limit)
    assert parts.shift == whole.shift and (parts.bins_B == whole.bins_B).all()
    assert (parts.counts_BC == whole.counts_BC).all()
