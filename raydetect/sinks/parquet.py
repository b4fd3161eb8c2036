"""Writes rows as one Parquet part per chunk, in Hive folders by shard, and heatmaps as one zip per chunk."""

import dataclasses
import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.records import Chunk, Part, Receipt, Row
from raydetect.sinks.base import Sink
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage, join_uri

TYPES = {
    "width": pa.int32(),
    "height": pa.int32(),
    "brightness": pa.float64(),
    "sharpness": pa.float64(),
    "image_score": pa.float64(),
    "p_value": pa.float64(),
    "threshold": pa.float64(),
    "flagged": pa.bool_(),
    "label": pa.int8(),
}
REQUIRED = ("key", "image_uri", "chunk", "status", "error", "artifact", "meta", "note", "sha256")
SCHEMA = pa.schema(
    [pa.field(f.name, TYPES.get(f.name, pa.string()), nullable=f.name not in REQUIRED) for f in dataclasses.fields(Row)]
)
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class ResultsSink(Sink):
    """Writes into a results directory. Cheap to create and to send to a worker.

    Attributes:
        uri: the results directory.
        storage: storage of that URI.
    """

    uri: str
    storage: Storage

    def write(self, chunk: Chunk, rows: Sequence[Row], pictures: Mapping[int, bytes], clipped_pixels: int = 0) -> Part:
        """Writes heatmaps, then the Parquet part; file names depend only on the chunk's id."""
        heatmap_path = f"heatmaps/{chunk.id}.zip" if pictures else ""
        zipped = zip_pictures(pictures) if pictures else b""
        if pictures:
            self.storage.write(join_uri(self.uri, heatmap_path), zipped)
        linked = [
            dataclasses.replace(row, heatmap_uri=self.heatmap_uri(chunk.id, i)) if i in pictures else row
            for i, row in enumerate(rows)
        ]
        path = f"scores/shard={chunk.shard:05d}/part-{chunk.number:04d}.parquet"
        data = encode_rows(linked)
        self.storage.write(join_uri(self.uri, path), data)
        return Part(
            chunk=chunk.id,
            shard=chunk.shard,
            number=chunk.number,
            last=chunk.last,
            path=path,
            sha256=hashlib.sha256(data).hexdigest(),
            rows=len(rows),
            statuses=dict(sorted(Counter(row.status for row in rows).items())),
            flagged=sum(row.flagged is True for row in rows),
            labelled=sum(row.label is not None and row.image_score is not None for row in rows),
            heatmaps=len(pictures),
            heatmap_path=heatmap_path,
            heatmap_sha256=hashlib.sha256(zipped).hexdigest() if pictures else "",
            bytes=len(data),
            heatmap_bytes=len(zipped),
            clipped_pixels=clipped_pixels,
            left_out=chunk.left_out,
            p_counts=Counter(row.p_value for row in rows if row.p_value is not None and row.flagged is None),
            notes=dict(sorted(Counter(kind for row in rows for kind in row.note_kinds).items())),
        )

    def commit(self, receipt: Receipt) -> None:
        """Writes the ledger record of a shard."""
        Ledger(self.uri, self.storage).write_receipt(receipt)

    def heatmap_uri(self, chunk_id: str, position: int) -> str:
        """Returns the fsspec URL of one heatmap."""
        return f"zip://{picture_name(position)}::{join_uri(self.uri, 'heatmaps', chunk_id + '.zip')}"


def picture_name(position: int) -> str:
    """Returns the name of a heatmap in its chunk's zip."""
    return f"{position:06d}.png"


def encode_rows(rows: Sequence[Row]) -> bytes:
    """Encodes rows as Parquet; the same rows give the same bytes."""
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def zip_pictures(pictures: Mapping[int, bytes]) -> bytes:
    """Packs PNGs by position into an uncompressed zip without timestamps; the same pictures give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for position in sorted(pictures):
            archive.writestr(zipfile.ZipInfo(picture_name(position), ZIP_TIME), pictures[position])
    return buffer.getvalue()
