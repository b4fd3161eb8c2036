"""Shards as JSON, for plans that outlive a listing."""

import base64
from collections.abc import Mapping
from typing import Any

from raydetect.config.validation import to_plain
from raydetect.left_out import left_out_of
from raydetect.records import Shard


def plain_shard(shard: Shard) -> dict[str, Any]:
    """The JSON of a shard, without its index."""
    return {
        "uri": shard.uri,
        "format": shard.format,
        "size_bytes": shard.size_bytes,
        "fingerprint": shard.fingerprint,
        "span": None if shard.span is None else list(shard.span),
        "listing": base64.b64encode(shard.listing).decode(),
        "left_out": to_plain(shard.left_out),
        "index_uri": shard.index_uri,
    }


def shard_of(index: int, fields: Mapping[str, Any]) -> Shard:
    """The shard of such JSON.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    span = fields["span"]
    return Shard(
        index,
        str(fields["uri"]),
        str(fields["format"]),
        int(fields["size_bytes"]),
        str(fields["fingerprint"]),
        None if span is None else (int(span[0]), int(span[1])),
        base64.b64decode(fields["listing"]),
        left_out_of(fields.get("left_out", {})),
        str(fields.get("index_uri", "")),
    )
