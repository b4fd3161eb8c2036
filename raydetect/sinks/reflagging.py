"""Rewrites the flags of committed rows by a new rule, without scoring.

Order of a reflag, of which a killed one is continued by the same command: `manifest.json` is removed; `run.json` gets
the new rule and the entry `reflagging`, from which on nothing but a reflag reads or writes the rows; every shard gets
its parts and then its record; `run.json` loses `reflagging`; `manifest.json` is written. A part is replaced as a whole
and gives the same bytes when it is done twice, so a part that is newer than its record is not damaged.
"""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydetect.errors import DamagedError, ResumeError
from raydetect.records import OK, Part, Receipt
from raydetect.sinks.ledger import Ledger, repair_hint
from raydetect.sinks.parquet import encode_table, undecided_p_values
from raydetect.sinks.scored_chunk import SCHEMA
from raydetect.storage import join_uri

UNDER_WAY, DONE = "reflagging", "reflagged"  # entries of run.json


def refuse_under_way(uri: str, run: Mapping[str, Any] | None) -> None:
    """Refuses results of which some rows have the flags of an old rule, and some those of a new one.

    Raises:
        ResumeError: a reflag was interrupted or is running.
    """
    if run is not None and UNDER_WAY in run:
        raise ResumeError(
            f"{uri}: a reflag is running or was interrupted, so that its rows have the flags of two rules. "
            f"`raydetect reflag {shlex.quote(uri)}` continues it."
        )


def check_parts(ledger: Ledger, receipt: Receipt) -> None:
    """Compares the Parquet files of a shard with its record, before anything is rewritten.

    Raises:
        DamagedError: one is not the one of its record.
        StorageError: one cannot be read.
    """
    for part in receipt.parts:
        uri = join_uri(ledger.uri, part.path)
        if hashlib.sha256(ledger.storage.read(uri)).hexdigest() != part.sha256:
            raise DamagedError(f"{uri}: is damaged (its sha256 differs from its record). {repair_hint(ledger.uri)}")


def rewrite_shard(ledger: Ledger, receipt: Receipt, limits: Mapping[str | None, float | None], run: str) -> Receipt:
    """Rewrites the parts of a shard, then its record; returns the new record.

    Args:
        ledger: ledger of the results directory.
        receipt: the record of the shard.
        limits: lowest flagged image score by the digest of the artifact, under None for all others; None where rows
            are not flagged one by one.
        run: digest of what determines the rows under the new rule.

    Raises:
        DamagedError: a part is not the one of its record.
        StorageError: a file cannot be read or written.
    """
    parts = tuple(_rewrite_part(ledger, part, limits) for part in receipt.parts)
    rewritten = replace(receipt, run=run if receipt.run else "", parts=parts)  # "": of an older version, without spans
    if rewritten != receipt:
        ledger.write_receipt(rewritten)
    return rewritten


def _rewrite_part(ledger: Ledger, part: Part, limits: Mapping[str | None, float | None]) -> Part:
    uri = join_uri(ledger.uri, part.path)
    old = ledger.storage.read(uri)
    try:
        stored = pq.ParquetFile(pa.BufferReader(old)).read()
        # Parquet names the items of lists differently; parts of older versions have fewer columns
        table = reflagged(stored.cast(pa.schema([SCHEMA.field(name) for name in stored.column_names])), limits)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(uri, type(error).__name__) from None
    new = encode_table(table)
    if hashlib.sha256(old).hexdigest() != part.sha256 and new != old:
        raise _damaged(uri, "its sha256 differs from its record")
    if new != old:
        ledger.storage.write(uri, new)
    return replace(
        part,
        sha256=hashlib.sha256(new).hexdigest(),
        bytes=len(new),
        flagged=pc.sum(table["flagged"]).as_py() or 0,
        p_counts=undecided_p_values(table),
    )


def _damaged(uri: str, reason: str) -> DamagedError:
    return DamagedError(f"{uri}: was damaged during the reflag ({reason}). Restore it, or score into another sink.uri.")


def reflagged(table: pa.Table, limits: Mapping[str | None, float | None]) -> pa.Table:
    """The rows with `threshold` and `flagged` of a new rule; all other columns are as they were scored.

    Args:
        table: rows with all columns.
        limits: see `rewrite_shard`.
    """
    threshold = pa.nulls(table.num_rows, pa.float64())
    others = limits.get(None)
    if others is not None:
        threshold = pa.array([others] * table.num_rows, pa.float64())
    for digest, limit in limits.items():
        if digest is not None and limit is not None:
            mine = pc.equal(table["artifact"], digest)
            threshold = pc.if_else(mine, pa.scalar(limit, pa.float64()), threshold)
    is_scored = pc.equal(table["status"], OK)
    threshold = pc.if_else(is_scored, threshold, pa.scalar(None, pa.float64()))
    flagged = pc.greater_equal(table["image_score"], threshold)
    for name, column in (("threshold", threshold), ("flagged", flagged)):
        index = table.column_names.index(name)
        table = table.set_column(index, table.schema.field(name), column)
    return table
