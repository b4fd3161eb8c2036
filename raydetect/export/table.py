"""All rows as one CSV file."""

import csv
from pathlib import Path

from raydetect.sinks.csv_cells import cell
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.parquet import SCHEMA
from raydetect.sinks.rows import read_rows
from raydetect.storage import whole_text


def write_csv(ledger: Ledger, output: Path) -> int:
    """Writes the committed rows, part after part, in order of shards; returns how many there are.

    UTF-8, comma, header; null is empty. What a spreadsheet would run as a formula is guarded; see `cells`.

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
