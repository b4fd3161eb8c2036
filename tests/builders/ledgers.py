"""Ledgers as they may be found: records of an older raydetect, records of other jobs."""

import json
from collections.abc import Callable
from typing import Any

from raydetect.sinks.ledger import Ledger


def rewrite_record(ledger: Ledger, shard: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the record of a shard in place."""
    place = f"{ledger.uri}/ledger/{shard:05d}.json"
    body = json.loads(ledger.storage.read(place))
    change(body)
    ledger.storage.write(place, json.dumps(body).encode())


def make_old(ledger: Ledger) -> None:
    """Leaves out what records of raydetect 0.1.0 as first published did not hold."""

    def older(body: dict[str, Any]) -> None:
        del body["run"], body["span"]
        for part in body["parts"]:
            del part["heatmap_sha256"], part["bytes"], part["heatmap_bytes"]

    for shard in ledger.committed():
        rewrite_record(ledger, shard, older)
