"""Writes the rows of a shard as few Parquet files, and its heatmaps as few zips, in Hive folders by shard."""

import dataclasses
import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydetect.records import Chunk, HeatmapZip, Part, Receipt, Row, note_kinds
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.scored_chunk import SCHEMA, ChunkFacts, ScoredChunk, picture_bytes, rows_table
from raydetect.storage import Storage, join_uri

ZIP_TIME = (1980, 1, 1, 0, 0, 0)
CHUNK_ZIP_BYTES = 4 << 20  # a chunk with as many bytes of heatmaps gets a zip of its own, which its worker writes
PART_ROWS, PART_PICTURE_BYTES = 1 << 18, 64 << 20  # a part is closed by the chunk that reaches one of them


@dataclasses.dataclass(frozen=True, slots=True)
class ResultsSink:
    """Writes into a results directory: workers write heatmaps of chunks, and the committer the rest of a shard.

    File names and contents depend only on the shard, so writing again leaves the same files.

    Attributes:
        uri: the results directory.
        storage: storage of that URI.
    """

    uri: str
    storage: Storage

    def write(
        self,
        chunk: Chunk,
        rows: Sequence[Row],
        pictures: Mapping[int, bytes],
        clipped_pixels: int = 0,
        close_ups: Mapping[int, Sequence[bytes]] = MappingProxyType({}),
    ) -> ScoredChunk:
        """Writes the heatmaps and close-ups of a chunk if they are large; small ones travel with the rows.

        Args:
            chunk: the scored chunk.
            rows: its rows, in member order.
            pictures: heatmap PNGs by position.
            clipped_pixels: clipped pixels of its maps.
            close_ups: close-up PNGs by position, in the order of the regions.

        Raises:
            StorageError: the zip cannot be written.
        """
        zips: tuple[HeatmapZip, ...] = ()
        table = rows_table(rows)
        if picture_bytes(pictures, close_ups) >= CHUNK_ZIP_BYTES:
            path = f"heatmaps/shard={chunk.shard:05d}/chunk-{chunk.number:04d}.zip"
            zips = (self._write_zip(path, _named(pictures, close_ups)),)
            table = self._linked(table, path, pictures, close_ups)
            pictures, close_ups = {}, {}
        facts = ChunkFacts(
            shard=chunk.shard,
            number=chunk.number,
            last=chunk.last,
            zips=zips,
            clipped_pixels=clipped_pixels,
            left_out=chunk.left_out,
        )
        return ScoredChunk(facts, table, pictures, close_ups)

    def write_part(self, number: int, chunks: Sequence[ScoredChunk]) -> Part:
        """Writes consecutive chunks of a shard as one Parquet file, after their heatmaps.

        Args:
            number: number of the part in the shard.
            chunks: the chunks.

        Raises:
            StorageError: a file cannot be written.
        """
        shard = chunks[0].facts.shard
        path = part_path(shard, number)
        zip_path = f"heatmaps/shard={shard:05d}/part-{number:04d}.zip"
        named: dict[str, bytes] = {}
        tables = []
        for chunk in chunks:
            number_of_chunk = chunk.facts.number
            named |= _named(chunk.pictures, chunk.close_ups, number_of_chunk)
            tables.append(self._linked(chunk.rows, zip_path, chunk.pictures, chunk.close_ups, number_of_chunk))
        zips = [one for chunk in chunks for one in chunk.facts.zips]
        if named:
            zips.append(self._write_zip(zip_path, named))
        table = pa.concat_tables(tables)
        data = encode_table(table)
        self.storage.write(join_uri(self.uri, path), data)
        facts = [chunk.facts for chunk in chunks]
        close_ups = pc.sum(pc.list_value_length(table["close_up_uris"])).as_py() or 0
        return Part(
            shard=shard,
            number=number,
            last=facts[-1].last,
            path=path,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            rows=table.num_rows,
            statuses=_value_counts(table["status"]),
            flagged=pc.sum(table["flagged"]).as_py() or 0,
            labelled=_count_labelled(table),
            p_counts=undecided_p_values(table),
            notes=_note_counts(table),
            zips=tuple(zips),
            heatmaps=sum(one.pictures for one in zips) - close_ups,
            clipped_pixels=sum(fact.clipped_pixels for fact in facts),
            regions=pc.sum(pc.list_value_length(table["regions"])).as_py() or 0,
            regions_left_out=pc.sum(table["regions_left_out"]).as_py() or 0,
            close_ups=close_ups,
            left_out=facts[-1].left_out,
            seconds=round(sum(fact.seconds for fact in facts), 3),
            host=",".join(sorted({fact.host for fact in facts if fact.host})),
        )

    def commit(self, receipt: Receipt) -> None:
        """Writes the ledger record of a shard, from which on its rows count.

        Raises:
            StorageError: the record cannot be written.
        """
        Ledger(self.uri, self.storage).write_receipt(receipt)

    def _write_zip(self, path: str, pictures: Mapping[str, bytes]) -> HeatmapZip:
        data = zip_pictures(pictures)
        self.storage.write(join_uri(self.uri, path), data)
        return HeatmapZip(path=path, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), pictures=len(pictures))

    def _linked(
        self,
        rows: pa.Table,
        path: str,
        pictures: Mapping[int, bytes],
        close_ups: Mapping[int, Sequence[bytes]],
        chunk: int | None = None,
    ) -> pa.Table:
        """Fills in `heatmap_uri` and `close_up_uris` of the rows whose pictures are in the zip at `path`."""

        def uri(name: str) -> str:
            return f"zip://{name}::{join_uri(self.uri, path)}"

        rows = _filled(rows, "heatmap_uri", {i: uri(picture_name(i, chunk)) for i in pictures})
        uris = {i: [uri(picture_name(i, chunk, n)) for n in range(len(pngs))] for i, pngs in close_ups.items()}
        return _filled(rows, "close_up_uris", uris)


def part_path(shard: int, number: int) -> str:
    """The path of a Parquet file in the results directory."""
    return f"scores/shard={shard:05d}/part-{number:04d}.parquet"


def picture_name(position: int, chunk: int | None = None, region: int | None = None) -> str:
    """The name of a heatmap in the zip of its chunk, or with the number of its chunk in the zip of a part.

    With `region`, that of the close-up of this region.
    """
    name = f"{position:06d}" if chunk is None else f"{chunk:04d}-{position:06d}"
    return f"{name}.png" if region is None else f"{name}.{region:03d}.png"


def is_full(rows: int, picture_bytes: int) -> bool:
    """Whether a part with so many rows and bytes of small heatmaps is closed."""
    return rows >= PART_ROWS or picture_bytes >= PART_PICTURE_BYTES


def encode_table(table: pa.Table) -> bytes:
    """Encodes rows as Parquet; the same rows give the same bytes, however they are divided into chunks."""
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer, compression="zstd", row_group_size=PART_ROWS)
    return buffer.getvalue()


def encode_rows(rows: Sequence[Row]) -> bytes:
    """Encodes rows as Parquet."""
    return encode_table(rows_table(rows))


def zip_pictures(pictures: Mapping[str, bytes]) -> bytes:
    """Packs PNGs by name into an uncompressed zip without timestamps; the same pictures give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(pictures):
            archive.writestr(zipfile.ZipInfo(name, ZIP_TIME), pictures[name])
    return buffer.getvalue()


def _named(
    pictures: Mapping[int, bytes], close_ups: Mapping[int, Sequence[bytes]], chunk: int | None = None
) -> dict[str, bytes]:
    """The heatmaps and close-ups of a chunk by their names in a zip."""
    named = {picture_name(i, chunk): png for i, png in pictures.items()}
    return named | {picture_name(i, chunk, n): png for i, pngs in close_ups.items() for n, png in enumerate(pngs)}


def _filled(rows: pa.Table, name: str, value_by_row: Mapping[int, Any]) -> pa.Table:
    """Fills in a column of some rows."""
    if not value_by_row:
        return rows
    index = SCHEMA.get_field_index(name)
    column = rows[name].to_pylist()
    for i, value in value_by_row.items():
        column[i] = value
    return rows.set_column(index, SCHEMA.field(index), pa.array(column, SCHEMA.field(index).type))


def _count_labelled(table: pa.Table) -> int:
    labelled = pc.and_(pc.is_valid(table["label"]), pc.is_valid(table["image_score"]))
    return int(pc.sum(labelled).as_py() or 0)


def undecided_p_values(table: pa.Table) -> dict[float, int]:
    """Counts the rows by p-value whose flag depends on the whole archive, or is not decided at all."""
    undecided = pc.and_(pc.is_valid(table["p_value"]), pc.is_null(table["flagged"]))
    return _value_counts(table["p_value"].filter(undecided))


def _note_counts(table: pa.Table) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for note, count in _value_counts(table["note"]).items():
        for kind in note_kinds(note):
            counts[kind] += count
    return dict(sorted(counts.items()))


def _value_counts(column: pa.ChunkedArray) -> dict[Any, int]:
    return dict(sorted((item["values"], item["counts"]) for item in column.value_counts().to_pylist()))
