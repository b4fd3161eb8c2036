"""Inline SVG charts. Colours are CSS variables of the page, so that charts follow its light, dark and print styles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 14, 34
TICKS = 5
LETTER_PX = 6.3  # approximate, of the axis labels
LARGE_LETTER_PX = 7.7  # the same on a phone


@dataclass(frozen=True, slots=True)
class Series:
    """A data series of counts or shares.

    Attributes:
        name: name in the legend.
        tone: CSS class for the colour: `one`, `two`, `good`, `bad` or `quiet`.
        values: one value per x position; NaN is a gap.
    """

    name: str
    tone: str
    values: Sequence[float]


@dataclass(slots=True)
class Plot:
    """A plot with axes to draw shapes into; `x` covers [x_low, x_high], `y` covers [0, y_high]."""

    title: str
    x_low: float
    x_high: float
    y_high: float
    root: bool = False
    parts: list[Markup] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Converts an x value to px."""
        span = (self.x_high - self.x_low) or 1.0
        return LEFT + (value - self.x_low) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Converts a y value to px; a square-root scale keeps small counts visible beside large ones."""
        share = min(max(value / (self.y_high or 1.0), 0.0), 1.0)
        share = math.sqrt(share) if self.root else share
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def bar(self, start: float, stop: float, low: float, high: float, tone: str, says: str) -> None:
        """Draws a bar from `low` to `high` with a tooltip."""
        left, right = self.x(start), self.x(stop)
        width = max(right - left - (1.0 if right - left > 4 else 0.0), 0.8)
        top, bottom = self.y(high), self.y(low)
        if bottom - top > 0:
            self.parts.append(
                Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
                .format(tone, left, min(top, bottom - 1.0), width, max(bottom - top, 1.0), says)
            )  # fmt: skip

    def line(self, points: Sequence[tuple[float, float]], tone: str, dots: Sequence[str] = ()) -> None:
        """Draws a line through points given in axis values; `dots` are tooltips of markers on them."""
        pixels = [(self.x(x), self.y(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        self.parts.append(Markup('<polyline class="{}" points="{}"/>').format(f"line {tone}", path))
        for (x, y), says in zip(pixels, dots, strict=False):
            self.parts.append(
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>')
                .format(tone, x, y, says)
            )  # fmt: skip

    def upright(self, value: float, says: str) -> None:
        """Draws a labelled vertical line if it lies within the axis range."""
        if not self.x_low <= value <= self.x_high:
            return
        x_px = self.x(value)
        near_edge = x_px + LETTER_PX * len(says) + 6 > WIDTH - RIGHT
        beside, anchor = (x_px - 5, "end") if near_edge else (x_px + 5, "start")
        self.parts.append(
            Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                   '<text class="said" x="{3:.1f}" y="{4}" text-anchor="{5}">{6}</text>')
            .format(x_px, TOP, HEIGHT - BOTTOM, beside, TOP + 9, anchor, says)
        )  # fmt: skip

    def level(self, value: float, says: str) -> None:
        """Draws a dashed horizontal line."""
        y_px = self.y(value)
        self.parts.append(
            Markup('<line class="mark" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"><title>{}</title></line>')
            .format(LEFT, WIDTH - RIGHT, y_px, y_px, says)
        )  # fmt: skip

    def svg(self, x_ticks: Sequence[tuple[float, str]], x_name: str, percent: bool = False) -> Markup:
        """Renders the chart as SVG."""
        axis = [_y_tick(self, value, percent) for value in nice_ticks(0.0, self.y_high, 4)]
        tick_labels = [_x_tick(self, value, text) for value, text in x_ticks]
        axis_label = Markup('<text class="name" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_name
        )
        base = Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, HEIGHT - BOTTOM
        )
        inner = Markup("").join([*axis, *self.parts, base, *tick_labels, axis_label])
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            WIDTH, HEIGHT, self.title, inner
        )


def _x_tick(plot: Plot, value: float, text: str) -> Markup:
    x_px, half_px = plot.x(value), LARGE_LETTER_PX * len(text) / 2
    place, anchor = (WIDTH - 1.0, "end") if x_px + half_px > WIDTH else (x_px, "middle")
    return Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
        place, HEIGHT - BOTTOM + 14, anchor, text
    )


def _y_tick(plot: Plot, value: float, percent: bool) -> Markup:
    says = f"{100 * value:.3g} %" if percent else short(value)
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
    ).format(LEFT, WIDTH - RIGHT, plot.y(value), plot.y(value), LEFT - 5, plot.y(value) + 4, says)


def nice_ticks(low: float, high: float, most: int = TICKS) -> list[float]:
    """At most about `most` round numbers in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with their labels."""
    return [(value, short(value)) for value in values]


def short(value: float) -> str:
    """`12`, `3.4k`, `1.2M`, `0.025`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def legend(series: Sequence[Series]) -> Markup:
    """A legend: names beside their colours."""
    return Markup("").join(
        Markup('<span class="key"><i class="{}"></i>{}</span>').format(item.tone, item.name) for item in series
    )
