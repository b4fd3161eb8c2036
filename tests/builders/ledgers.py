"""Ledgers with records of older versions of raydetect or of other jobs."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raydetect.records import Chunk, Part, Row
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.parquet import ResultsSink


def rewrite_record(ledger: Ledger, shard: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Modifies the record of a shard in place."""
    uri = f"{ledger.uri}/ledger/{shard:05d}.json"
    body = json.loads(ledger.storage.read(uri))
    change(body)
    ledger.storage.write(uri, json.dumps(body).encode())


def write_part(sink: ResultsSink, chunk: Chunk, rows: Sequence[Row], pictures: Mapping[int, bytes]) -> Part:
    """Writes a chunk as a part of its own."""
    return sink.write_part(chunk.number, [sink.write(chunk, rows, pictures)])


def make_old(ledger: Ledger) -> None:
    """Removes fields that records of the first release of raydetect 0.1.0 did not have."""

    def remove_fields(body: dict[str, Any]) -> None:
        del body["run"], body["span"]
        for part in body["parts"]:
            zips = part.pop("zips")
            part["heatmap_path"] = zips[0]["path"] if zips else ""
            part["chunk"] = f"{shard:05d}-{part['number']:04d}"
            del part["heatmap_sha256"], part["bytes"], part["heatmap_bytes"]

    for shard in ledger.committed():
        rewrite_record(ledger, shard, remove_fields)
