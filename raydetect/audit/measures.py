"""The measures available in rules: of a night alone, and of a night against its baseline."""

import math

from raydetect.audit.statistics import DISTRIBUTIONS, Statistics
from raydetect.metrics.drift import Distance, ks_distance, share_interval, stability_index

RATES = ("flagged_rate", "bad_rate")
ENDS = ("", "_low", "_high")
OF_RATE = (*ENDS, "_change")
OF_DISTRIBUTION = ("_median", "_change", *(f"_ks{end}" for end in ENDS), *(f"_psi{end}" for end in ENDS))
MEASURES = (
    "images",
    *(rate + end for rate in RATES for end in OF_RATE),
    *(name + end for name in DISTRIBUTIONS for end in OF_DISTRIBUTION),
)


def measures(night: Statistics, baseline: Statistics | None) -> dict[str, float | None]:
    """Computes every measure of a night; None where images or a baseline are missing.

    Rates have a 95 % interval (`_low`, `_high`) and a difference from the baseline (`_change`, absolute).
    Distributions have a median, its relative change from the baseline's (`_change`), and two distances to the baseline
    with intervals: `_ks` and `_psi`.

    Args:
        night: statistics of the night.
        baseline: statistics of earlier nights, merged; None = there are none.
    """
    found: dict[str, float | None] = dict.fromkeys(MEASURES)
    found["images"] = float(night.images)
    rates = {"flagged_rate": "scored", "bad_rate": "images"}
    for rate, whole in rates.items():
        part = rate.removesuffix("_rate")
        mine = _rate(night, part, whole)
        if mine is not None:
            found |= _with_ends(rate, mine)
            before = None if baseline is None else _rate(baseline, part, whole)
            found[f"{rate}_change"] = None if before is None else mine.value - before.value
    for name in DISTRIBUTIONS:
        found |= _of_distribution(name, night, baseline)
    return found


def _rate(of: Statistics, part: str, whole: str) -> Distance | None:
    total = int(getattr(of, whole))
    return share_interval(int(getattr(of, part)), total) if total else None


def _of_distribution(name: str, night: Statistics, baseline: Statistics | None) -> dict[str, float | None]:
    mine = night.distributions[name]
    if not mine.total:
        return {}
    found: dict[str, float | None] = {f"{name}_median": mine.quantile(0.5)}
    before = None if baseline is None else baseline.distributions[name]
    if before is None or not before.total:
        return found
    usual = before.quantile(0.5)
    found[f"{name}_change"] = (mine.quantile(0.5) - usual) / abs(usual) if usual else None
    found |= _with_ends(f"{name}_ks", ks_distance(mine, before))
    found |= _with_ends(f"{name}_psi", stability_index(mine, before))
    return {measure: value if value is None or math.isfinite(value) else None for measure, value in found.items()}


def _with_ends(name: str, distance: Distance) -> dict[str, float | None]:
    return {name: distance.value, f"{name}_low": distance.low, f"{name}_high": distance.high}
