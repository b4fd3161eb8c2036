"""The charts of a run: how its scores are distributed, and what was flagged along its shards."""

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
class Figure:
    """A chart with what stands around it."""

    title: str
    svg: Markup
    legend: Markup
    note: str


def distribution_figure(tally: Tally, p_limit: float | None) -> Figure | None:
    """Histogram of the scores by label, with the threshold; None when no image has a score."""
    shown = {label: found for label, found in tally.distributions.items() if found.total}
    if not shown:
        return None
    grid = _common(list(shown.values()))
    first, stop = grid.first, grid.first + len(grid.counts)
    counts = {label: _on(grid, found) for label, found in shown.items()}
    plot = Plot("Distribution of scores", first * grid.width, stop * grid.width, float(grid.counts.max()), root=True)
    for place in range(len(grid.counts)):
        low = 0.0
        for label, values in counts.items():
            says = f"{short((first + place) * grid.width)} to {short((first + place + 1) * grid.width)}: "
            high = low + float(values[place])
            plot.bar(
                (first + place) * grid.width, (first + place + 1) * grid.width, low, high, LABELS[label][1],
                f"{says}{int(values[place]):,} {LABELS[label][0]}",
            )  # fmt: skip
            low = high
    mark, said = _decision(tally, p_limit)
    if mark is not None:
        plot.upright(mark, said)
    name = "image score" if tally.measure == "image_score" else "p-value"
    svg = plot.svg(tick_texts(nice_ticks(plot.x_low, plot.x_high)), name)
    series = [Series(LABELS[label][0], LABELS[label][1], ()) for label in counts]
    return Figure(
        f"Distribution of {name}s", svg, legend(series), _far(mark, plot, "Heights are on a square-root scale.")
    )


def _far(mark: float | None, plot: Plot, note: str) -> str:
    inside = mark is None or not math.isfinite(mark) or plot.x_low <= mark <= plot.x_high
    return note if inside else f"The threshold, {mark:.4g}, lies outside of the scores. {note}"


def _decision(tally: Tally, p_limit: float | None) -> tuple[float | None, str]:
    if tally.measure == "p_value":
        return p_limit, f"flagged up to {p_limit}"
    if tally.threshold is None or not math.isfinite(tally.threshold):
        return None, ""
    return tally.threshold, f"threshold {tally.threshold:.4g}"


def _common(found: Sequence[Histogram]) -> Histogram:
    merged = Histogram()
    for one in found:
        merged.merge(one)
    return merged.with_bins(BARS)


def _on(grid: Histogram, found: Histogram) -> np.ndarray:
    mine = found.coarsened(grid.exponent)
    counts = np.zeros(len(grid.counts), dtype=np.int64)
    start = mine.first - grid.first
    counts[start : start + len(mine.counts)] = mine.counts
    return counts


def timeline_figure(timeline: Timeline) -> Figure | None:
    """Shares of flagged and of bad images along the shards; None without images."""
    spans = timeline.spans
    shares = [(_share(span.flagged, span.images), _share(span.bad, span.images)) for span in spans]
    if not any(span.images for span in spans):
        return None
    top = max(max(flagged + bad for flagged, bad in shares), 1e-4)
    plot = Plot("Flagged and bad images along the shards", spans[0].first, spans[-1].last + 1.0, top)
    for span, (flagged, bad) in zip(spans, shares, strict=True):
        says = _span_text(span)
        plot.bar(span.first, span.last + 1.0, 0.0, flagged, "one", says)
        plot.bar(span.first, span.last + 1.0, flagged, flagged + bad, "bad", says)
    whole = [value for value in nice_ticks(plot.x_low, plot.x_high - 1.0) if value == int(value)]
    svg = plot.svg([(value + 0.5, f"{int(value):,}") for value in whole], "shard, in order of names", percent=True)
    each = f"Each bar is {timeline.shards_each:,} shards." if timeline.shards_each > 1 else "Each bar is one shard."
    series = [Series("flagged", "one", ()), Series("without a score", "bad", ())]
    return Figure("Along the shards", svg, legend(series), f"{each} Point at one for its name.")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _span_text(span: Span) -> str:
    names = _tail(span.first_uri) + ("" if span.first == span.last else f" to {_tail(span.last_uri)}")
    return f"{names}: {span.images:,} images, {span.flagged:,} flagged, {span.bad:,} without a score"


def _tail(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2][:80]


def p_limit(run: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> float | None:
    """Up to which p-value images are flagged; None when a score decides, or the whole archive has not yet."""
    flag = run["spec"]["flag"]
    decided = None if manifest is None else manifest.get("fdr")
    limit = flag.get("alpha") if decided is None else decided["p_threshold"]
    return None if limit is None else float(limit)
