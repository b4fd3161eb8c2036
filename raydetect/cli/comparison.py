"""A table for choosing a detector: properties and the results of `make reproduce` (`detectors/measured.json`)."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from raydetect.detectors._registry import detector_class, list_models

FILE = "measured.json"
FITS: dict[tuple[str, ...], str] = {("collect",): "one pass", ("train",): "training"}
WIDTH = 80
COLUMNS: tuple[tuple[str, Literal["left", "right"], int], ...] = (
    ("Detector", "left", 9),
    ("Needs", "left", 15),
    ("Fit", "left", 12),
    ("Fit, s", "right", 6),
    ("Images/s", "right", 8),
    ("Image AUROC", "right", 5),
    ("Pixel AUROC", "right", 5),
)
FIGURES = (
    ("fit_seconds", ".0f"),
    ("images_per_second", ".1f"),
    ("image_auroc", ".3f"),
    ("pixel_auroc", ".3f"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of the table.

    Attributes:
        name: of the detector in the registry.
        needs: images required for fitting.
        localises: whether the anomaly map locates the anomaly.
        fit: how it is fitted.
        measured: results of `make reproduce`; empty if it was not run for this detector.
        published: published accuracy with its source.
    """

    name: str
    needs: str
    localises: bool
    fit: str
    measured: dict[str, Any]
    published: str


def compare() -> tuple[list[Comparison], str]:
    """Returns a row for every detector, and a description of the data and machine of the measurements."""
    stored = json.loads(resources.files("raydetect.detectors").joinpath(FILE).read_text())
    rows = []
    for name in list_models():
        kind = detector_class(name)
        also = [what for what in (kind.info.labels, kind.info.auxiliary) if what != "none"]
        needs = ", ".join([kind.info.images, *also])
        fit = FITS.get(kind.phases, "training and one pass")
        measured = stored["detectors"].get(name, {})
        rows.append(Comparison(name, needs, kind.info.localises, fit, measured, kind.info.published))
    return rows, stored["where"]


def print_comparison(rows: Sequence[Comparison], where: str) -> None:
    """Prints the table, which fits into WIDTH characters, and below it what each paper has published."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name, justify, width in COLUMNS:
        table.add_column(name, justify=justify, overflow="fold", width=width)
    for row in rows:
        needs = row.needs if row.localises else f"{row.needs}; does not localise"
        table.add_row(row.name, needs, row.fit, *(_figure(row.measured.get(key), form) for key, form in FIGURES))
    console = Console(file=sys.stdout, width=WIDTH, highlight=False)
    console.print(table)
    console.print(where)
    console.print("\nPublished:")
    for row in rows:
        console.print(Padding(f"{row.name}: {row.published}", (0, 0, 0, 2)))


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
