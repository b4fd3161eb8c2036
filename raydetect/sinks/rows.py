"""Rows of a results directory, part after part in bounded memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.errors import StorageError
from raydetect.records import Part, Receipt
from raydetect.sinks.archive_flags import NEEDED, ArchiveFlags, archive_flags
from raydetect.sinks.ledger import Ledger
from raydetect.storage import join_uri

READERS, AHEAD = 8, 16
LATER = ("note", "sha256")  # columns that parts of older versions have not


def read_rows(ledger: Ledger, columns: Sequence[str] | None = None) -> Iterator[tuple[Receipt, Part, pa.Table]]:
    """Rows of every committed part, in order of shards and chunks; a few parts are read ahead by threads.

    Where the whole archive decided what is flagged (`flag.fdr`), rows and counts tell its decision; before it they tell
    none.

    Args:
        ledger: of the results directory.
        columns: which ones; None = all.

    Raises:
        StorageError: a record or part is missing or damaged.
    """
    flags = archive_flags(ledger.manifest())
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[tuple[Receipt, Part, Future[pa.Table]]] = deque()
        for written in ledger.receipts():
            receipt = written if flags is None else flags.receipt(written)
            for part in receipt.parts:
                ahead.append((receipt, part, pool.submit(_read, ledger, part, columns, flags)))
                if len(ahead) == AHEAD:
                    yield _next(ahead)
        while ahead:
            yield _next(ahead)


def _next(ahead: deque[tuple[Receipt, Part, "Future[pa.Table]"]]) -> tuple[Receipt, Part, pa.Table]:
    receipt, part, coming = ahead.popleft()
    return receipt, part, coming.result()


def _read(ledger: Ledger, part: Part, columns: Sequence[str] | None, flags: ArchiveFlags | None) -> pa.Table:
    if flags is None:
        return read_part(ledger, part, columns)
    if columns is None:
        return flags.decided(read_part(ledger, part))
    return flags.decided(read_part(ledger, part, tuple(dict.fromkeys((*columns, *NEEDED))))).select(list(columns))


def read_part(ledger: Ledger, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one part.

    Raises:
        StorageError: it is missing or damaged.
    """
    place = join_uri(ledger.uri, part.path)
    # from memory: Arrow's threads may hold a Python file until after the interpreter has ended, which aborts
    data = pa.BufferReader(ledger.storage.read(place))
    try:
        table = pq.ParquetFile(data).read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{place}: is no whole Parquet part ({' '.join(str(error).split())[:160]}). Remove the ledger record of "
            f"shard {part.shard} to score it anew."
        ) from None
    return _completed(table, columns)


def _completed(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """A part of an older version, with the columns that came since; they are texts, and the last ones."""
    lacking = [name for name in LATER if name not in table.column_names and (columns is None or name in columns)]
    for name in lacking:
        empty = pa.array([""] * table.num_rows, pa.string())
        table = table.append_column(pa.field(name, pa.string(), nullable=False), empty)
    return table if columns is None or not lacking else table.select(list(columns))
