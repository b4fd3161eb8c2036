"""Histograms: exact counts, whatever the order and however they were divided before merging."""

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetect.metrics.histogram import MAX_BINS, Histogram

numbers = st.floats(-1e12, 1e12, allow_nan=False) | st.floats(-1e-9, 1e-9) | st.sampled_from([0.0, 5e-324, -5e-324])


def counted(values: list[float], cuts: list[int] | None = None) -> Histogram:
    made = Histogram()
    edges = sorted({0, len(values), *(cuts or [])})
    for start, stop in pairwise(edges):
        made.add(np.asarray(values[start:stop]))
    return made


@given(st.lists(numbers, min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_bins_hold_what_a_loop_counts(values: list[float]) -> None:
    made = counted(values)
    slow = Counter(math.floor(Fraction(value) / Fraction(made.width)) for value in values)
    fast = {made.first + i: int(count) for i, count in enumerate(made.counts) if count}
    assert fast == slow and made.total == len(values) and len(made.counts) <= MAX_BINS
    assert (made.low, made.high) == (min(values), max(values))


@given(st.lists(numbers, min_size=1, max_size=40), st.lists(st.integers(0, 40), max_size=4), st.randoms())
@settings(max_examples=200, deadline=None)
def test_neither_order_nor_division_matters(values: list[float], cuts: list[int], random: object) -> None:
    whole = counted(values)
    mixed = list(values)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    split = [cut for cut in cuts if cut < len(values)]
    assert counted(mixed, split).plain() == whole.plain()
    half = len(values) // 2
    merged = counted(values[half:])
    merged.merge(counted(values[:half]))
    assert merged.plain() == whole.plain() == Histogram.of_plain(whole.plain()).plain()


def test_quantiles_are_within_a_bin_of_the_sorted_numbers() -> None:
    values = np.random.default_rng(3).lognormal(size=5000)
    made = Histogram()
    made.add(values)
    for share in (0.0, 0.05, 0.5, 0.9, 1.0):
        assert abs(made.quantile(share) - np.quantile(values, share, method="inverted_cdf")) <= made.width
    assert math.isnan(Histogram().quantile(0.5))
    assert made.with_bins(50).total == 5000 and 25 < len(made.with_bins(50).counts) <= 50


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Histogram().add(np.asarray([1.0, np.nan]))
