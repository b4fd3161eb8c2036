"""The leaderboard of finished cells: one row for each detector and category, as Parquet, CSV and Markdown."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.sinks.csv_cells import cell as csv_cell
from raydetect.storage import Storage, join_uri

ALL = "mean of categories"
SHOWN = ("image_auroc", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro_0.3", "aupro_0.05")
COSTS = ("fit_seconds", "images_per_second", "peak_memory_bytes")


def leaderboard(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows with the mean over seeds, and the standard deviation if there are several; best image AUROC first.

    A detector with several categories has another row with the mean over categories (for each seed, then over seeds),
    the total fit seconds and the peak memory.
    """
    groups: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    spent: dict[tuple[str, int], float] = {}  # seconds of all fits of a detector and seed
    for cell in cells:
        of = cell["line"], cell.get("seed") or 0
        spent[of] = spent.get(of, 0.0) + float(cell.get("fit_seconds", 0.0))
        for category, found in cell["categories"].items():
            numbers = {name: figure["value"] for name, figure in found["figures"].items()}
            numbers |= {name: float(cell[name]) for name in COSTS if name in cell}
            groups.setdefault(cell["line"], {}).setdefault(cell.get("seed") or 0, {})[category] = numbers
    lines = []
    for line, seeds in groups.items():
        categories = sorted({category for found in seeds.values() for category in found})
        for category in categories:
            lines.append(_line(line, category, [found[category] for found in seeds.values() if category in found]))
        whole = [
            _over_categories(list(found.values()), spent[line, seed])
            for seed, found in seeds.items()
            if sorted(found) == categories
        ]
        if len(categories) > 1 and whole:
            lines.append(_line(line, ALL, whole))
    return sorted(
        lines, key=lambda row: (row["category"] != ALL, row["category"], -row["image_auroc"], row["detector"])
    )


def _over_categories(found: list[dict[str, float]], fit_seconds: float) -> dict[str, float]:
    names = [name for name in found[0] if all(name in numbers for numbers in found)]
    mean = {name: math.fsum(numbers[name] for numbers in found) / len(found) for name in names}
    if "fit_seconds" in mean:
        mean["fit_seconds"] = fit_seconds
        mean["peak_memory_bytes"] = max(numbers["peak_memory_bytes"] for numbers in found)
    return mean


def _line(detector: str, category: str, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"detector": detector, "category": category, "seeds": len(found)}
    for name in dict.fromkeys(name for numbers in found for name in numbers):
        values = [numbers[name] for numbers in found if name in numbers]
        mean = math.fsum(values) / len(values)
        row[name] = max(values) if name == "peak_memory_bytes" else mean
        if name not in COSTS:
            spread = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
            row[f"{name}_std"] = math.sqrt(spread) if len(values) > 1 else None
    return row


def write_leaderboard(uri: str, storage: Storage, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Writes the leaderboard as Parquet, CSV and Markdown, and all metrics as Parquet; returns the URIs."""
    rows = leaderboard(cells)
    files = {
        "leaderboard.parquet": _parquet(rows),
        "leaderboard.csv": _csv(rows),
        "leaderboard.md": markdown(rows).encode(),
        "figures.parquet": _parquet(figure_rows(cells)),
    }
    for name, data in files.items():
        storage.write(join_uri(uri, name), data)
    return [join_uri(uri, name) for name in files]


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in _names(rows)}), buffer)
    return buffer.getvalue()


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, _names(rows), lineterminator="\n")
    table.writeheader()
    table.writerows([{name: csv_cell(value) for name, value in row.items()} for row in rows])
    return text.getvalue().encode()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows as a Markdown table."""
    shown = [name for name in SHOWN if any(name in row for row in rows)]
    costs = [name for name in COSTS if any(name in row for row in rows)]
    titles = {"fit_seconds": "fit, s", "images_per_second": "images/s", "peak_memory_bytes": "peak MB"}
    heads = ["detector", "category", "seeds", *shown, *(titles[name] for name in costs)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        names = (" ".join(str(row[name]).split()).replace("|", "\\|") or "-" for name in ("detector", "category"))
        cells = [*names, str(row["seeds"])]
        cells += [_figure(row, name) for name in shown]
        cells += [_cost(row, name) for name in costs]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(row: Mapping[str, Any], name: str) -> str:
    if row.get(name) is None:
        return "-"
    std = row.get(f"{name}_std")
    return f"{row[name]:.4f}" + ("" if std is None else f" +- {std:.4f}")


def _cost(row: Mapping[str, Any], name: str) -> str:
    if row.get(name) is None:
        return "-"
    return f"{row[name] / 1e6:.0f}" if name == "peak_memory_bytes" else f"{row[name]:.1f}"


def figure_rows(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each metric of each cell, overall and by kind of defect, with error bound and interval."""
    rows = []
    for cell in cells:
        for category, found in cell["categories"].items():
            for defect, part in [("", found), *found["defects"].items()]:
                for name, figure in part["figures"].items():
                    fields = {"detector": cell["line"], "seed": cell.get("seed"), "category": category}
                    rows.append({**fields, "defect": defect, **part["images"], "figure": name, **figure})
    return rows
