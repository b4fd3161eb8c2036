"""Text of an audit: what its report adds to that of an ordinary run."""

from collections.abc import Mapping, Sequence
from typing import Any

from raydetect.audit.drift_charts import drift_charts
from raydetect.audit.measures import RATES
from raydetect.audit.statistics import DISTRIBUTIONS, Statistics
from raydetect.report.page import Extra

RATE_NAMES = {"flagged_rate": "flagged", "bad_rate": "without a score"}


def extra_of(
    summary: Mapping[str, Any], night: Statistics, baseline: Statistics | None, history: Sequence[Mapping[str, Any]]
) -> Extra:
    """Returns the audit section of a night's report."""
    return Extra(
        title=f"Audit of {summary['night']}",
        verdict=verdict_text(summary),
        alarm=summary["alarm"],
        rules=[(rule["rule"], rule["outcome"], values_text(rule["values"])) for rule in summary["rules"]],
        measures=_measure_rows(summary["measures"], baseline),
        charts=drift_charts(night, baseline, history),
        note=_compared(summary),
    )


def verdict_text(summary: Mapping[str, Any]) -> str:
    """One sentence for the top of the report and for the command line."""
    if summary["alarm"]:
        return f"Alarm: {'; '.join(summary['alarms'])}"
    rules = summary["rules"]
    if not rules:
        return "No rules are set, so nothing was judged."
    unjudged = sum(rule["outcome"] == "not judged" for rule in rules)
    if unjudged:
        return f"No alarm; {unjudged} of {len(rules)} rules could not be judged: no baseline, or no images."
    return f"No alarm; all {len(rules)} rules were judged." if len(rules) > 1 else "No alarm; the rule was judged."


def values_text(values: Mapping[str, float | None]) -> str:
    """`flagged_rate = 0.031, sharpness_ks_low has no value`."""
    texts = [f"{name} has no value" if value is None else f"{name} = {value:.4g}" for name, value in values.items()]
    return ", ".join(texts)


def _compared(summary: Mapping[str, Any]) -> str:
    nights = summary["baseline"]["nights"]
    if not nights:
        return "No comparison: there is no earlier night of the same artifact without an alarm."
    shown = ", ".join(nights[:7]) + (", ..." if len(nights) > 7 else "")
    count = "one earlier night" if len(nights) == 1 else f"{len(nights)} earlier nights"
    return f"Compared with {count} ({shown}), {summary['baseline']['images']:,} images together."


def _measure_rows(values: Mapping[str, float | None], baseline: Statistics | None) -> list[tuple[str, str, str, str]]:
    rows = []
    for rate in RATES:
        change, now = values[f"{rate}_change"], values[rate]
        before = "" if change is None or now is None else f"{100 * (now - change):.3g} %"
        apart = "" if change is None else f"{100 * change:+.3g} points"
        rows.append((f"{RATE_NAMES[rate]}, share", _with_ends(values, rate, 100.0, " %"), before, apart))
    for name in DISTRIBUTIONS:
        median = values[f"{name}_median"]
        usual = None if baseline is None or not baseline.distributions[name].total else baseline.distributions[name]
        before = "" if usual is None else f"{usual.quantile(0.5):.4g}"
        distances = [f"{kind.upper()} {_with_ends(values, f'{name}_{kind}')}" for kind in ("ks", "psi")]
        apart = "" if values[f"{name}_ks"] is None else ", ".join(distances)
        rows.append((f"{name}, median", "" if median is None else f"{median:.4g}", before, apart))
    return rows


def _with_ends(values: Mapping[str, float | None], name: str, factor: float = 1.0, unit: str = "") -> str:
    value, low, high = (values[name + end] for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return ""
    return f"{factor * value:.3g}{unit} ({factor * low:.3g} to {factor * high:.3g})"
