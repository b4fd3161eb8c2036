"""Parquet files with a column of encoded images; large files are split by row groups.

`parquetrow://COLUMN/ROW::URL` is the fsspec URL of one cell; `ParquetRowFileSystem` opens it. See `parquet_names.py`
for the names of rows and `parquet_cells.py` for the limits of memory.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.archive import AbstractArchiveFileSystem

from raydetect.archives.base import composed, escaped_text, key_of, listed_file
from raydetect.archives.directory import too_many_bytes, with_facts, with_fields
from raydetect.archives.formats.parquet_cells import (
    FIELDS,
    TooManyBytes,
    bytes_of,
    cell_bytes,
    columns_to_read,
    field_value,
    refuse_long_footer,
    unpacked_too_far,
)
from raydetect.archives.formats.parquet_names import RowNames, row_names
from raydetect.archives.formats.zip import REPAIR
from raydetect.archives.path_patterns import Naming
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError, RaydetectError, SpecError
from raydetect.left_out import LeftOutCount
from raydetect.records import Member, Shard
from raydetect.storage import Storage

SUFFIXES = (".parquet", ".pq")
MAX_CLASSES_BYTES = 4 << 20  # size of the JSON with the class names
BUFFER_BYTES = 8 << 20  # read-ahead per column


def read_parquet(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    """Yields the members of a Parquet shard, row by row.

    Raises:
        ArchiveError: the file is not Parquet, or is damaged.
        SpecError: no column, or more than one, may be that of the images.
        StorageError: the storage failed.
    """
    with storage.open(shard.uri, listed_file(shard)) as handle:
        try:
            refuse_long_footer(handle, shard.uri)
            file = pq.ParquetFile(handle, buffer_size=BUFFER_BYTES)
            image = image_column(file.schema_arrow, source, shard.uri)
            names = row_names(file, image, shard.uri)
            rows = RowReader(shard.uri, image, source, naming, left_out, names, _classes(file, shard.uri))
            yield from _members(file, shard, rows)
        except RaydetectError:
            raise
        except Exception as error:  # the library raises anything on invalid bytes
            reason = " ".join(str(error).split())[:200]
            raise ArchiveError(f"{shard.uri}: not a readable Parquet file ({reason}). {REPAIR}") from None


def image_column(schema: pa.Schema, source: SourceSpec, uri: str) -> str:
    """Returns the column of encoded images: `source.image_column`, or the only one with a binary type.

    Raises:
        SpecError: the column does not exist, or several have a binary type.
    """
    fitting = [
        field.name for field in schema if _holds_images(field.type) and field.name != "mask" and "::" not in field.name
    ]
    if source.image_column is not None:
        if source.image_column not in fitting:
            raise SpecError(
                f"{uri}: source.image_column {source.image_column!r} is not a column of encoded images. "
                f"Columns: {', '.join(schema.names)}."
            )
        return source.image_column
    if len(fitting) != 1:
        raise SpecError(
            f"{uri}: {len(fitting)} columns may have encoded images ({', '.join(fitting) or 'none'}). "
            "Set source.image_column."
        )
    return str(fitting[0])


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _classes(file: pq.ParquetFile, uri: str) -> dict[str, list[str]]:
    """Returns the class names of columns, as Hugging Face writes them into the schema."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    if len(text) > MAX_CLASSES_BYTES:
        message = f"{len(text):,} bytes, more than {MAX_CLASSES_BYTES:,}. Write the file without them."
        raise ArchiveError(f"{uri}: the class names in its schema are too long: {message}")
    try:
        features = json.loads(text)["info"]["features"]
        classes = {name: feature.get("names") for name, feature in features.items() if isinstance(feature, dict)}
        return {name: _in_order(names) for name, names in classes.items() if isinstance(names, list | dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # another program uses the same key


def _in_order(names: "list[Any] | dict[str, Any]") -> list[str]:
    """Returns the names of classes 0, 1, ...; older versions of the library wrote a dict by number."""
    if isinstance(names, dict):
        names = [names[str(number)] for number in range(len(names))]
    return [str(name) for name in names]


def _groups(file: pq.ParquetFile, shard: Shard) -> Iterator[tuple[int, int]]:
    """Yields (index of the first row in the file, row group) of the row groups that start inside the shard's span."""
    start, stop = shard.span or (0, shard.size_bytes)
    row = 0
    for group in range(file.metadata.num_row_groups):
        entry = file.metadata.row_group(group)
        column = entry.column(0)
        offset = column.dictionary_page_offset or column.data_page_offset
        if shard.span is None or start <= offset < stop:
            yield row, group
        row += entry.num_rows


def _members(file: pq.ParquetFile, shard: Shard, rows: "RowReader") -> Iterator[Member]:
    """Yields the members of the row groups that can be read.

    Raises:
        ArchiveError: raised at the end if a row group was skipped.
    """
    skipped = ""
    for first_row, group in _groups(file, shard):
        columns = columns_to_read(file, group, rows.image)
        reason = unpacked_too_far(file, group, columns)
        skipped = skipped or reason
        if not reason:
            yield from _group_members(file, group, first_row, columns, rows)
    if skipped:
        raise ArchiveError(f"{shard.uri}: {skipped}, so its rows were not read. Write it without such a column.")


def _group_members(
    file: pq.ParquetFile, group: int, first_row: int, columns: list[str], rows: "RowReader"
) -> Iterator[Member]:
    too_long = {name: TooManyBytes() for name in FIELDS if name in file.schema_arrow.names and name not in columns}
    for row, batch in enumerate(file.iter_batches(1, row_groups=[group], columns=columns), first_row):
        values = {name: field_value(batch.column(name)) for name in FIELDS if name in columns}
        member = rows.member({name: batch.column(name)[0] for name in batch.schema.names}, {**values, **too_long}, row)
        if member is not None:
            yield member


@dataclass(frozen=True, slots=True)
class RowReader:
    """Returns the members of the rows of one file."""

    uri: str
    image: str
    source: SourceSpec
    naming: Naming
    left_out: LeftOutCount
    names: RowNames
    classes: Mapping[str, Sequence[str]]

    def member(self, cells: Mapping[str, pa.Scalar], values: Mapping[str, Any], row: int) -> Member | None:
        """Returns the member of a row; None if the pattern leaves it out.

        Args:
            cells: cells by column.
            values: values of the columns `FIELDS`.
            row: index of the row in the file.
        """
        name, key_name = self.names.name(row), self.names.key(row)
        facts = self.naming.read(_path(name or key_name))
        if facts is None:
            is_mask = self.naming.is_mask(_path(name or key_name))
            self.left_out.add("mask" if is_mask else "pattern", escaped_text(name or key_name))
            return None
        original = {} if name is None or name == key_name else {"name": escaped_text(name)}
        member = Member(
            key_of(self.uri, key_name),
            f"parquetrow://{self.image}/{row}::{self.uri}",
            mask_uri=f"parquetrow://mask/{row}::{self.uri}" if "mask" in cells and cells["mask"].is_valid else None,
            meta=json.dumps({"row": row, **original}),
        )
        member = with_fields(
            with_facts(member, facts), self._fields(values), self.naming, self.classes.get("label", ())
        )
        data = cell_bytes(cells[self.image])
        if data.size > self.source.max_image_bytes:
            return too_many_bytes(member, data.size, self.source.max_image_bytes)
        return replace(member, data=data.to_pybytes())

    def _fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values of `FIELDS`, with class names instead of class numbers."""
        fields = {name: values.get(name) for name in FIELDS}
        for name in ("category", "defect"):
            number, classes = fields[name], self.classes.get(name, ())
            if isinstance(number, int) and 0 <= number < len(classes):
                fields[name] = classes[number]
        return fields


def _path(name: str) -> str:
    """Returns a name for matching with patterns: in NFC, with `/` between folders."""
    return composed(name.replace("\\", "/"))


class ParquetRowFileSystem(AbstractArchiveFileSystem):  # type: ignore[misc]
    """Read-only fsspec filesystem in which `COLUMN/ROW` is the binary cell of a Parquet file."""

    root_marker = ""
    protocol = "parquetrow"
    cachable = False

    def __init__(
        self,
        fo: Any,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Opens the Parquet file at `fo`, a path or URL (fsspec's chaining passes it)."""
        super().__init__(**kwargs)
        if isinstance(fo, str):
            import fsspec

            fo = fsspec.open(fo, protocol=target_protocol, **(target_options or {})).open()
        self._file = pq.ParquetFile(fo, buffer_size=BUFFER_BYTES)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        """Opens a cell.

        Raises:
            FileNotFoundError: the column or row does not exist, or the cell is null.
        """
        column, _, number = str(self._strip_protocol(path)).strip("/").rpartition("/")
        if mode != "rb" or not number.isdigit() or column not in self._file.schema_arrow.names:
            raise FileNotFoundError(path)
        row = int(number)
        for group in range(self._file.metadata.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if row < rows:
                return io.BytesIO(self._cell(group, row, column))
            row -= rows
        raise FileNotFoundError(path)

    def _cell(self, group: int, row: int, column: str) -> bytes:
        path = bytes_of(self._file.schema_arrow, column)
        if unpacked_too_far(self._file, group, [path]):
            raise OSError(f"{unpacked_too_far(self._file, group, [path])}, so it is not read")
        batches = self._file.iter_batches(1, row_groups=[group], columns=[path])
        cell = next(islice(batches, row, None)).column(0)[0]
        if not cell.is_valid or (isinstance(cell, pa.StructScalar) and not cell["bytes"].is_valid):
            raise FileNotFoundError(column)
        data: bytes = cell_bytes(cell).to_pybytes()
        return data

    def _get_dirs(self) -> None:
        """Sets an empty listing: rows are opened by number only."""
        self.dir_cache: dict[str, Any] = {}
