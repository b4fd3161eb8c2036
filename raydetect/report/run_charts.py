"""The charts of a run: the distribution of its scores, and flagged images by shard."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from raydetect.metrics.histogram import Histogram
from raydetect.report.charts import Plot, Series, legend, nice_ticks, short, tick_texts
from raydetect.report.tally import Tally
from raydetect.report.timeline import Span, Timeline

BARS = 64
LABELS = {None: ("images", "one"), 0: ("labelled normal", "good"), 1: ("labelled anomalous", "bad")}


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its title, legend and note."""

    title: str
    svg: Markup
    legend: Markup
    note: str


def distribution_chart(tally: Tally, p_limit: float | None) -> Chart | None:
    """Histogram of the scores by label, with the threshold; None if no image has a score."""
    shown = {label: histogram for label, histogram in tally.distributions.items() if histogram.total}
    if not shown:
        return None
    grid = _common_bins(list(shown.values()))
    first, stop = grid.first, grid.first + len(grid.counts)
    counts = {label: _counts_on(grid, histogram) for label, histogram in shown.items()}
    plot = Plot("Distribution of scores", first * grid.width, stop * grid.width, float(grid.counts.max()), root=True)
    for i in range(len(grid.counts)):
        low = 0.0
        for label, values in counts.items():
            tooltip = f"{short((first + i) * grid.width)} to {short((first + i + 1) * grid.width)}: "
            high = low + float(values[i])
            plot.bar(
                (first + i) * grid.width, (first + i + 1) * grid.width, low, high, LABELS[label][1],
                f"{tooltip}{int(values[i]):,} {LABELS[label][0]}",
            )  # fmt: skip
            low = high
    mark, text = _decision(tally, p_limit)
    if mark is not None:
        plot.upright(mark, text)
    name = "image score" if tally.measure == "image_score" else "p-value"
    svg = plot.svg(tick_texts(nice_ticks(plot.x_low, plot.x_high)), name)
    series = [Series(LABELS[label][0], LABELS[label][1], ()) for label in counts]
    return Chart(
        f"Distribution of {name}s",
        svg,
        legend(series),
        _with_threshold(mark, plot, "Bar heights are on a square-root scale."),
    )


def _with_threshold(mark: float | None, plot: Plot, note: str) -> str:
    inside = mark is None or not math.isfinite(mark) or plot.x_low <= mark <= plot.x_high
    return note if inside else f"The threshold, {mark:.4g}, lies outside the range of scores. {note}"


def _decision(tally: Tally, p_limit: float | None) -> tuple[float | None, str]:
    if tally.measure == "p_value":
        return p_limit, f"flagged up to {p_limit}"
    if tally.threshold is None or not math.isfinite(tally.threshold):
        return None, ""
    return tally.threshold, f"threshold {tally.threshold:.4g}"


def _common_bins(histograms: Sequence[Histogram]) -> Histogram:
    merged = Histogram()
    for histogram in histograms:
        merged.merge(histogram)
    return merged.with_bins(BARS)


def _counts_on(grid: Histogram, histogram: Histogram) -> np.ndarray:
    coarse = histogram.coarsened(grid.exponent)
    counts = np.zeros(len(grid.counts), dtype=np.int64)
    start = coarse.first - grid.first
    counts[start : start + len(coarse.counts)] = coarse.counts
    return counts


def timeline_chart(timeline: Timeline) -> Chart | None:
    """Shares of flagged and of bad images by shard; None without images or with one shard, whose bar says nothing."""
    spans = timeline.spans
    if len(spans) < 2:
        return None
    shares = [(_share(span.flagged, span.images), _share(span.bad, span.images)) for span in spans]
    if not any(span.images for span in spans):
        return None
    top = max(max(flagged + bad for flagged, bad in shares), 1e-4)
    plot = Plot("Flagged and bad images by shard", spans[0].first, spans[-1].last + 1.0, top)
    for span, (flagged, bad) in zip(spans, shares, strict=True):
        tooltip = _span_text(span)
        plot.bar(span.first, span.last + 1.0, 0.0, flagged, "one", tooltip)
        plot.bar(span.first, span.last + 1.0, flagged, flagged + bad, "bad", tooltip)
    whole = [value for value in nice_ticks(plot.x_low, plot.x_high - 1.0) if value == int(value)]
    svg = plot.svg([(value + 0.5, f"{int(value):,}") for value in whole], "shard, sorted by name", percent=True)
    each = f"Each bar is {timeline.shards_each:,} shards." if timeline.shards_each > 1 else "Each bar is one shard."
    series = [Series("flagged", "one", ()), Series("without a score", "bad", ())]
    return Chart("By shard", svg, legend(series), f"{each} Hover over a bar for details.")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _span_text(span: Span) -> str:
    names = _tail(span.first_uri) + ("" if span.first == span.last else f" to {_tail(span.last_uri)}")
    return f"{names}: {span.images:,} images, {span.flagged:,} flagged, {span.bad:,} without a score"


def _tail(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2][:80]


def p_limit(run: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> float | None:
    """The largest p-value that is flagged, of a fleet in any category.

    None if a score threshold decides or the run has to finish first.
    """
    flag = run["spec"]["flag"]
    decided = None if manifest is None else manifest.get("fdr")
    limit = flag.get("alpha") if decided is None else decided["p_threshold"]
    levels = run.get("flag_level", {})
    if limit is None and decided is None and levels:
        limit = max(one["level"] for one in levels.get("categories", {"": levels}).values())
    return None if limit is None else float(limit)
