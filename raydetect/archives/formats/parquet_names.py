"""Names of the rows of a Parquet file, all of which are read before the first row.

Names come from the first column of NAME_COLUMNS, or the `path` beside the bytes, in which every name is usable and
unique. If there is no such column, rows with an unusable or repeated name are named by number (`row-17`), and `meta`
has the original name. `./a` and `a` are the same name. Names longer than MAX_NAME_BYTES count as null.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydetect.archives.base import safe_name
from raydetect.archives.formats.parquet_cells import unpacked_bytes, unpacked_too_far
from raydetect.archives.name_limits import MAX_NAME_BYTES, ROW_BYTES, NameCount
from raydetect.archives.samples import tidy
from raydetect.errors import ArchiveError, MemberError

NAME_COLUMNS = ("key", "path", "name", "file_name")
NAMES_AT_ONCE, MAX_BATCH_BYTES = 1024, 256 << 20


@dataclass(frozen=True, slots=True)
class RowNames:
    """Names of all rows of a file, including those of other shards.

    Attributes:
        names: values of the column, None for null; empty if there is no column.
        counts: number of rows with each `tidy` name; None if every name is usable and unique.
    """

    names: Sequence[str | None] = ()
    counts: Counter[str] | None = None

    def name(self, row: int) -> str | None:
        """Returns the name of a row in its column."""
        return self.names[row] if self.names else None

    def key(self, row: int) -> str:
        """Returns the name of a row for its key."""
        name = self.name(row)
        if name is None or (self.counts is not None and not (self.counts[tidy(name)] == 1 and _is_usable(name, row))):
            return f"row-{row}"
        return name


def row_names(file: pq.ParquetFile, image: str, uri: str) -> RowNames:
    """Reads the names of all rows from the columns that may have them.

    Args:
        file: the opened file.
        image: the column of images.
        uri: URI of the file, for messages.

    Raises:
        ArchiveError: the names need too much memory.
    """
    first: list[str | None] | None = None
    for column, is_text in _name_columns(file.schema_arrow, image):
        names = _names(file, column, uri) if is_text else []
        usable = all(name is not None and _is_usable(name, row) for row, name in enumerate(names))
        if names and usable and len({tidy(name) for name in names if name is not None}) == len(names):
            return RowNames(names)
        first = names if first is None else first
    return RowNames(first or (), Counter(tidy(name) for name in first or () if name is not None))


def _name_columns(schema: pa.Schema, image: str) -> Iterator[tuple[str, bool]]:
    """Yields (column, whether it is text) for the columns that may have names; other types count as null."""
    for name in NAME_COLUMNS:
        if name in schema.names and name != image:
            yield name, _is_text(schema.field(name).type)
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        yield f"{image}.path", _is_text(kind.field("path").type)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _names(file: pq.ParquetFile, column: str, uri: str) -> list[str | None]:
    names: list[str | None] = []
    count = NameCount(uri)
    for group in range(file.metadata.num_row_groups):
        reason = unpacked_too_far(file, group, [column])
        if reason:
            raise ArchiveError(f"{uri}: {reason}, so its names were not read. Write it without such a column.")
        # assumes the worst case of a dictionary: every row has the same value, as long as the whole column chunk
        rows = MAX_BATCH_BYTES // max(1, unpacked_bytes(file, group, column))
        for batch in file.iter_batches(max(1, min(rows, NAMES_AT_ONCE)), row_groups=[group], columns=[column]):
            for name in _short_texts(batch.column(0)):
                count.add(ROW_BYTES + len(name or ""))
                names.append(name or None)
    return names


def _short_texts(texts: pa.Array) -> list[str | None]:
    if pa.types.is_struct(texts.type):
        texts = texts.flatten()[0]  # null for a null struct
    if pa.types.is_dictionary(texts.type):
        short = _without_long(texts.dictionary)
        texts = short.take(texts.indices)
    names: list[str | None] = _without_long(texts).to_pylist()
    return names


def _without_long(texts: pa.Array) -> pa.Array:
    texts = texts.cast(pa.large_string())
    return pc.if_else(pc.greater(pc.binary_length(texts), MAX_NAME_BYTES), None, texts)


def _is_usable(name: str, row: int) -> bool:
    if tidy(name).startswith("row-") and tidy(name) != f"row-{row}":
        return False
    try:
        return bool(safe_name(name)) and "://" not in name
    except MemberError:
        return False
