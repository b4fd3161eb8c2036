"""The flagged images of a run as files, with their overlays and a table."""

import csv
from pathlib import Path
from typing import Any

from raydetect.errors import MemberError, RaydetectError
from raydetect.export.naming import file_name
from raydetect.report.pictures import Pictures, why_not
from raydetect.sinks.cells import cell
from raydetect.sinks.rows import read_rows

COLUMNS = ("key", "image_score", "p_value", "threshold", "category", "label", "defect", "width", "height")


def write_folder(pictures: Pictures, output: Path) -> tuple[int, list[str]]:
    """Copies flagged images as they are stored to `images/`, overlays to `overlays/`, and lists both in `flagged.csv`.

    One image is in memory at a time.

    Returns:
        The number of flagged images, and a sentence for each that could not be read.

    Raises:
        StorageError: a record or part is missing or damaged.
    """
    (output / "images").mkdir(parents=True, exist_ok=True)
    (output / "overlays").mkdir(exist_ok=True)
    count, missing = 0, list[str]()
    with (output / "flagged.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "overlay", *COLUMNS])
        for _, part, table in read_rows(pictures.ledger):
            for row in table.to_pylist() if part.flagged else ():
                if row["flagged"]:
                    count += 1
                    names = _copy(row, pictures, output, missing)
                    writer.writerow([*names, *(cell(row[name]) for name in COLUMNS)])
    return count, missing


def _copy(row: dict[str, Any], pictures: Pictures, output: Path, missing: list[str]) -> tuple[str, str]:
    """Relative paths of the image and its overlay, each "" when there is none."""
    name, image, overlay = file_name(row["key"], row["image_uri"]), "", ""
    picture = None
    try:
        data = pictures.encoded(row["image_uri"])
        image = f"images/{name}"
        (output / image).write_bytes(data)
        picture = pictures.decoded(data)
    except (MemberError, RaydetectError) as error:
        missing.append(f"{row['key']}: {why_not(error)}")
    try:
        drawn = pictures.overlay(row, picture)
    except RaydetectError as error:
        missing.append(f"{row['key']}: {why_not(error)}")
        drawn = None
    if drawn is not None:
        overlay = f"overlays/{Path(name).stem}.png"
        drawn.save(output / overlay)
    return image, overlay
