"""All rows as one CSV file."""

import csv
from pathlib import Path
from typing import Any

from raydetect.sinks.ledger import Ledger
from raydetect.sinks.parquet import SCHEMA
from raydetect.sinks.rows import read_rows
from raydetect.storage import whole_text

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(ledger: Ledger, output: Path) -> int:
    """Writes the committed rows, part after part, in order of shards; returns how many there are.

    UTF-8, comma, header; null is empty. A text that a spreadsheet would run as a formula gets an apostrophe in front.

    Raises:
        StorageError: a record or part is missing or damaged, or the file cannot be written; one that was there stays.
    """
    count = 0
    with whole_text(output, newline="") as out:
        writer = csv.writer(out)
        writer.writerow(SCHEMA.names)
        for _, _, table in read_rows(ledger):
            for row in table.select(SCHEMA.names).to_pylist():
                writer.writerow([cell(value) for value in row.values()])
            count += table.num_rows
    return count


def cell(value: Any) -> Any:
    """What stands in the file for a value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
