"""Parquet with a column of encoded images; row groups are the parts a large file is split into.

`parquetrow://COLUMN/ROW::URL` is the fsspec URL of one cell; the small filesystem below opens it.

`parquet_names.py` says how rows are named, `parquet_cells.py` what bounds the memory.
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

from raydetect.archives.base import composed, key_of, listed_file, readable
from raydetect.archives.directory import too_many_bytes, with_facts, with_words
from raydetect.archives.formats.parquet_cells import (
    WORDS,
    TooManyBytes,
    bytes_of,
    cell_bytes,
    columns_to_read,
    refuse_long_footer,
    unpacked_too_far,
    word,
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
MAX_CLASSES_BYTES = 4 << 20  # of the JSON that names classes
BUFFER_BYTES = 8 << 20  # that are read ahead of each column


def read_parquet(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    """Members of a Parquet shard, row by row.

    Raises:
        ArchiveError: not a Parquet file, or damaged.
        SpecError: no column, or several, could hold the images.
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
        except Exception as error:  # whatever hostile bytes make the library raise
            reason = " ".join(str(error).split())[:200]
            raise ArchiveError(f"{shard.uri}: not a readable Parquet file ({reason}). {REPAIR}") from None


def image_column(schema: pa.Schema, source: SourceSpec, uri: str) -> str:
    """The column with encoded images: the stated one, or the only one of a fitting type.

    Raises:
        SpecError: it is not there, or several fit.
    """
    fitting = [
        field.name for field in schema if _holds_images(field.type) and field.name != "mask" and "::" not in field.name
    ]
    if source.image_column is not None:
        if source.image_column not in fitting:
            raise SpecError(
                f"{uri}: source.image_column {source.image_column!r} is no column of encoded images. "
                f"Columns: {', '.join(schema.names)}."
            )
        return source.image_column
    if len(fitting) != 1:
        raise SpecError(
            f"{uri}: {len(fitting)} columns could hold encoded images ({', '.join(fitting) or 'none'}). "
            "State source.image_column."
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
    """Names of the classes that numbers of a column stand for, as Hugging Face writes them into the schema."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    if len(text) > MAX_CLASSES_BYTES:
        message = f"{len(text):,} bytes are more than {MAX_CLASSES_BYTES:,}. Write the file without them."
        raise ArchiveError(f"{uri}: the names of classes in its schema are too long: {message}")
    try:
        told = json.loads(text)
        features = told["info"]["features"]
        found = {name: feature.get("names") for name, feature in features.items() if isinstance(feature, dict)}
        return {name: _in_order(names) for name, names in found.items() if isinstance(names, list | dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # written by something else under the same key


def _in_order(names: "list[Any] | dict[str, Any]") -> list[str]:
    """Names of classes 0, 1, ...; older versions of the library wrote them under their numbers."""
    if isinstance(names, dict):
        names = [names[str(number)] for number in range(len(names))]
    return [str(name) for name in names]


def _groups(file: pq.ParquetFile, shard: Shard) -> Iterator[tuple[int, int]]:
    """(absolute first row, row group) of the row groups whose data begins inside the shard's span."""
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
    """Members of the row groups that can be read.

    Raises:
        ArchiveError: after them, when there are others.
    """
    not_read = ""
    for first_row, group in _groups(file, shard):
        columns = columns_to_read(file, group, rows.image)
        why_not = unpacked_too_far(file, group, columns)
        not_read = not_read or why_not
        if not why_not:
            yield from _group_members(file, group, first_row, columns, rows)
    if not_read:
        raise ArchiveError(f"{shard.uri}: {not_read}, so its rows were not read. Write it without such a column.")


def _group_members(
    file: pq.ParquetFile, group: int, first_row: int, columns: list[str], rows: "RowReader"
) -> Iterator[Member]:
    endless = {name: TooManyBytes() for name in WORDS if name in file.schema_arrow.names and name not in columns}
    for row, batch in enumerate(file.iter_batches(1, row_groups=[group], columns=columns), first_row):
        words = {name: word(batch.column(name)) for name in WORDS if name in columns}
        member = rows.member({name: batch.column(name)[0] for name in batch.schema.names}, {**words, **endless}, row)
        if member is not None:
            yield member


@dataclass(frozen=True, slots=True)
class RowReader:
    """Turns the rows of one file into members."""

    uri: str
    image: str
    source: SourceSpec
    naming: Naming
    left_out: LeftOutCount
    names: RowNames
    classes: Mapping[str, Sequence[str]]

    def member(self, cells: Mapping[str, pa.Scalar], words: Mapping[str, Any], row: int) -> Member | None:
        """One row as a member; None when the pattern leaves it out.

        Args:
            cells: by column.
            words: of them, the values of `WORDS`.
            row: its number in the file.
        """
        name, key_name = self.names.name(row), self.names.key(row)
        facts = self.naming.read(_path(name or key_name))
        if facts is None:
            is_mask = self.naming.is_mask(_path(name or key_name))
            self.left_out.add("mask" if is_mask else "pattern", readable(name or key_name))
            return None
        beside = {} if name is None or name == key_name else {"name": readable(name)}
        member = Member(
            key_of(self.uri, key_name),
            f"parquetrow://{self.image}/{row}::{self.uri}",
            mask_uri=f"parquetrow://mask/{row}::{self.uri}" if "mask" in cells and cells["mask"].is_valid else None,
            meta=json.dumps({"row": row, **beside}),
        )
        member = with_words(with_facts(member, facts), self._words(words), self.naming, self.classes.get("label", ()))
        data = cell_bytes(cells[self.image])
        if data.size > self.source.max_image_bytes:
            return too_many_bytes(member, data.size, self.source.max_image_bytes)
        return replace(member, data=data.to_pybytes())

    def _words(self, words: Mapping[str, Any]) -> dict[str, Any]:
        """What columns say, with names in place of the numbers of classes."""
        found = {name: words.get(name) for name in WORDS}
        for name in ("category", "defect"):
            number, classes = found[name], self.classes.get(name, ())
            if isinstance(number, int) and 0 <= number < len(classes):
                found[name] = classes[number]
        return found


def _path(name: str) -> str:
    """A name as patterns see it: with `/` between folders, whatever wrote it."""
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
        """The cell's bytes.

        Raises:
            FileNotFoundError: no such column or row, or the cell is null.
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
        """Rows are opened by number and never listed."""
        self.dir_cache: dict[str, Any] = {}
