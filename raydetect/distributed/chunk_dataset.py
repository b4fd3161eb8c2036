"""Reads shards into chunks of encoded images as Ray Data rows. Operators exchange encoded bytes, never pixels.

Each row is one chunk: its numbers, and its members as an Arrow table in IPC bytes. Ray may split its blocks anywhere
without splitting a chunk.
"""

import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, ExecutionResources, TaskPoolStrategy

from raydetect.archives.base import Archive
from raydetect.archives.chunks import read_chunks
from raydetect.config import SourceSpec
from raydetect.config.validation import to_plain
from raydetect.errors import RaydetectError, error_of, error_text
from raydetect.left_out import left_out_of
from raydetect.records import Chunk, LeftOut, Member, Shard

MAX_BLOCKS = 2000
CHUNKS_HELD_PER_WORKER = 6  # being read, queued and being scored
BYTES_TYPES = {"data": pa.large_binary(), "label": pa.int8(), "notes": pa.list_(pa.string())}
MEMBERS = pa.schema([(f.name, BYTES_TYPES.get(f.name, pa.string())) for f in dataclasses.fields(Member)])


@dataclass(frozen=True, slots=True)
class Reading:
    """How an archive is read in Ray tasks.

    Attributes:
        archive: the open archive.
        source: its settings in the job.
        chunk_images: maximum number of images per chunk.
        chunk_bytes: encoded size at which a chunk is closed.
        readers: number of concurrent read tasks.
        consumers: number of workers that consume chunks.
    """

    archive: Archive
    source: SourceSpec
    chunk_images: int
    chunk_bytes: int
    readers: int
    consumers: int

    def tables(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yields a one-row table for each chunk of the shards in `table`; runs in a Ray task."""
        for row in table.to_pylist():
            shard = row_shard(row)
            try:
                for chunk in read_chunks(self.archive, shard, self.source, self.chunk_images, self.chunk_bytes):
                    yield pack_chunk(chunk)
            except RaydetectError as error:
                yield pack_chunk(Chunk(shard.index, 0, False, ()), error)


def chunk_dataset(reading: Reading, shards: Sequence[Shard]) -> Dataset:
    """A lazy dataset with one row per chunk of `shards`."""
    context = DataContext.get_current()
    context.target_max_block_size = 1  # pass each chunk on as soon as it is read
    context.execution_options.resource_limits = limits(reading)
    rows = [shard_row(shard) for shard in shards]
    listed = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    return listed.map_batches(
        reading.tables,
        batch_format="pyarrow",
        batch_size=1,
        compute=TaskPoolStrategy(size=reading.readers),
        num_cpus=0,  # reading is I/O-bound; all CPUs go to the workers
    )


def limits(reading: Reading) -> ExecutionResources:
    """The bytes that may be queued in the object store.

    Without a limit, readers run ahead until they fill it, and memory use grows with the archive.
    """
    return ExecutionResources.for_limits(
        object_store_memory=CHUNKS_HELD_PER_WORKER * reading.consumers * reading.chunk_bytes
    )


def shard_row(shard: Shard) -> dict[str, object]:
    """A shard as plain columns."""
    start, stop = shard.span or (-1, -1)
    return {
        "index": shard.index,
        "uri": shard.uri,
        "format": shard.format,
        "size_bytes": shard.size_bytes,
        "fingerprint": shard.fingerprint,
        "start": start,
        "stop": stop,
        "listing": shard.listing,
        "left_out": json.dumps(to_plain(shard.left_out)),
        "index_uri": shard.index_uri,
    }


def row_shard(row: dict[str, object]) -> Shard:
    """The inverse of `shard_row`."""
    values = dict(row)
    start, stop, left_out = values.pop("start"), values.pop("stop"), _left_out(values.pop("left_out"))
    return Shard(**values, left_out=left_out, span=None if start == -1 else (start, stop))  # type: ignore[arg-type]


def _left_out(text: object) -> dict[str, LeftOut]:
    return left_out_of(json.loads(str(text)))


def pack_chunk(chunk: Chunk, error: RaydetectError | None = None) -> pa.Table:
    """A chunk, or the error that replaced it, as a one-row table."""
    columns = {name: [getattr(member, name) for member in chunk.members] for name in MEMBERS.names}
    buffer = io.BytesIO()
    table = pa.table(columns, schema=MEMBERS)
    with pa.ipc.new_stream(buffer, MEMBERS) as writer:
        writer.write_table(table)
    return pa.table(
        {
            "shard": [chunk.shard],
            "number": [chunk.number],
            "last": [chunk.last],
            "members": pa.array([buffer.getvalue()], pa.large_binary()),
            "left_out": [json.dumps(to_plain(chunk.left_out))],
            "error": ["" if error is None else error_text(error)],
        }
    )


def unpack_chunks(table: pa.Table) -> Iterator[Chunk]:
    """Yields the chunks packed by `pack_chunk`.

    Raises:
        RaydetectError: what ended the reading, such as a bad shard, and the source says `fail`; or the storage failed.
    """
    for i in range(table.num_rows):
        if table["error"][i].as_py():
            raise error_of(table["error"][i].as_py())
        with pa.ipc.open_stream(table["members"][i].as_buffer()) as reader:
            members = tuple(Member(**{**row, "notes": tuple(row["notes"])}) for row in reader.read_all().to_pylist())
        numbers = (table["shard"][i].as_py(), table["number"][i].as_py(), table["last"][i].as_py())
        yield Chunk(*numbers, members, _left_out(table["left_out"][i].as_py()))
