"""Ledgers with records of older versions of raydetect or of other jobs."""

import json
from collections.abc import Callable
from typing import Any

from raydetect.sinks.ledger import Ledger


def rewrite_record(ledger: Ledger, shard: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Modifies the record of a shard in place."""
    uri = f"{ledger.uri}/ledger/{shard:05d}.json"
    body = json.loads(ledger.storage.read(uri))
    change(body)
    ledger.storage.write(uri, json.dumps(body).encode())


def make_old(ledger: Ledger) -> None:
    """Removes fields that records of the first release of raydetect 0.1.0 did not have."""

    def remove_fields(body: dict[str, Any]) -> None:
        del body["run"], body["span"]
        for part in body["parts"]:
            del part["heatmap_sha256"], part["bytes"], part["heatmap_bytes"]

    for shard in ledger.committed():
        rewrite_record(ledger, shard, remove_fields)
