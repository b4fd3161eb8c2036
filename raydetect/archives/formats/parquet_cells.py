"""Reads cells of a Parquet file in limited memory; sizes are checked before anything is copied.

Rows are decoded one at a time, so memory holds one page and the dictionary of each column, and one row. The writer of
the file determines the page size; the format allows 2 GiB. Other sizes are checked in the footer before reading.
"""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.archives.samples import MAX_SIDECAR_BYTES
from raydetect.errors import ArchiveError

MAX_FOOTER_BYTES = 64 << 20
MAX_FIELD_BYTES = MAX_SIDECAR_BYTES  # size of a label, category or defect
MAX_NESTED_VALUES = 1 << 20  # values of such a column per row group if its cells are lists
MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO = 256 << 20, 100  # a column chunk above both limits is not read
FIELDS = ("label", "category", "defect")


class TooManyBytes:
    """Replaces a value that is too large to be read."""


def refuse_long_footer(handle: Any, uri: str) -> None:
    """Checks the size of the footer.

    Raises:
        ArchiveError: the footer is too large.
    """
    handle.seek(-8, io.SEEK_END)
    size = int.from_bytes(handle.read(4), "little")
    if size > MAX_FOOTER_BYTES:
        raise ArchiveError(
            f"{uri}: its footer has {size:,} bytes, more than {MAX_FOOTER_BYTES:,}. Write fewer row "
            "groups or columns into one file."
        )


def columns_to_read(file: pq.ParquetFile, group: int, image: str) -> list[str]:
    """Returns the columns to read of a row group, without `FIELDS` of too many nested values."""
    schema, columns = file.schema_arrow, [bytes_of(file.schema_arrow, image)]
    if "mask" in schema.names:
        columns.append(bytes_of(schema, "mask"))
    return columns + [name for name in FIELDS if name in schema.names and not _is_too_long(file, group, name)]


def bytes_of(schema: pa.Schema, column: str) -> str:
    """Returns the path of a column's bytes, which may be a field of a struct."""
    kind = schema.field(column).type
    return f"{column}.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else column


def _is_too_long(file: pq.ParquetFile, group: int, column: str) -> bool:
    leaves = _leaves(file, group, column)
    return any(leaf.num_values > MAX_NESTED_VALUES for leaf in leaves if leaf.path_in_schema != column)


def _leaves(file: pq.ParquetFile, group: int, column: str) -> Iterator[Any]:
    """Yields the footer's metadata of the primitive columns below a column."""
    entry = file.metadata.row_group(group)
    for leaf in (entry.column(i) for i in range(entry.num_columns)):
        if f"{leaf.path_in_schema}.".startswith(f"{column}."):
            yield leaf


def unpacked_bytes(file: pq.ParquetFile, group: int, column: str) -> int:
    """Returns the decompressed size of a column in a row group in bytes, according to the footer."""
    return sum(leaf.total_uncompressed_size for leaf in _leaves(file, group, column))


def unpacked_too_far(file: pq.ParquetFile, group: int, columns: Iterable[str]) -> str:
    """Returns the reason not to read a row group: a column decompresses to far more than is stored; else "".

    Encoded images are compressed already, so columns of valid files hardly grow.
    """
    for leaf in (leaf for column in columns for leaf in _leaves(file, group, column)):
        plain, packed = leaf.total_uncompressed_size, leaf.total_compressed_size
        if plain > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * packed):
            return f"column {leaf.path_in_schema} of row group {group} unpacks from {packed:,} to {plain:,} bytes"
    return ""


def cell_bytes(cell: pa.Scalar) -> pa.Buffer:
    """Returns the bytes of an image cell without copying; empty for null."""
    if isinstance(cell, pa.StructScalar) and cell.is_valid:
        cell = cell["bytes"]
    if isinstance(cell, pa.DictionaryScalar) and cell.is_valid:
        cell = cell.value
    return cell.as_buffer() if cell.is_valid else pa.py_buffer(b"")


def field_value(column: pa.Array) -> Any:
    """Returns the Python value of a column of one row; `TooManyBytes` if it is larger than `MAX_FIELD_BYTES`."""
    cell = column[0]
    if isinstance(cell, pa.DictionaryScalar) and cell.is_valid:
        cell = cell.value
    size = column.nbytes if pa.types.is_nested(cell.type) else 0
    if isinstance(cell, pa.BinaryScalar) and cell.is_valid:  # includes strings
        size = cell.as_buffer().size
    return TooManyBytes() if size > MAX_FIELD_BYTES else cell.as_py()
