"""Inline SVG charts. Colours are variables of the page, so that they follow light, dark and print."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 14, 34
TICKS = 5
LETTER_PX = 6.3  # about, of the axis texts


@dataclass(frozen=True, slots=True)
class Series:
    """Counts or shares of one kind.

    Attributes:
        name: for the legend.
        tone: class that the page colours: `one`, `two`, `good`, `bad` or `quiet`.
        values: one for each place; NaN is a gap.
    """

    name: str
    tone: str
    values: Sequence[float]


@dataclass(slots=True)
class Plot:
    """A frame with axes, into which shapes are drawn; `x` runs over [x_low, x_high], `y` over [0, y_high]."""

    title: str
    x_low: float
    x_high: float
    y_high: float
    root: bool = False
    parts: list[Markup] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Place of an x value in px."""
        span = (self.x_high - self.x_low) or 1.0
        return LEFT + (value - self.x_low) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Place of a y value in px; on a square-root scale small counts stay visible beside large ones."""
        share = min(max(value / (self.y_high or 1.0), 0.0), 1.0)
        share = math.sqrt(share) if self.root else share
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def bar(self, start: float, stop: float, low: float, high: float, tone: str, says: str) -> None:
        """A bar from `low` to `high`, with a text that shows when it is pointed at."""
        left, right = self.x(start), self.x(stop)
        width = max(right - left - (1.0 if right - left > 4 else 0.0), 0.8)
        top, bottom = self.y(high), self.y(low)
        if bottom - top > 0:
            self.parts.append(
                Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
                .format(tone, left, min(top, bottom - 1.0), width, max(bottom - top, 1.0), says)
            )  # fmt: skip

    def line(self, points: Sequence[tuple[float, float]], tone: str, dots: Sequence[str] = ()) -> None:
        """A line through points in axis values; `dots` are texts of marks on them."""
        placed = [(self.x(x), self.y(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        self.parts.append(Markup('<polyline class="{}" points="{}"/>').format(f"line {tone}", path))
        for (x, y), says in zip(placed, dots, strict=False):
            self.parts.append(
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>')
                .format(tone, x, y, says)
            )  # fmt: skip

    def upright(self, value: float, says: str) -> None:
        """A vertical mark with its text, when it lies inside."""
        if not self.x_low <= value <= self.x_high:
            return
        at = self.x(value)
        at_right = at + LETTER_PX * len(says) + 6 > WIDTH - RIGHT
        beside, anchor = (at - 5, "end") if at_right else (at + 5, "start")
        self.parts.append(
            Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                   '<text class="said" x="{3:.1f}" y="{4}" text-anchor="{5}">{6}</text>')
            .format(at, TOP, HEIGHT - BOTTOM, beside, TOP + 9, anchor, says)
        )  # fmt: skip

    def level(self, value: float, says: str) -> None:
        """A dashed horizontal mark."""
        at = self.y(value)
        self.parts.append(
            Markup('<line class="mark" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"><title>{}</title></line>')
            .format(LEFT, WIDTH - RIGHT, at, at, says)
        )  # fmt: skip

    def svg(self, x_ticks: Sequence[tuple[float, str]], x_name: str, percent: bool = False) -> Markup:
        """The chart."""
        axis = [_y_tick(self, value, percent) for value in nice_ticks(0.0, self.y_high, 4)]
        places = [
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(self.x(v), HEIGHT - BOTTOM + 14, t)
            for v, t in x_ticks
        ]
        named = Markup('<text class="name" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_name
        )
        base = Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, HEIGHT - BOTTOM
        )
        inner = Markup("").join([*axis, *self.parts, base, *places, named])
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            WIDTH, HEIGHT, self.title, inner
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
    """Ticks with texts."""
    return [(value, short(value)) for value in values]


def short(value: float) -> str:
    """`12`, `3.4k`, `1.2M`, `0.025`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def legend(series: Sequence[Series]) -> Markup:
    """Names beside their colours."""
    return Markup("").join(
        Markup('<span class="key"><i class="{}"></i>{}</span>').format(one.tone, one.name) for one in series
    )
