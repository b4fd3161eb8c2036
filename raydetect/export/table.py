"""Exports all rows as one CSV file."""

import csv
from pathlib import Path

from raydetect.sinks.csv_cells import cell
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.rows import read_rows
from raydetect.sinks.scored_chunk import SCHEMA
from raydetect.storage import whole_text


def write_csv(ledger: Ledger, output: Path) -> int:
    """Writes the committed rows part by part in order of shards and returns their number.

    UTF-8 with commas and a header; null is an empty cell. Formulas are escaped; see `sinks/csv_cells.py`.

    Raises:
        StorageError: a record or part is missing or damaged, or the file cannot be written; an existing file stays.
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
