"""Parquet with a column of encoded images; row groups are the parts a large file is split into.

`parquetrow://COLUMN/ROW::URL` is the fsspec URL of one cell; the small filesystem below opens it.
"""

import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.archive import AbstractArchiveFileSystem

from raydetect.archives.base import safe_name
from raydetect.archives.naming import Naming
from raydetect.archives.samples import key_of
from raydetect.archives.tar import REPAIR
from raydetect.errors import ArchiveError, MemberError, SpecError
from raydetect.records import OK, Member, Shard
from raydetect.spec import SourceSpec
from raydetect.storage import Storage

SUFFIXES = (".parquet", ".pq")
NAME_COLUMNS = ("key", "path", "name", "file_name")
ROWS_AT_ONCE = 16


def read_parquet(shard: Shard, source: SourceSpec, storage: Storage, naming: Naming) -> Iterator[Member]:
    """Members of a Parquet shard, row by row.

    Raises:
        ArchiveError: not a Parquet file, or damaged.
        SpecError: no column, or several, could hold the images.
    """
    with storage.open(shard.uri) as handle:
        try:
            file = pq.ParquetFile(handle)
            image = image_column(file.schema_arrow, source, shard.uri)
            seen: set[str] = set()
            for first_row, group in _groups(file, shard):
                yield from _group_members(file, group, first_row, image, shard, source, naming, seen)
        except (pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArchiveError(f"{shard.uri}: not a readable Parquet file ({reason}). {REPAIR}") from None


def image_column(schema: pa.Schema, source: SourceSpec, uri: str) -> str:
    """The column with encoded images: the stated one, or the only one of a fitting type.

    Raises:
        SpecError: it is not there, or several fit.
    """
    fitting = [field.name for field in schema if _holds_images(field.type) and field.name != "mask"]
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
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _groups(file: pq.ParquetFile, shard: Shard) -> Iterator[tuple[int, int]]:
    """(absolute first row, row group) of the row groups whose data begins inside the shard's span."""
    start, stop = shard.span or (0, shard.size_bytes)
    row = 0
    for group in range(file.metadata.num_row_groups):
        entry = file.metadata.row_group(group)
        column = entry.column(0)
        offset = column.dictionary_page_offset or column.data_page_offset
        if start <= offset < stop:
            yield row, group
        row += entry.num_rows


def _group_members(
    file: pq.ParquetFile,
    group: int,
    first_row: int,
    image: str,
    shard: Shard,
    source: SourceSpec,
    naming: Naming,
    seen: set[str],
) -> Iterator[Member]:
    known = (image, "mask", "label", "category", "defect", *NAME_COLUMNS)
    columns = [name for name in known if name in file.schema_arrow.names]
    row = first_row
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
        for words in batch.to_pylist():
            member = _member(words, row, image, shard.uri, source, naming)
            if member is not None:
                yield _without_duplicate(member, seen)
            row += 1


def _without_duplicate(member: Member, seen: set[str]) -> Member:
    if member.key in seen:
        message = f"{member.key}: a second row of this name. Rename one of them."
        return Member(member.key, member.image_uri, status="duplicate_key", error=message)
    seen.add(member.key)
    return member


def _member(words: dict[str, Any], row: int, image: str, uri: str, source: SourceSpec, naming: Naming) -> Member | None:
    cell = words[image]
    path = cell.get("path") if isinstance(cell, dict) else None
    data = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
    given = next((words[n] for n in NAME_COLUMNS if isinstance(words.get(n), str)), path)
    name = given or f"row-{row}"
    image_uri = f"parquetrow://{image}/{row}::{uri}"
    key = key_of(uri, name)
    try:
        facts = naming.read(safe_name(name))
    except MemberError as error:
        return Member(key, image_uri, status=error.status, error=f"{uri}: {error}")
    if facts is None:
        return None
    label, category, defect = words.get("label"), words.get("category"), words.get("defect")
    too_big = len(data) > source.max_image_bytes
    return Member(
        key,
        image_uri,
        data=b"" if too_big else data,
        status="too_many_bytes" if too_big else OK,
        error=f"{key}: {len(data):,} bytes are more than source.max_image_bytes." if too_big else "",
        label=facts.label if label is None else min(int(label), 1),
        category=facts.category if category is None else str(category),
        defect=facts.defect if defect is None else str(defect),
        mask_uri=f"parquetrow://mask/{row}::{uri}" if words.get("mask") is not None else None,
        meta=json.dumps({"row": row}),
    )


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
