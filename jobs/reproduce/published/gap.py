"""What a run reached beside what the paper published, in percent."""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CATEGORIES = 15  # of MVTec AD
METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pro": "PRO"}
OURS = {"image_auroc": "image_auroc", "pixel_auroc": "pixel_auroc", "pro": "aupro_0.3"}  # names in an evaluation


@dataclass(frozen=True, slots=True)
class Published:
    """A line of `figures.csv`.

    Attributes:
        setting: to which the figures belong.
        figures: in percent, means over the categories of MVTec AD, by the names of METRICS; those that were published.
        source: the paper, and its tables.
        protocol: how the figures were reached otherwise than ours; empty if nothing is known.
    """

    setting: str
    figures: Mapping[str, float]
    source: str
    protocol: str


def published_figures() -> dict[str, Published]:
    """The published figures of every job."""
    with (Path(__file__).parent / "figures.csv").open(newline="") as file:
        return {
            row["job"]: Published(
                row["setting"],
                {name: float(row[name]) for name in METRICS if row[name]},
                row["source"],
                row["protocol"],
            )
            for row in csv.DictReader(file)
        }


def gap(name: str, cells: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The means over categories of finished cells of an evaluation, and their differences from what was published.

    Args:
        name: of the job.
        cells: the contents of the cells, all of one detector.
    """
    theirs = published_figures()[name]
    found = [(category, part["figures"]) for cell in cells for category, part in cell["categories"].items()]
    figures = {}
    for metric, key in OURS.items():
        values = [of[key]["value"] for _, of in found if key in of]
        ours = round(100 * math.fsum(values) / len(values), 2) if len(values) == len(found) else None
        paper = theirs.figures.get(metric)
        difference = None if ours is None or paper is None else round(ours - paper, 2)
        figures[metric] = {"ours": ours, "published": paper, "difference": difference}
    categories = sorted({category for category, _ in found})
    return {"job": name, "categories": categories, "figures": figures, "source": theirs.source}


def gap_text(result: Mapping[str, Any]) -> str:
    """A result of `gap` as a table, with what must be known to read it."""
    theirs, count = published_figures()[result["job"]], len(result["categories"])
    lines = [f"{result['job']}, mean of {count} categor{'y' if count == 1 else 'ies'}, %", ""]
    lines.append(f"{'':<12}{'ours':>8}{'published':>11}{'difference':>12}")
    for metric, title in METRICS.items():
        found = result["figures"][metric]
        difference = "-" if found["difference"] is None else f"{found['difference']:+.2f}"
        lines.append(f"{title:<12}{_shown(found['ours']):>8}{_shown(found['published']):>11}{difference:>12}")
    lines += ["", f"Published: {theirs.source} ({theirs.setting})."]
    if theirs.protocol:
        lines.append(f"Not alike: {theirs.protocol}.")
    if count != CATEGORIES:
        lines.append(f"Not comparable: the published figures are means of the {CATEGORIES} categories of MVTec AD.")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
