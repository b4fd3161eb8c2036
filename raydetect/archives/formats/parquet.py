"""Parquet with a column of encoded images; row groups are the parts a large file is split into.

`parquetrow://COLUMN/ROW::URL` is the fsspec URL of one cell; the small filesystem below opens it.

Rows of a table are no files, so their names need not differ. Names come from the first column of NAME_COLUMNS, or the
`path` beside the bytes, in which every name is usable and stands once. Where there is no such column, a row whose name
is unusable, or stands twice, is named by its number (`row-17`), and its own name stands in `meta`. `./a` and `a` are
one name.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.archive import AbstractArchiveFileSystem

from raydetect.archives.base import composed, key_of, listed_file, readable, safe_name
from raydetect.archives.directory import too_many_bytes, with_facts, with_words
from raydetect.archives.formats.zip import REPAIR
from raydetect.archives.path_patterns import Naming
from raydetect.archives.samples import tidy
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError, MemberError, RaydetectError, SpecError
from raydetect.left_out import LeftOutCount
from raydetect.records import Member, Shard
from raydetect.storage import Storage

SUFFIXES = (".parquet", ".pq")
NAME_COLUMNS = ("key", "path", "name", "file_name")
ROWS_AT_ONCE = 16


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
            file = pq.ParquetFile(handle)
            image = image_column(file.schema_arrow, source, shard.uri)
            rows = RowReader(shard.uri, image, source, naming, left_out, row_names(file, image), _classes(file))
            for first_row, group in _groups(file, shard):
                yield from _group_members(file, group, first_row, rows)
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


@dataclass(frozen=True, slots=True)
class RowNames:
    """Names of all rows of a file, also of those that other shards read.

    Attributes:
        names: as the column has them, None where there is none.
        keys: the name of every row in its key.
    """

    names: Sequence[str | None]
    keys: Sequence[str]


def row_names(file: pq.ParquetFile, image: str) -> RowNames:
    """Names of the rows, from one pass over the columns that may hold them."""
    count = file.metadata.num_rows
    first: list[str | None] | None = None
    for values in _name_columns(file, image):
        names = [value if isinstance(value, str) and value else None for value in values]
        unique = len({name and tidy(name) for name in names}) == count
        if unique and all(name is not None and _is_usable(name, row) for row, name in enumerate(names)):
            return RowNames(names, [str(name) for name in names])
        first = first or names
    chosen = first or [None] * count
    often = Counter(tidy(name) for name in chosen if name is not None)
    keys = [
        name if name is not None and often[tidy(name)] == 1 and _is_usable(name, row) else f"row-{row}"
        for row, name in enumerate(chosen)
    ]
    return RowNames(chosen, keys)


def _name_columns(file: pq.ParquetFile, image: str) -> Iterator[list[Any]]:
    for name in NAME_COLUMNS:
        if name in file.schema_arrow.names and name != image:
            yield file.read(columns=[name]).column(0).to_pylist()
    kind = file.schema_arrow.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        cells = file.read(columns=[f"{image}.path"]).column(0).to_pylist()
        yield [cell and cell.get("path") for cell in cells]


def _is_usable(name: str, row: int) -> bool:
    if tidy(name).startswith("row-") and tidy(name) != f"row-{row}":
        return False
    try:
        return bool(safe_name(name)) and "://" not in name
    except MemberError:
        return False


def _classes(file: pq.ParquetFile) -> dict[str, list[str]]:
    """Names of the classes that numbers of a column stand for, as Hugging Face writes them into the schema."""
    try:
        told = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
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


def _group_members(file: pq.ParquetFile, group: int, first_row: int, rows: "RowReader") -> Iterator[Member]:
    known = (rows.image, "mask", "label", "category", "defect")
    columns = [name for name in known if name in file.schema_arrow.names]
    row = first_row
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
        for words in batch.to_pylist():
            member = rows.member(words, row)
            if member is not None:
                yield member
            row += 1


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

    def member(self, words: dict[str, Any], row: int) -> Member | None:
        """One row as a member; None when the pattern leaves it out."""
        name, key_name = self.names.names[row], self.names.keys[row]
        facts = self.naming.read(_path(name or key_name))
        if facts is None:
            is_mask = self.naming.is_mask(_path(name or key_name))
            self.left_out.add("mask" if is_mask else "pattern", readable(name or key_name))
            return None
        beside = {} if name is None or name == key_name else {"name": readable(name)}
        member = Member(
            key_of(self.uri, key_name),
            f"parquetrow://{self.image}/{row}::{self.uri}",
            mask_uri=f"parquetrow://mask/{row}::{self.uri}" if words.get("mask") is not None else None,
            meta=json.dumps({"row": row, **beside}),
        )
        member = with_words(with_facts(member, facts), self._words(words), self.naming, self.classes.get("label", ()))
        cell = words[self.image]
        data = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
        if len(data) > self.source.max_image_bytes:
            return too_many_bytes(member, len(data), self.source.max_image_bytes)
        return replace(member, data=data)

    def _words(self, words: dict[str, Any]) -> dict[str, Any]:
        """What columns say, with names in place of the numbers of classes."""
        found = {name: words.get(name) for name in ("label", "category", "defect")}
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
        self._file = pq.ParquetFile(fo)

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
                cell = self._file.read_row_group(group, columns=[column]).column(0)[row].as_py()
                data = cell.get("bytes") if isinstance(cell, dict) else cell
                if data is None:
                    raise FileNotFoundError(path)
                return io.BytesIO(data)
            row -= rows
        raise FileNotFoundError(path)

    def _get_dirs(self) -> None:
        """Rows are opened by number and never listed."""
        self.dir_cache: dict[str, Any] = {}
