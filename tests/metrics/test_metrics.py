"""Metrics against scikit-learn, loops and what they promise."""

import doctest

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from raydetect import metrics
from raydetect.errors import SpecError
from raydetect.metrics import conformal
from raydetect.metrics.conformal import p_values, required_size, threshold_for
from raydetect.metrics.f1 import best_f1
from raydetect.metrics.pro import aupro
from raydetect.metrics.roc import auroc, average_precision
from tests.reference import reference
from tests.reference.reference import p_value

scores_and_labels = st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 1)), min_size=2, max_size=60)


@given(scores_and_labels)
def test_ranking_metrics_are_scikit_learns_with_ties(pairs: list[tuple[int, int]]) -> None:
    scores, labels = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    assume(0 < labels.sum() < len(labels))
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "scores"), [([0, 0], [1.0, 2.0]), ([0, 1], [1.0]), ([0, 1], [1.0, np.nan]), ([0, 1], [1.0, np.inf])]
)
def test_undefined_metrics_are_refused(labels: list[int], scores: list[float]) -> None:
    for metric in (auroc, average_precision, best_f1):
        with pytest.raises(ValueError, match=r"label|score"):
            metric(np.array(labels), np.array(scores))


@given(scores_and_labels)
def test_the_best_f1_is_that_of_a_sweep_over_thresholds(pairs: list[tuple[int, int]]) -> None:
    scores, labels = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    assume(0 < labels.sum() < len(labels))
    swept = {threshold: f1_score(labels, scores >= threshold) for threshold in scores}
    found, threshold = best_f1(labels, scores)
    assert found == pytest.approx(max(swept.values()), abs=1e-12)
    assert swept[threshold] == pytest.approx(found, abs=1e-12)


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.3, 1.0]), st.integers(2, 50))
def test_aupro_is_that_of_a_sweep_over_thresholds(seed: int, limit: float, levels: int) -> None:
    random = np.random.default_rng(seed)
    masks = [(random.random((6, 9)) < share).astype(np.uint8) for share in (0.0, 0.3, 0.1)]
    maps = [random.integers(0, levels, (6, 9)) + 2.0 * mask for mask in masks]
    assume(any(mask.any() for mask in masks))
    assert aupro(maps, masks, limit) == pytest.approx(reference.aupro(maps, masks, limit), abs=1e-12)


def test_aupro_of_a_perfect_and_of_a_blind_map() -> None:
    mask = np.zeros((8, 8))
    mask[1:3, 1:3] = mask[5, 5] = 1
    assert aupro([mask], [mask]) == 1.0
    assert aupro([np.zeros((8, 8))], [mask], 0.3) == pytest.approx(0.15)  # the diagonal up to the limit


@pytest.mark.parametrize(
    ("maps", "masks", "limit", "message"),
    [
        ([np.zeros((2, 2))], [np.zeros((2, 2))], 0.3, "at least one anomalous region"),
        ([np.zeros((2, 2))], [np.ones((2, 2))], 0.3, "one normal pixel"),
        ([np.zeros((2, 2))], [np.eye(3)], 0.3, "image 0"),
        ([np.full((2, 2), np.nan)], [np.eye(2)], 0.3, "not finite"),
        ([np.zeros((2, 2))], [np.eye(2)], 0.0, "fpr_limit"),
    ],
)
def test_aupro_that_is_not_defined_is_refused(
    maps: list[np.ndarray], masks: list[np.ndarray], limit: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        aupro(maps, masks, limit)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=60), st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_p_values_count_what_is_at_least_as_large(calibration: list[int], scores: list[int]) -> None:
    held = np.sort(np.array(calibration, float))
    found = p_values(held, np.array(scores, float))
    assert found.tolist() == [p_value(sorted(calibration), score) for score in scores]
    assert found.tolist() == [conformal.p_value(tuple(sorted(calibration)), score) for score in scores]


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=120),
    st.floats(0.005, 0.9),
    st.lists(st.integers(-5, 5), min_size=1, max_size=20),
)
def test_the_threshold_flags_exactly_what_the_p_value_flags(
    calibration: list[int], alpha: float, scores: list[int]
) -> None:
    held = np.sort(np.array(calibration, float))
    if len(held) < required_size(alpha):
        with pytest.raises(SpecError, match="held-out normal images"):
            threshold_for(held, alpha)
        return
    threshold = threshold_for(held, alpha)
    for score in scores:
        assert (score >= threshold) == (p_value(sorted(calibration), score) <= alpha * (1 + 1e-9))


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_the_share_of_false_flags_is_at_most_alpha(alpha: float) -> None:
    random = np.random.default_rng(0)
    flagged = []
    for _ in range(400):
        held = np.sort(random.gamma(2.0, size=199))
        flagged.append((random.gamma(2.0, size=200) >= threshold_for(held, alpha)).mean())
    assert np.mean(flagged) == pytest.approx(alpha, abs=4 * np.std(flagged) / 20)


@pytest.mark.parametrize(("alpha", "size"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.5, 1), (1 / 3, 2)])
def test_the_fewest_calibration_images(alpha: float, size: int) -> None:
    assert required_size(alpha) == size
    held = np.arange(size, dtype=float)
    assert threshold_for(held, alpha) > held[-1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_metrics_of_maps_are_scikit_learns_over_all_pixels(seed: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    shapes = [(6, 9), (4, 5), (6, 9)]
    masks = [(random.random(shape) < share) * 255 for shape, share in zip(shapes, (0.0, 0.3, 0.2), strict=True)]
    assume(any(mask.any() for mask in masks))
    maps = [random.integers(0, levels, shape).astype(np.float32) for shape in shapes]
    labels = np.concatenate([mask.ravel() for mask in masks]) > 0
    scores = np.concatenate([found.ravel() for found in maps])
    assert metrics.pixel_auroc(maps, masks) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.pixel_average_precision(maps, masks) == pytest.approx(average_precision_score(labels, scores))
    best = max(f1_score(labels, scores >= threshold) for threshold in np.unique(scores))
    value, threshold = metrics.pixel_best_f1(maps, masks)
    assert value == pytest.approx(best, abs=1e-12) == f1_score(labels, scores >= threshold)


def test_metrics_of_maps_refuse_what_does_not_fit() -> None:
    blank = np.zeros((4, 4))
    for maps, masks, message in (
        ([blank], [], "1 maps and 0 masks"),
        ([], [], "0 maps and 0 masks"),
        ([blank, blank], [blank, np.ones((4, 3))], r"image 1: the map has shape \(4, 4\) and its mask \(4, 3\)"),
        ([blank], [blank], "labels must contain both"),
        ([np.full((4, 4), np.nan)], [np.eye(4)], "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.pixel_auroc(maps, masks)


def test_the_public_names_are_there_and_their_examples_run() -> None:
    for name in metrics.__all__:
        assert callable(getattr(metrics, name)) and name in dir(metrics)
    with pytest.raises(AttributeError, match="has no attribute 'aurok'"):
        _ = metrics.aurok
    ended = doctest.testmod(metrics)
    assert ended.failed == 0 and ended.attempted == 3
