"""The results of a chunk, as they travel from the worker that scored it to whoever commits its shard."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydetect.config.validation import to_plain, validate
from raydetect.records import OK, AnomalousRegion, HeatmapZip, LeftOut, Row

REGION_TYPES = {"area_px": pa.int64(), "peak_score": pa.float64()}  # the others are columns and rows of the picture
REGION_FIELDS = tuple(f.name for f in dataclasses.fields(AnomalousRegion))
REGION = pa.struct([pa.field(name, REGION_TYPES.get(name, pa.int32()), nullable=False) for name in REGION_FIELDS])
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
    "regions": pa.list_(REGION),
    "regions_left_out": pa.int64(),
    "close_up_uris": pa.list_(pa.string()),
}
REQUIRED = ("key", "image_uri", "chunk", "status", "error", "artifact", "meta", "note", "sha256")
SCHEMA = pa.schema(
    [pa.field(f.name, TYPES.get(f.name, pa.string()), nullable=f.name not in REQUIRED) for f in dataclasses.fields(Row)]
)
PICTURE = pa.field("picture", pa.large_binary())
CLOSE_UPS = pa.field("close_ups", pa.list_(pa.large_binary()))
FACTS = b"raydetect"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFacts:
    """What is known of a scored chunk besides its rows.

    Attributes:
        shard: index of the shard.
        number: number of the chunk in the shard.
        last: whether it is the last chunk of the shard.
        zips: heatmap zips that the worker has written.
        clipped_pixels: clipped pixels of its maps.
        left_out: files of the shard without a row; on its last chunk only.
        seconds: time that scoring took.
        host: name of the host that scored it.
    """

    shard: int
    number: int
    last: bool
    zips: tuple[HeatmapZip, ...] = ()
    clipped_pixels: int = 0
    left_out: Mapping[str, LeftOut] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    host: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredChunk:
    """A scored chunk.

    Attributes:
        facts: numbers and counts.
        rows: rows in member order, with the columns of SCHEMA; `heatmap_uri` is null for those in `pictures`.
        pictures: heatmap PNGs that are not written yet, by row.
        close_ups: close-ups of such rows as PNG, in the order of the regions.
    """

    facts: ChunkFacts
    rows: pa.Table
    pictures: Mapping[int, bytes]
    close_ups: Mapping[int, Sequence[bytes]] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of rows."""
        return int(self.rows.num_rows)

    @property
    def bad(self) -> int:
        """Number of rows without a score."""
        return self.images - int(pc.sum(pc.equal(self.rows["status"], OK)).as_py() or 0)

    @property
    def flagged(self) -> int:
        """Number of flagged rows."""
        return int(pc.sum(self.rows["flagged"]).as_py() or 0)

    @property
    def picture_bytes(self) -> int:
        """Bytes of the heatmaps and close-ups that are not written yet."""
        return picture_bytes(self.pictures, self.close_ups)

    def to_bytes(self) -> bytes:
        """Encodes the chunk as one Arrow stream."""
        pictures = pa.array([self.pictures.get(i) for i in range(self.images)], PICTURE.type)
        facts = json.dumps(to_plain(self.facts)).encode()
        close_ups = pa.array([self.close_ups.get(i) for i in range(self.images)], CLOSE_UPS.type)
        table = self.rows.append_column(PICTURE, pictures).append_column(CLOSE_UPS, close_ups)
        table = table.replace_schema_metadata({FACTS: facts})
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
        data: bytes = buffer.getvalue().to_pybytes()
        return data

    @classmethod
    def from_bytes(cls, data: pa.Buffer | bytes) -> "ScoredChunk":
        """Decodes what `to_bytes` has encoded."""
        with pa.ipc.open_stream(data) as reader:
            table = reader.read_all()
        facts: Any = json.loads(table.schema.metadata[FACTS])
        pictures = {i: png for i, png in enumerate(table[PICTURE.name].to_pylist()) if png is not None}
        close_ups = {i: pngs for i, pngs in enumerate(table[CLOSE_UPS.name].to_pylist()) if pngs is not None}
        rows = table.drop_columns([PICTURE.name, CLOSE_UPS.name]).replace_schema_metadata(None)
        return cls(validate(ChunkFacts, facts, "a scored chunk"), rows, pictures, close_ups)


def picture_bytes(pictures: Mapping[int, bytes], close_ups: Mapping[int, Sequence[bytes]]) -> int:
    """Bytes of heatmaps and close-ups."""
    return sum(map(len, pictures.values())) + sum(len(png) for pngs in close_ups.values() for png in pngs)


def rows_table(rows: Sequence[Row]) -> pa.Table:
    """Converts rows to a table with the columns of SCHEMA."""
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    columns["regions"] = [None if found is None else [_plain(one) for one in found] for found in columns["regions"]]
    return pa.table(columns, schema=SCHEMA)


def _plain(region: AnomalousRegion) -> dict[str, Any]:
    return {name: getattr(region, name) for name in REGION_FIELDS}
