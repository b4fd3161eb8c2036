"""A table for choosing a detector: properties and the results of `make reproduce` (`detectors/measured.json`)."""

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import click

from raydetect.detectors._registry import build_detector, detector_class, list_models

FILE = "measured.json"
FITS: dict[tuple[str, ...], str] = {("collect",): "one pass", ("train",): "training"}
WIDTH = 80
FIGURES = (
    ("fit_seconds", "Fit, s", ".0f"),
    ("images_per_second", "Images/s", ".1f"),
    ("over_backbone", "x backbone", ".1f"),
    ("image_auroc", "Image AUROC", ".3f"),
    ("pixel_auroc", "Pixel AUROC", ".3f"),
)
NAME_WIDTH, FIGURE_WIDTHS = 24, (7, 10, 12, 13, 13)
SCHEDULE = ("epochs", "sub_epochs", "steps_per_epoch", "training_steps", "difference_epochs")
NOTES = (
    "x backbone: time over that of a ResNet-18 up to layer3 on the same images, in turns. Speeds depend on the "
    "machine and what else it does: compare them within a group only, and roughly.",
    "Ours: the settings of our figures, in brackets the default where it is another; the share of the default "
    "epochs or steps; the images fitted. They are not those of the published figures.",
)
NOT_MEASURED = "Not measured"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of the table.

    Attributes:
        name: of the detector in the registry.
        needs: images required for fitting.
        localises: whether the anomaly map locates the anomaly.
        fit: how it is fitted.
        measured: results of `make reproduce`; empty if it was not run for this detector.
        settings: of these results, as `settings_text` writes them; empty without results.
        published: published accuracy with its source.
    """

    name: str
    needs: str
    localises: bool
    fit: str
    measured: Mapping[str, Any]
    settings: str
    published: str

    @property
    def figures(self) -> list[str]:
        """The results as text, in the order of FIGURES; a dash where there is none."""
        values = ((self.measured.get(key), form) for key, _, form in FIGURES)
        return ["-" if value is None else format(value, form) for value, form in values]


def compare() -> dict[str, list[Comparison]]:
    """Returns a row for every detector, grouped by the data and machine of its results: the largest group first, those
    without results last.
    """
    stored = json.loads(resources.files("raydetect.detectors").joinpath(FILE).read_text())
    groups: dict[str, list[Comparison]] = {}
    for name in list_models():
        kind = detector_class(name)
        also = [what for what in (kind.info.labels, kind.info.auxiliary) if what != "none"]
        needs = " and ".join([kind.info.images, *also])
        fit = FITS.get(kind.phases, "training and one pass")
        measured = stored["detectors"].get(name, {})
        settings = settings_text(name, measured) if measured else ""
        where = f"{stored['data']}, {measured['machine']}" if measured else NOT_MEASURED
        row = Comparison(name, needs, kind.info.localises, fit, measured, settings, kind.info.published)
        groups.setdefault(where, []).append(row)
    order = sorted(groups, key=lambda where: (where == NOT_MEASURED, -len(groups[where]), where))
    return {where: groups[where] for where in order}


def settings_text(name: str, measured: Mapping[str, Any]) -> str:
    """How a result was reached, and what of it differs from the detector's defaults.

    Args:
        name: of the detector.
        measured: `settings` (stated parameters by name), `images` (`fitted`, `normal` and `defects`, counts), and
            `tuned`, whether the settings were chosen after another run on the same test images.
    """
    defaults, stated = build_detector(name, {}).params, dict(measured["settings"])
    size = _size(stated.pop("image_size"))
    parts = [f"{size} px{_default(size, _size(defaults.image_size))}"]
    if backbone := stated.pop("backbone", getattr(defaults, "backbone", None)):
        parts.append(f"{backbone}{_default(backbone, getattr(defaults, 'backbone', None))}")
    if share := _share(defaults, stated):
        parts.append(f"{format(share, '.0f' if share >= 10 else '.2g')} % of the training")
    for key, value in sorted(stated.items()):
        shown, default = _shown(value), _shown(getattr(defaults, key))
        if key not in SCHEDULE and shown != default:
            parts.append(f"{key} {shown}{_default(shown, default)}")
    images = measured["images"]
    parts.append(f"{images['fitted']} of {images['normal']} images")
    if images["defects"]:
        parts.append(f"{images['defects']} labelled defects")
    if measured["tuned"]:
        parts.append("settings chosen after another run on the same test images")
    return ", ".join(parts)


def _share(defaults: Any, stated: Mapping[str, Any]) -> float:
    """The training of the stated schedule in % of the default one; 0 for a detector without training."""
    planned = {key: value for key in SCHEDULE if (value := getattr(defaults, key, None))}
    ratios = [stated.get(key, value) / value for key, value in planned.items()]
    return 100 * math.prod(ratios) if ratios else 0.0


def _size(size: Sequence[int]) -> str:
    height, width = size
    return str(height) if height == width else f"{height} x {width}"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_shown, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _default(shown: str, default: str | None) -> str:
    return "" if shown == default else f" ({default or 'none'})"


def print_comparison(groups: Mapping[str, Sequence[Comparison]]) -> None:
    """Prints the table, which fits into WIDTH characters, and below it what each paper has published."""
    for where, rows in groups.items():
        click.echo(f"{where}\n" if where == NOT_MEASURED else f"{where}: make reproduce\n\n{_head()}")
        for row in rows:
            click.echo("\n".join(_lines(row)))
        click.echo()
    for note in NOTES:
        click.echo(textwrap.fill(note, WIDTH))
    click.echo("\nPublished:")
    for row in sorted((row for rows in groups.values() for row in rows), key=lambda row: row.name):
        click.echo(_wrapped(f"{row.name}: {row.published}"))


def _head() -> str:
    titles = "".join(f"{title:>{width}}" for (_, title, _), width in zip(FIGURES, FIGURE_WIDTHS, strict=True))
    return f"{'Detector':<{NAME_WIDTH}}{titles}\n{'-' * WIDTH}"


def _lines(row: Comparison) -> Iterator[str]:
    """The figures of a detector, what it needs, and the settings."""
    figures = "".join(f"{text:>{width}}" for text, width in zip(row.figures, FIGURE_WIDTHS, strict=True))
    yield f"{row.name:<{NAME_WIDTH}}{figures}" if row.measured else row.name
    yield _wrapped(f"{row.needs}; {row.fit}" + ("" if row.localises else "; does not localise"))
    if row.settings:
        yield _wrapped(f"ours: {row.settings}")


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
