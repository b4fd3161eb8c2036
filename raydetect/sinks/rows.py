"""Reads the rows of a results directory part by part in bounded memory."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.errors import StorageError
from raydetect.records import Part, Receipt
from raydetect.sinks.archive_flags import NEEDED, archive_flags, flagged_regions
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.reflagging import DONE, refuse_under_way
from raydetect.sinks.scored_chunk import SCHEMA
from raydetect.storage import join_uri
from raydetect.storage.read_ahead import read_ahead

READERS = 4
# the last ones, missing in parts of older versions
NEW_COLUMNS = ("note", "sha256", "regions", "regions_left_out", "close_up_uris")


def read_rows(ledger: Ledger, columns: Sequence[str] | None = None) -> Iterator[tuple[Receipt, Part, pa.Table]]:
    """Yields the rows of every committed part, in order of shards and chunks; threads read a few parts ahead.

    If flags are decided over the whole archive (`flag.fdr`), rows and counts include that decision once the run is
    finished; before, `flagged` is null. After a reflag, rows of images that are not flagged any more have no regions.

    Args:
        ledger: ledger of the results directory.
        columns: columns to read; None = all.

    Raises:
        StorageError: a record or part is missing or damaged.
        ResumeError: a reflag was interrupted.
    """
    run = ledger.run()
    refuse_under_way(ledger.uri, run)
    flags = archive_flags(ledger.manifest())
    was_reflagged = run is not None and DONE in run

    def parts() -> Iterator[tuple[Receipt, Part]]:
        for written in ledger.receipts():
            receipt = written if flags is None else flags.apply_to_receipt(written)
            yield from ((receipt, part) for part in receipt.parts)

    def read(one: tuple[Receipt, Part]) -> tuple[Receipt, Part, pa.Table]:
        more = (*NEEDED, "flagged") if flags or was_reflagged else ()
        table = read_part(ledger, one[1], None if columns is None else tuple(dict.fromkeys((*columns, *more))))
        if flags is not None:
            table = flags.apply(table)
        elif was_reflagged:
            table = flagged_regions(table, table["flagged"])
        return (*one, table if columns is None else table.select(list(columns)))

    yield from read_ahead(read, parts(), READERS)


def read_part(ledger: Ledger, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the rows of one part.

    Raises:
        StorageError: the part is missing or damaged.
    """
    uri = join_uri(ledger.uri, part.path)
    # Read from memory: Arrow's threads may keep a Python file open until after interpreter shutdown, which aborts.
    data = pa.BufferReader(ledger.storage.read(uri))
    try:
        table = pq.ParquetFile(data).read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{uri}: is not a valid Parquet part ({' '.join(str(error).split())[:160]}). Remove the ledger record of "
            f"shard {part.shard} to score it again."
        ) from None
    return _completed(table, columns)


def _completed(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """Adds the columns missing in parts of older versions: empty texts, and null for the others."""
    wanted = SCHEMA.names if columns is None else list(columns)
    missing = [name for name in NEW_COLUMNS if name in wanted and name not in table.column_names]
    for name in missing:
        field = SCHEMA.field(name)
        table = table.append_column(field, pa.array([None if field.nullable else ""] * table.num_rows, field.type))
    return table.select(wanted) if missing else table
