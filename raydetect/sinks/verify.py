"""Verifies a results directory by reading every file once and comparing it with its record.

Memory: 16 bytes for every row with a score (a digest of its key), the names of all files below `scores/` and
`heatmaps/`, and the bytes of at most `READERS` chunks with their heatmaps.
"""

import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.errors import DamagedError, MissingError, SpecError
from raydetect.records import OK, HeatmapZip, Part, Receipt
from raydetect.sinks.archive_flags import archive_flags
from raydetect.sinks.consistency import NAMED, listed_files, named_files, names_text, rows_digest
from raydetect.sinks.ledger import Ledger, Totals, repair_hint
from raydetect.sinks.reflagging import refuse_under_way
from raydetect.storage import join_uri
from raydetect.storage.read_ahead import read_ahead

READERS = 8
DIGEST_BYTES = 16
COLUMNS = ["key", "status", "flagged"]
NEW_SUMS = ("regions", "regions_left_out", "close_ups")  # missing in manifests of older versions
KINDS = {
    "run": "run.json is missing or damaged, so the job is unknown",
    "missing_records": "ledger records that are missing although manifest.json exists",
    "damaged_records": "ledger records that are damaged",
    "foreign_records": "ledger records of another job",
    "missing_files": "files that are missing",
    "changed_files": "files whose sha256 differs from their record",
    "broken_files": "files that are not valid Parquet parts or zips",
    "counts": "files whose counts differ from their record",
    "keys": "keys of more than one scored row",
    "manifest": "sums in manifest.json that differ from the records",
}
ProgressCallback = Callable[[str, int, int | None], None]
Damage = tuple[str, str]  # kind, name of the damaged file or entry


@dataclass(slots=True)
class DamageCount:
    """Damage of one kind: count and first names."""

    count: int = 0
    names: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Verification:
    """State of a results directory.

    Attributes:
        uri: the results directory.
        num_shards: number of shards of the job; 0 if run.json is missing.
        finished: whether the manifest and the records of all shards exist.
        shards: number of ledger records that were read.
        parts: number of Parquet parts.
        heatmap_zips: number of heatmap zips.
        rows: number of rows.
        unnamed: number of files that no record names, of killed or running jobs.
        damage: damage by kind; empty if there is none.
        damaged: indexes of shards whose records must be removed, so that they are scored again.
    """

    uri: str
    num_shards: int = 0
    finished: bool = False
    shards: int = 0
    parts: int = 0
    heatmap_zips: int = 0
    rows: int = 0
    unnamed: int = 0
    damage: dict[str, DamageCount] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether no damage was found."""
        return not self.damage

    def add(self, kind: str, name: str, shard: int | None = None) -> None:
        """Adds damage, and the shard that must be scored again."""
        damage = self.damage.setdefault(kind, DamageCount())
        damage.count += 1
        if damage.count <= NAMED:
            damage.names.append(name)
        if shard is not None:
            self.damaged.add(shard)

    def plain(self) -> dict[str, Any]:
        """Returns the state as a JSON object."""
        return {
            "uri": self.uri,
            "whole": self.whole,
            "finished": self.finished,
            "num_shards": self.num_shards,
            "shards": self.shards,
            "parts": self.parts,
            "heatmap_zips": self.heatmap_zips,
            "rows": self.rows,
            "unnamed_files": self.unnamed,
            "damage": {kind: {"count": damage.count, "first": damage.names} for kind, damage in self.damage.items()},
            "damaged_shards": sorted(self.damaged),
        }

    def lines(self, repaired: bool = False) -> list[str]:
        """Formats the state as lines of text.

        Args:
            repaired: whether the records of damaged shards were removed.
        """
        lines = [
            KINDS[kind] + ("" if kind == "run" else f": {damage.count:,} ({names_text(damage.names, damage.count)})")
            for kind, damage in self.damage.items()
        ]
        if self.unnamed:
            lines.append(f"files that no record names: {self.unnamed:,} (of killed runs; they are ignored)")
        if self.num_shards and not self.finished:
            lines.append(f"The run is not finished: {self.shards:,} of {self.num_shards:,} shards are committed.")
        what = f"{self.shards:,} shards, {self.parts:,} parts, {self.heatmap_zips:,} heatmap zips"
        if self.whole:
            return [*lines, f"{what}: all intact."]
        if repaired:
            removed = f"manifest.json and the ledger records of {len(self.damaged):,} shards were removed"
            return [*lines, f"{what}: {removed}. Start the same job again to restore what is missing."]
        message = f"{len(self.damaged):,} shards are damaged" if self.damaged else "not all intact"
        return [*lines, f"{what}: {message}. {repair_hint(self.uri)}"]


def verify(ledger: Ledger, on_progress: ProgressCallback) -> Verification:
    """Reads every record, part and heatmap zip, and compares sha256 and counts with those recorded on writing.

    Args:
        ledger: ledger of the results directory.
        on_progress: called after each shard.

    Raises:
        MissingError: no run was started there.
        ResumeError: a reflag is running or was interrupted.
        StorageError: the storage failed.
    """
    verification = Verification(ledger.uri)
    committed = sorted(ledger.committed())
    run = _run(ledger, bool(committed), verification)
    refuse_under_way(ledger.uri, run)
    manifest = _manifest(ledger, verification)
    verification.finished = manifest is not None
    _check_run(run, committed, verification)
    files, keys, totals = listed_files(ledger), bytearray(), Totals()
    flags = archive_flags(manifest)
    for shard in read_ahead(partial(_read_shard, ledger), committed, READERS):
        on_progress("verify shards", 1, len(committed))
        for kind, name in shard.damage:
            verification.add(kind, name, shard.index)
        if shard.receipt is None:
            continue
        keys += shard.keys
        _check_record(shard.receipt, run, verification)
        totals.add(shard.receipt if flags is None else flags.apply_to_receipt(shard.receipt))
        for part in shard.receipt.parts:
            for path, _ in named_files(part):
                files.pop(path, None)
    verification.unnamed = len(files)
    _check_keys(ledger, committed, keys, verification)
    _check_sums(run, manifest, totals, verification)
    verification.shards, verification.parts, verification.rows = totals.shards, totals.parts, totals.rows
    return verification


def repair(ledger: Ledger, verification: Verification) -> None:
    """Removes damaged records, so that the same job writes them again; unnamed files stay.

    Raises:
        StorageError: a file cannot be removed.
    """
    ledger.withdraw(sorted(verification.damaged))
    if "run" in verification.damage:
        ledger.forget()


def _run(ledger: Ledger, has_records: bool, verification: Verification) -> dict[str, Any] | None:
    try:
        run = ledger.run()
    except DamagedError:
        verification.add("run", "run.json")
        return None
    if run is None and not has_records:
        raise ledger.no_run()
    if run is None:
        verification.add("run", "run.json")
    return run


def _manifest(ledger: Ledger, verification: Verification) -> dict[str, Any] | None:
    try:
        return ledger.manifest()
    except DamagedError:
        verification.add("manifest", "the file is damaged")
        return None


def _check_run(run: Mapping[str, Any] | None, committed: Iterable[int], verification: Verification) -> None:
    """Checks that a finished run has a record of each of its shards, and no others."""
    if run is None:
        return
    verification.num_shards = int(run["num_shards"])
    recorded = set(committed)
    if verification.finished:
        for index in range(verification.num_shards):
            if index not in recorded:
                verification.add("missing_records", _record(index))
        verification.finished = "missing_records" not in verification.damage
    for index in sorted(recorded):
        if index >= verification.num_shards:
            verification.add("foreign_records", _record(index), index)


def _check_record(receipt: Receipt, run: Mapping[str, Any] | None, verification: Verification) -> None:
    """Checks that a record belongs to the job and that its parts form a complete shard."""
    name = _record(receipt.shard)
    if run is not None and receipt.run not in ("", rows_digest(run)):
        verification.add("foreign_records", name, receipt.shard)
    statuses: Counter[str] = Counter()
    for part in receipt.parts:
        statuses.update(part.statuses)
    numbers = [(part.shard, part.number, part.last) for part in receipt.parts]
    last = len(numbers) - 1
    expected = [(receipt.shard, number, number == last) for number in range(len(numbers))]
    rows = sum(part.rows for part in receipt.parts)
    if not numbers or numbers != expected or rows != receipt.rows or statuses != Counter(receipt.statuses):
        verification.add("damaged_records", name, receipt.shard)
    verification.heatmap_zips += sum(len(part.heatmap_zips) for part in receipt.parts)


def _record(index: int) -> str:
    return f"ledger/{index:05d}.json"


@dataclass(slots=True)
class _Shard:
    """What was read of one shard; `keys` holds digests of the keys of its scored rows."""

    index: int
    receipt: Receipt | None = None
    keys: bytearray = field(default_factory=bytearray)
    damage: list[Damage] = field(default_factory=list)


def _read_shard(ledger: Ledger, index: int) -> _Shard:
    shard = _Shard(index)
    try:
        shard.receipt = ledger.receipt(index)
    except (DamagedError, MissingError):
        shard.damage.append(("damaged_records", _record(index)))
        return shard
    for part in shard.receipt.parts:
        data = _verified(ledger, part.path, part.sha256, shard.damage)
        if data is not None:
            shard.damage += _check_rows(part, data, shard.keys)
        for one in part.heatmap_zips:
            shard.damage += _check_heatmaps(ledger, one)
        if part.heatmaps + part.close_ups != sum(one.pictures for one in part.heatmap_zips):
            shard.damage.append(("counts", part.path))
    return shard


def _verified(ledger: Ledger, path: str, sha256: str, damage: list[Damage]) -> bytes | None:
    """Reads a file; adds to `damage` and returns None if it is missing or its sha256 differs."""
    try:
        data = ledger.storage.read(join_uri(ledger.uri, path))
    except (MissingError, SpecError):  # a tampered record may contain an invalid path
        damage.append(("missing_files", path))
        return None
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        damage.append(("changed_files", path))
        return None
    return data


def _check_rows(part: Part, data: bytes, keys: bytearray) -> list[Damage]:
    """Compares the rows of a part with its record and adds digests of their keys to `keys`."""
    table = _table(data)
    if table is None:
        return [("broken_files", part.path)]
    statuses = Counter(table["status"].to_pylist())
    flagged = sum(value is True for value in table["flagged"].to_pylist())
    keys += b"".join(_digest(key) for key in _scored_keys(table))
    same = (table.num_rows, statuses, flagged) == (part.rows, Counter(part.statuses), part.flagged)
    return [] if same else [("counts", part.path)]


def _check_heatmaps(ledger: Ledger, zipped: HeatmapZip) -> list[Damage]:
    """Compares a zip with its record; checks the CRCs of zips without sha256, written by an older raydetect."""
    damage: list[Damage] = []
    data = _verified(ledger, zipped.path, zipped.sha256, damage)
    if data is None:
        return damage
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as pictures:
            broken = not zipped.sha256 and pictures.testzip() is not None
            count = len(pictures.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return [("broken_files", zipped.path)]
    if broken:
        return [("broken_files", zipped.path)]
    return [] if count == zipped.pictures else [("counts", zipped.path)]


def _table(data: bytes) -> pa.Table | None:
    # Read from memory: Arrow's threads may keep a Python file open until after interpreter shutdown, which aborts.
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read(columns=COLUMNS)
    except (pa.ArrowException, OSError, KeyError):
        return None


def _scored_keys(table: pa.Table) -> Iterator[str]:
    """Keys of rows with a score; other rows, such as those of status `duplicate_key`, may repeat a key."""
    pairs = zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
    return (key for key, status in pairs if status == OK)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _check_keys(ledger: Ledger, committed: Sequence[int], keys: bytearray, verification: Verification) -> None:
    """Adds repeated keys to `verification`; reads the parts a second time to name them, only if there are any."""
    keys_N = np.frombuffer(keys, dtype=f"S{DIGEST_BYTES}")
    keys_N.sort()
    repeated = {_padded(key) for key in np.unique(keys_N[1:][keys_N[1:] == keys_N[:-1]]).tolist()}
    if not repeated:
        return
    rows_by_digest: dict[bytes, list[tuple[str, int]]] = {}
    for index in committed:
        for part in _parts(ledger, index):
            table = _table(_verified(ledger, part.path, part.sha256, []) or b"")
            for key in () if table is None else _scored_keys(table):
                if (digest := _digest(key)) in repeated:
                    rows_by_digest.setdefault(digest, []).append((key, index))
    for rows in rows_by_digest.values():
        verification.add("keys", rows[0][0])
        verification.damaged |= {index for _, index in rows}


def _padded(digest: bytes) -> bytes:
    return digest.ljust(DIGEST_BYTES, b"\0")  # numpy strips trailing zero bytes


def _parts(ledger: Ledger, index: int) -> tuple[Part, ...]:
    try:
        return ledger.receipt(index).parts
    except (DamagedError, MissingError):
        return ()


def _check_sums(
    run: Mapping[str, Any] | None, manifest: Mapping[str, Any] | None, totals: Totals, verification: Verification
) -> None:
    """Compares the manifest with the sums of the records, unless other damage explains differences."""
    explained = {"missing_records", "damaged_records", "foreign_records"} & set(verification.damage)
    if manifest is None or run is None or explained:
        return
    if manifest.get("result") not in (None, run["result"]):
        verification.add("manifest", "result belongs to another job")
    for name, value in totals.plain().items():
        if manifest.get(name, 0 if name in NEW_SUMS else None) != value:
            verification.add("manifest", f"{name} is {manifest.get(name)}, but {value} in the records")
