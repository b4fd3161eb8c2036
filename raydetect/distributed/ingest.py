"""Shards to chunks of encoded images as Ray Data rows. Bytes travel between operators, never pixels.

One row is one chunk: its numbers, and its members as an Arrow table in IPC bytes. Ray may cut its blocks as it
likes; a chunk is never cut.
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
from raydetect.config import to_plain
from raydetect.errors import RaydetectError, error_of, error_text
from raydetect.left_out import left_out_of
from raydetect.records import Chunk, LeftOut, Member, Shard
from raydetect.spec import SourceSpec
from raydetect.worker.read import read_chunks

MAX_BLOCKS = 2000
CHUNKS_HELD_PER_WORKER = 6  # being read, waiting and being scored
BYTES_TYPES = {"data": pa.large_binary(), "label": pa.int8(), "notes": pa.list_(pa.string())}
MEMBERS = pa.schema([(f.name, BYTES_TYPES.get(f.name, pa.string())) for f in dataclasses.fields(Member)])


@dataclass(frozen=True, slots=True)
class Reading:
    """How an archive is read in Ray tasks.

    Attributes:
        archive: open.
        source: the job's words about it.
        chunk_images: images of a chunk, at most.
        chunk_bytes: encoded bytes after which a chunk is closed.
        readers: tasks that read at the same time.
        consumers: workers that chunks wait for.
    """

    archive: Archive
    source: SourceSpec
    chunk_images: int
    chunk_bytes: int
    readers: int
    consumers: int

    def tables(self, table: pa.Table) -> Iterator[pa.Table]:
        """One table of one row for every chunk of the shards in `table`; runs in a Ray task."""
        for row in table.to_pylist():
            shard = row_shard(row)
            try:
                for chunk in read_chunks(self.archive, shard, self.source, self.chunk_images, self.chunk_bytes):
                    yield pack_chunk(chunk)
            except RaydetectError as error:
                yield pack_chunk(Chunk(shard.index, 0, False, ()), error)


def chunk_dataset(reading: Reading, shards: Sequence[Shard]) -> Dataset:
    """A lazy dataset with one row for each chunk of `shards`."""
    context = DataContext.get_current()
    context.target_max_block_size = 1  # a chunk is handed on as soon as it is read
    context.execution_options.resource_limits = limits(reading)
    rows = [shard_row(shard) for shard in shards]
    listed = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    return listed.map_batches(
        reading.tables,
        batch_format="pyarrow",
        batch_size=1,
        compute=TaskPoolStrategy(size=reading.readers),
        num_cpus=0,  # reading waits for the network; all CPU slots belong to the workers
    )


def limits(reading: Reading) -> ExecutionResources:
    """Bytes that may wait in the object store.

    Without a limit readers run ahead until they fill it, and a large archive takes more memory.
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
    """The shard of `shard_row`."""
    words = dict(row)
    start, stop, left_out = words.pop("start"), words.pop("stop"), _left_out(words.pop("left_out"))
    return Shard(**words, left_out=left_out, span=None if start == -1 else (start, stop))  # type: ignore[arg-type]


def _left_out(text: object) -> dict[str, LeftOut]:
    return left_out_of(json.loads(str(text)))


def pack_chunk(chunk: Chunk, error: RaydetectError | None = None) -> pa.Table:
    """A chunk, or why there is none, as a table of one row."""
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
    """The chunks of `pack_chunk` tables.

    Raises:
        RaydetectError: what ended the reading, such as a bad shard, and the source says `fail`; or the storage failed.
    """
    for i in range(table.num_rows):
        if table["error"][i].as_py():
            raise error_of(table["error"][i].as_py())
        with pa.ipc.open_stream(table["members"][i].as_buffer()) as reader:
            members = tuple(
                Member(**{**words, "notes": tuple(words["notes"])}) for words in reader.read_all().to_pylist()
            )
        numbers = (table["shard"][i].as_py(), table["number"][i].as_py(), table["last"][i].as_py())
        yield Chunk(*numbers, members, _left_out(table["left_out"][i].as_py()))
