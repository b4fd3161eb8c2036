"""Charts of an audit: this night's distributions against the baseline's, and measures over nights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raydetect.audit.statistics import Statistics
from raydetect.metrics.histogram import Histogram
from raydetect.report.charts import Plot, Series, legend, nice_ticks, tick_texts
from raydetect.report.run_charts import Chart

BINS = 40
TITLES = {
    "score": "Scores",
    "brightness": "Brightness of images",
    "sharpness": "Sharpness of images",
    "size": "Size of images, width times height in px",
}


def drift_charts(night: Statistics, baseline: Statistics | None, history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Returns the charts that have data to show.

    Args:
        night: the audited night.
        baseline: earlier nights merged; None = there are none.
        history: summaries of nights in order, the audited one last.
    """
    charts = [_rates(history), _pictures(history)] if len(history) > 1 else []
    if baseline is not None:
        charts += [_against(name, night.distributions[name], baseline.distributions[name]) for name in TITLES]
    return [chart for chart in charts if chart is not None]


def _against(name: str, night: Histogram, baseline: Histogram) -> Chart | None:
    """Chart of the distribution of one value, for the night and the baseline."""
    if not night.total or not baseline.total:
        return None
    if min(night.low, baseline.low) == max(night.high, baseline.high):
        return None  # all images have one value
    grid = Histogram()
    grid.merge(baseline)
    grid.merge(night)
    grid = grid.with_bins(BINS)
    shares = [_shares(grid, baseline), _shares(grid, night)]
    start, stop = grid.first * grid.width, (grid.first + len(grid.counts)) * grid.width
    plot = Plot(TITLES[name], start, stop, max(float(share.max()) for share in shares))
    for share, tone in zip(shares, ("quiet", "one"), strict=True):
        plot.line(_steps(grid, share), tone)
    series = [Series("baseline", "quiet", ()), Series("this night", "one", ())]
    svg = plot.svg(tick_texts(nice_ticks(start, stop, 4)), name, percent=True)
    return Chart(TITLES[name], svg, legend(series), f"{baseline.total:,} and {night.total:,} images.")


def _shares(grid: Histogram, found: Histogram) -> np.ndarray:
    mine = found.coarsened(grid.exponent)
    shares = np.zeros(len(grid.counts))
    shares[mine.first - grid.first : mine.first - grid.first + len(mine.counts)] = mine.counts / mine.total
    return shares


def _steps(grid: Histogram, shares: np.ndarray) -> list[tuple[float, float]]:
    edges = (grid.first + np.arange(len(shares) + 1)) * grid.width
    inner = [(edges[index + side], share) for index, share in enumerate(shares.tolist()) for side in (0, 1)]
    return [(float(edges[0]), 0.0), *((float(x), y) for x, y in inner), (float(edges[-1]), 0.0)]


def _rates(history: Sequence[Mapping[str, Any]]) -> Chart | None:
    return _nights(
        "Flagged and bad images, night by night",
        history,
        [("flagged", "one", "flagged_rate"), ("without a score", "bad", "bad_rate")],
        relative=False,
    )


def _pictures(history: Sequence[Mapping[str, Any]]) -> Chart | None:
    return _nights(
        "Brightness and sharpness, night by night",
        history,
        [("brightness", "two", "brightness_median"), ("sharpness", "good", "sharpness_median")],
        relative=True,
    )


def _nights(
    title: str, history: Sequence[Mapping[str, Any]], lines: Sequence[tuple[str, str, str]], relative: bool
) -> Chart | None:
    """Chart of measures over nights; relative measures are divided by their first value."""
    curves = []
    for name, tone, measure in lines:
        values = [_number(summary["measures"].get(measure)) for summary in history]
        first = next((value for value in values if value and math.isfinite(value)), 1.0)
        curves.append((name, tone, [value / first if relative else value for value in values]))
    finite = [value for _, _, values in curves for value in values if math.isfinite(value)]
    if not finite:
        return None
    plot = Plot(title, 0.0, max(len(history) - 1.0, 1.0), max(max(finite) * 1.05, 1e-4))
    for name, tone, values in curves:
        points = [(float(index), value) for index, value in enumerate(values) if math.isfinite(value)]
        labels = [f"{history[int(x)]['night']}: {name} {100 * value:.3g} %" for x, value in points]
        plot.line(points, tone, labels)
    for index, summary in enumerate(history):
        if summary["alarm"]:
            plot.upright(float(index), "alarm")
    each = max(1, -(-len(history) // 5))
    ticks = [(float(index), str(history[index]["night"])[-10:]) for index in range(0, len(history), each)]
    svg = plot.svg(ticks, "night", percent=True)
    note = "Medians relative to the first night shown." if relative else "Dashed lines are nights with an alarm."
    return Chart(title, svg, legend([Series(name, tone, ()) for name, tone, _ in curves]), note)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
