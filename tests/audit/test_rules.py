"""The rules' grammar, measures that have no value, and distances against scipy and by simulation."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raydetect.audit.measures import MEASURES, measures
from raydetect.audit.rules import evaluate_rule, parse_rules
from raydetect.audit.statistics import Statistics
from raydetect.errors import SpecError
from raydetect.metrics.drift import ks_distance, share_interval, stability_index
from raydetect.metrics.histogram import Histogram


def counted(values: np.ndarray) -> Histogram:
    made = Histogram()
    made.add(values)
    return made


def outcome(text: str, **values: float | None) -> str:
    (rule,) = parse_rules([text], list(values))
    return evaluate_rule(rule, values).outcome


def test_rules_hold_or_not() -> None:
    assert outcome("a > 0.02", a=0.03) == "alarm" and outcome("a > 0.02", a=0.02) == "calm"
    assert outcome("a >= 2e-2", a=0.02) == "alarm" and outcome("a <= -1.5", a=-1.5) == "alarm"
    assert outcome("dirty lens: a<1 and b > +3", a=0, b=4) == "alarm"
    assert outcome("a < 1 and b > 3", a=0, b=3) == "calm"
    assert outcome("a > 1", a=None) == "not judged" and outcome("a > 1 and b > 1", a=None, b=0) == "calm"
    (named,) = parse_rules(["dirty lens : a > 1"], ["a"])
    assert named.name == "dirty lens" and parse_rules(["a > 1"], ["a"])[0].name == "a > 1"


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "a > ", "> 1", "a > b", "a = 1", "a > 1 or a > 2", "a > 1 and", "and a > 1", "a > 1; a > 2", "(a > 1)",
        "__import__('os').system('x') > 1", "a > nan", "a > inf", "a > 1..2", "a.b > 1", "a > 1 and " * 40 + "a > 1",
        "x: y: a > 1", "a > 1e999", "a" * 600,
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(SpecError, match=r"alarm_when\.0: "):
        parse_rules([text], ["a"])


def test_a_misspelt_measure_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="Did you mean 'flagged_rate'"):
        parse_rules(["flaged_rate > 1"], MEASURES)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_rule_or_a_sentence(text: str) -> None:
    try:
        rules = parse_rules([text], MEASURES)
    except SpecError:
        return
    assert rules[0].conditions


def test_the_ks_distance_is_that_of_scipy_up_to_a_bin() -> None:
    random = np.random.default_rng(7)
    for shift in (0.0, 0.3, 2.0):
        one, other = random.normal(size=800), random.normal(shift, 1.2, size=1500)
        found = ks_distance(counted(one), counted(other))
        exact = stats.ks_2samp(one, other).statistic
        assert found.value <= exact + 1e-12 and exact <= found.high and found.value == pytest.approx(exact, abs=0.01)
    assert ks_distance(counted(np.arange(5.0)), counted(np.arange(5.0))).value == 0.0
    same = ks_distance(counted(np.full(900, 7.0)), counted(np.full(900, 7.0)))
    assert same.value == same.low == 0.0 and same.high < 0.2
    with pytest.raises(ValueError, match="empty distribution"):
        ks_distance(Histogram(), counted(np.ones(3)))


def test_intervals_hold_as_often_as_they_say() -> None:
    random = np.random.default_rng(11)
    truth = stats.norm.cdf(0.25) - stats.norm.cdf(-0.25)  # of N(0, 1) and N(0.5, 1)
    edges = stats.norm.ppf(np.linspace(0, 1, 11))
    p, q = np.diff(stats.norm.cdf(edges - 0.5)), np.full(10, 0.1)
    index = float(((p - q) * np.log(p / q)).sum())
    ks, psi = [], []
    for _ in range(120):
        night, before = counted(random.normal(0.5, size=700)), counted(random.normal(size=900))
        distance, stability = ks_distance(night, before), stability_index(night, before)
        ks.append(distance.low <= truth <= distance.high)
        psi.append(stability.low <= index <= stability.high)
    assert np.mean(ks) >= 0.95  # Massart's bound is on the safe side
    assert np.mean(psi) >= 0.85  # 95 % nominally, less four standard errors and what a bootstrap lacks


def test_equal_nights_are_near_and_others_far() -> None:
    random = np.random.default_rng(13)
    same = [stability_index(counted(random.normal(size=500)), counted(random.normal(size=2000))) for _ in range(40)]
    assert np.mean([found.low <= 0.001 for found in same]) >= 0.9
    far = stability_index(counted(random.normal(2, 1, size=500)), counted(random.normal(size=2000)))
    assert far.low > 1.0


@pytest.mark.parametrize(("part", "whole"), [(0, 10), (3, 50), (50, 50), (1, 1), (200, 10_000)])
def test_shares_have_wilsons_interval(part: int, whole: int) -> None:
    found = share_interval(part, whole)
    exact = stats.binomtest(part, whole).proportion_ci(0.95, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((part / whole, exact.low, exact.high), abs=1e-9)
    assert share_interval(0, 0).high == 1.0


def table(scores: list[float | None], flagged: list[bool | None], bright: float = 0.5) -> pa.Table:
    ok = [score is not None for score in scores]
    return pa.table(
        {
            "status": ["ok" if fine else "corrupt" for fine in ok],
            "image_score": pa.array(scores, pa.float64()),
            "flagged": pa.array(flagged, pa.bool_()),
            "width": pa.array([10 if fine else None for fine in ok], pa.int32()),
            "height": pa.array([20 if fine else None for fine in ok], pa.int32()),
            "brightness": pa.array([bright if fine else None for fine in ok], pa.float64()),
            "sharpness": pa.array([0.1 if fine else None for fine in ok], pa.float64()),
        }
    )


def test_measures_of_a_night_and_its_baseline() -> None:
    night, baseline = Statistics("image_score"), Statistics("image_score")
    night.add(table([1.0, 2.0, 3.0, None], [False, True, True, None], 0.4))
    baseline.add(table([1.0, 1.0, 2.0, 4.0], [False, False, False, True], 0.5))
    found = measures(night, Statistics.of_plain(baseline.plain()))
    assert set(found) == set(MEASURES)
    assert found["images"] == 4 and found["bad_rate"] == 0.25 and found["flagged_rate"] == pytest.approx(2 / 3)
    assert found["flagged_rate_change"] == pytest.approx(2 / 3 - 1 / 4) and found["bad_rate_change"] == 0.25
    assert found["size_median"] == 200 and found["size_ks"] == 0.0
    assert found["brightness_change"] == pytest.approx(-0.2) and found["brightness_ks"] == 1.0
    alone = measures(night, None)
    assert alone["score_ks"] is None and alone["flagged_rate_change"] is None and alone["score_median"] is not None
    nothing = measures(Statistics("image_score"), baseline)
    assert nothing.pop("images") == 0 and set(nothing.values()) == {None}


def test_merged_statistics_are_those_of_all_rows() -> None:
    tables = [table([1.0, 2.0, None], [True, False, None]), table([5.0, 0.1], [False, True], 0.9)]
    whole, first, second = (Statistics("image_score") for _ in range(3))
    for rows in tables:
        whole.add(rows)
    first.add(tables[0])
    second.add(tables[1])
    second.merge(first)
    assert second.plain() == whole.plain()
