"""Exports the flagged images of a run as files, with overlays and a table."""

import csv
import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from raydetect.errors import MemberError, RaydetectError, SpecError
from raydetect.export.naming import file_name
from raydetect.report.pictures import Pictures, missing_reason
from raydetect.sinks.csv_cells import cell
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.rows import read_rows
from raydetect.sinks.run_progress import flags_nothing
from raydetect.storage import whole_file, whole_text

COLUMNS = ("key", "image_score", "p_value", "threshold", "category", "label", "defect", "width", "height")


def require_flags(run: Mapping[str, Any], ledger: Ledger) -> None:
    """Refuses a run that has not decided which images are flagged.

    Raises:
        SpecError: flags are decided at the end of the run, or not at all.
    """
    if flags_nothing(run):
        raise SpecError(
            f"{ledger.uri}: has no flagged images, by flag: none. Decide on them with `raydetect reflag "
            f"{shlex.quote(ledger.uri)} --set flag.alpha=0.01`."
        )
    if run["spec"]["flag"].get("fdr") is not None and ledger.manifest() is None:
        raise SpecError(f"{ledger.uri}: flags are decided when the run is finished (flag.fdr). Let it end first.")


def write_folder(pictures: Pictures, output: Path) -> tuple[int, list[str]]:
    """Copies flagged images unchanged to `images/`, overlays to `overlays/`, and lists both in `flagged.csv`.

    One image is in memory at a time. The table is completed after all files that it lists; until then the table of an
    earlier export stays.

    Returns:
        Number of flagged images, and one sentence for each that could not be read.

    Raises:
        StorageError: a record or part is missing or damaged, or a file cannot be written.
    """
    count, missing = 0, list[str]()
    with whole_text(output / "flagged.csv", newline="") as out:
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
    """Writes an image and its overlay; returns their relative paths, "" for a missing one."""
    name, image, overlay = file_name(row["key"], row["image_uri"]), "", ""
    data, picture = _read(row, pictures, missing)
    if data is not None:
        image = f"images/{name}"
        _write(output / image, data)
    try:
        drawn = pictures.overlay(row, picture)
    except RaydetectError as error:
        missing.append(f"{row['key']}: {missing_reason(error)}")
        drawn = None
    if drawn is not None:
        overlay = f"overlays/{Path(name).stem}.png"
        encoded = io.BytesIO()
        drawn.save(encoded, "PNG")
        _write(output / overlay, encoded.getvalue())
    return image, overlay


def _read(row: dict[str, Any], pictures: Pictures, missing: list[str]) -> tuple[bytes | None, Image.Image | None]:
    """Returns the encoded and the decoded image, None for what cannot be read or decoded."""
    data = None
    try:
        data = pictures.encoded(row["image_uri"])
        return data, pictures.decoded(data)
    except (MemberError, RaydetectError) as error:
        missing.append(f"{row['key']}: {missing_reason(error)}")
        return data, None


def _write(path: Path, data: bytes) -> None:
    with whole_file(path) as file:
        file.write(data)
