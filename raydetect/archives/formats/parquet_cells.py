"""Cells of a Parquet file, looked at before they are copied, and what of a file is too large to be looked at.

Rows are decoded one at a time, so what is held is a page of each column, its dictionary and one row. A page may be as
large as its writer made it, up to 2 GiB by the format. What the footer says of a row group tells the rest beforehand.
"""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.archives.samples import MAX_SIDECAR_BYTES
from raydetect.errors import ArchiveError

MAX_FOOTER_BYTES = 64 << 20
MAX_WORD_BYTES = MAX_SIDECAR_BYTES  # of a label, category or defect
MAX_NESTED_VALUES = 1 << 20  # of such a column in a row group, where its cells are lists
MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO = 256 << 20, 100  # of a column in a row group; beyond both it is not read
WORDS = ("label", "category", "defect")


class TooManyBytes:
    """Stands for a value that was not read."""


def refuse_long_footer(handle: Any, uri: str) -> None:
    """Looks at the end of a file.

    Raises:
        ArchiveError: the footer is too long.
    """
    handle.seek(-8, io.SEEK_END)
    size = int.from_bytes(handle.read(4), "little")
    if size > MAX_FOOTER_BYTES:
        raise ArchiveError(
            f"{uri}: its footer says that it has {size:,} bytes, more than {MAX_FOOTER_BYTES:,}. Write fewer row "
            "groups or columns into one file."
        )


def columns_to_read(file: pq.ParquetFile, group: int, image: str) -> list[str]:
    """The columns of a row group that tell of its images; words in endless lists are left out."""
    schema, found = file.schema_arrow, [bytes_of(file.schema_arrow, image)]
    if "mask" in schema.names:
        found.append(bytes_of(schema, "mask"))
    return found + [name for name in WORDS if name in schema.names and not _is_endless(file, group, name)]


def bytes_of(schema: pa.Schema, column: str) -> str:
    """The path of a column's bytes, which may stand beside other things."""
    kind = schema.field(column).type
    return f"{column}.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else column


def _is_endless(file: pq.ParquetFile, group: int, column: str) -> bool:
    leaves = _leaves(file, group, column)
    return any(leaf.num_values > MAX_NESTED_VALUES for leaf in leaves if leaf.path_in_schema != column)


def _leaves(file: pq.ParquetFile, group: int, column: str) -> Iterator[Any]:
    """What the footer says of the columns of plain values that a column consists of."""
    entry = file.metadata.row_group(group)
    for leaf in (entry.column(i) for i in range(entry.num_columns)):
        if f"{leaf.path_in_schema}.".startswith(f"{column}."):
            yield leaf


def unpacked_bytes(file: pq.ParquetFile, group: int, column: str) -> int:
    """Of the pages of a column in a row group, as the footer says."""
    return sum(leaf.total_uncompressed_size for leaf in _leaves(file, group, column))


def unpacked_too_far(file: pq.ParquetFile, group: int, columns: Iterable[str]) -> str:
    """Why a row group is not read: a column unpacks to far more than is stored. "" when it is read.

    Encoded images are compressed already, so an honest file hardly unpacks to more than it holds.
    """
    for leaf in (leaf for column in columns for leaf in _leaves(file, group, column)):
        plain, packed = leaf.total_uncompressed_size, leaf.total_compressed_size
        if plain > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * packed):
            return f"column {leaf.path_in_schema} of row group {group} unpacks from {packed:,} to {plain:,} bytes"
    return ""


def cell_bytes(cell: pa.Scalar) -> pa.Buffer:
    """The bytes of a cell of encoded images, not copied; empty where there are none."""
    if isinstance(cell, pa.StructScalar) and cell.is_valid:
        cell = cell["bytes"]
    if isinstance(cell, pa.DictionaryScalar) and cell.is_valid:
        cell = cell.value
    return cell.as_buffer() if cell.is_valid else pa.py_buffer(b"")


def word(column: pa.Array) -> Any:
    """The value of a column of one row, as Python has it; `TooManyBytes` where it is too large for a word."""
    cell = column[0]
    if isinstance(cell, pa.DictionaryScalar) and cell.is_valid:
        cell = cell.value
    size = column.nbytes if pa.types.is_nested(cell.type) else 0
    if isinstance(cell, pa.BinaryScalar) and cell.is_valid:  # text too
        size = cell.as_buffer().size
    return TooManyBytes() if size > MAX_WORD_BYTES else cell.as_py()
