"""Compares an archive with what was scored of it, and plans shards of only what is new (`--accept-new`).

Committed shards keep their numbers and rows. Loose images are told apart by their keys, containers by their URIs. New
shards take the free numbers in the order of the listing; `shards.json` in the results directory keeps the plan, so that
the same job without the flag continues it while the archive stays as it is.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raydetect.archives.formats.loose_files import Line, cut_lines, key_of_line, lines_of, shard_of_lines
from raydetect.archives.path_patterns import Naming
from raydetect.archives.stored_shards import plain_shard, shard_of
from raydetect.config import SourceSpec
from raydetect.errors import DamagedError, ResumeError
from raydetect.left_out import WITHDRAWN
from raydetect.records import Receipt, Shard
from raydetect.sinks.consistency import names_text
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.rows import read_part
from raydetect.storage import Storage, join_uri

ACCEPTED, STORED, NAMED = "accepted", "shards.json", 5


@dataclass(slots=True)
class Change:
    """How an archive differs from what was scored of it.

    Attributes:
        new: URIs of images and containers that were not scored.
        gone: of scored ones that are not there any more.
        changed: of those whose content is another one now.
        shards: the committed shards and those of what is new, without gaps in their numbers.
    """

    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    shards: tuple[Shard, ...] = ()

    def text(self) -> str:
        """`2 new (a, b), 1 gone (c)`; "" without a difference."""
        kinds = (("new", self.new), ("gone", self.gone), ("with other content", self.changed))
        return ", ".join(f"{len(names):,} {kind} ({names_text(names)})" for kind, names in kinds if names)

    def plain(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """The entry of `run.json` and the manifest, after an earlier one."""
        return {
            "new": len(self.new) + int(earlier.get("new", 0)),
            "gone": {"count": len(self.gone), "names": self.gone[:NAMED]},
        }


class _Listing:
    """The listing by what tells shards apart: place for containers, key for loose images."""

    def __init__(self, shards: Sequence[Shard], naming: Naming) -> None:
        self.shards = shards
        self.containers = {(shard.uri, shard.span): shard for shard in shards if shard.format != "prefix"}
        self.lines: dict[str, dict[str, Line]] = {}
        for shard in shards:
            if shard.format == "prefix":
                of_root = self.lines.setdefault(shard.uri, {})
                of_root |= {key_of_line(shard.uri, line): line for line in lines_of(shard)}
        self._naming, self.known = naming, set[str]()

    def is_new(self, key: str, line: Line) -> bool:
        """Whether an image has no row and would get one."""
        return key not in self.known and self._naming.read(str(line[0])) is not None


def compare(
    ledger: Ledger, committed: Iterable[int], listed: Sequence[Shard], source: SourceSpec, content: Storage | None
) -> Change:
    """Compares the listing with the committed shards.

    Args:
        ledger: ledger of the results directory.
        committed: indexes of committed shards.
        listed: shards of the archive as it is now.
        source: settings of the source.
        content: storage of the source, to read loose images of which the listing cannot prove that they are the scored
            ones and compare their sha256; None = their content is not compared.

    Raises:
        StorageError: a record, a part or an image cannot be read.
    """
    listing, change = _Listing(listed, Naming.of(source)), Change()
    kept = {}
    for receipt in ledger.receipts(committed):
        if receipt.uri in listing.lines and (receipt.uri, receipt.span) not in listing.containers:
            kept[receipt.shard] = _kept_loose(ledger, receipt, listing, change, content)
        else:
            kept[receipt.shard] = _kept_container(receipt, listing, change)
    new = list(_new_shards(listing, kept.values(), source, change))
    numbers = (number for number in range(len(kept) + len(new) + max(kept, default=0) + 1) if number not in kept)
    placed = {number: replace(shard, index=number, left_out={}) for number, shard in zip(numbers, new, strict=False)}
    change.shards = tuple(shard for _, shard in sorted((kept | placed).items()))
    return change


def _kept_container(receipt: Receipt, listing: _Listing, change: Change) -> Shard:
    found = listing.containers.get((receipt.uri, receipt.span))
    if found is None:
        change.gone.append(receipt.uri)
        return Shard(receipt.shard, receipt.uri, WITHDRAWN, 0, receipt.fingerprint, receipt.span)
    if found.fingerprint != receipt.fingerprint:
        change.changed.append(receipt.uri)
    return replace(found, index=receipt.shard, left_out={})


def _kept_loose(ledger: Ledger, receipt: Receipt, listing: _Listing, change: Change, content: Storage | None) -> Shard:
    lines, sha256_by_key = listing.lines[receipt.uri], _scored(ledger, receipt)
    listing.known |= sha256_by_key.keys()
    change.gone += [key for key in sha256_by_key if key not in lines]
    present = {key: line for key, line in lines.items() if key in sha256_by_key}
    shard = shard_of_lines(receipt.uri, list(present.values()))
    if shard.fingerprint != receipt.fingerprint and content is not None:
        for key, line in present.items():
            if sha256_by_key[key] not in ("", _sha256(content, receipt.uri, line)):
                change.changed.append(key)
    return replace(shard, index=receipt.shard, fingerprint=receipt.fingerprint)


def _sha256(storage: Storage, root: str, line: Line) -> str:
    return hashlib.sha256(storage.read(join_uri(root, str(line[0])))).hexdigest()


def _scored(ledger: Ledger, receipt: Receipt) -> dict[str, str]:
    """The sha256 of the images of a shard by key; "" where they could not be read."""
    found: dict[str, str] = {}
    for part in receipt.parts:
        table = read_part(ledger, part, ("key", "sha256"))
        found |= dict(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    return found


def _new_shards(listing: _Listing, kept: Iterable[Shard], source: SourceSpec, change: Change) -> Iterator[Shard]:
    """Yields shards of what was not scored, in the order of the listing, with any index."""
    places, roots = {(shard.uri, shard.span) for shard in kept if shard.format != "prefix"}, set[str]()
    for shard in listing.shards:
        if shard.format != "prefix" and (shard.uri, shard.span) not in places:
            change.new.append(shard.uri)
            yield shard
        elif shard.format == "prefix" and shard.uri not in roots:
            roots.add(shard.uri)
            lines = {key: line for key, line in listing.lines[shard.uri].items() if listing.is_new(key, line)}
            change.new += lines
            yield from cut_lines(shard.uri, list(lines.values()), source)


def refuse_changed(ledger: Ledger, change: Change) -> None:
    """Refuses an archive in which scored images have other content now.

    Raises:
        ResumeError: names the first ones.
    """
    if change.changed:
        raise ResumeError(
            f"{ledger.uri}: --accept-new keeps the rows of what was scored, but {len(change.changed):,} of it have "
            f"other content now ({names_text(change.changed)}). Use another sink.uri."
        )


def write_shards(ledger: Ledger, archive: str, shards: Sequence[Shard], accepted: Mapping[str, Any]) -> None:
    """Keeps the shards of a run that has accepted new images.

    Args:
        ledger: ledger of the results directory.
        archive: fingerprint of the listing they belong to.
        shards: of the run.
        accepted: see `Change.plain`.
    """
    body = {"archive": archive, "accepted": accepted, "shards": [plain_shard(shard) for shard in shards]}
    ledger.storage.write(join_uri(ledger.uri, STORED), json.dumps(body, indent=1, sort_keys=True).encode())


def read_shards(ledger: Ledger, archive: str) -> tuple[tuple[Shard, ...], dict[str, Any]] | None:
    """The kept shards and the entry `accepted`; None if there are none, or they belong to another listing.

    Raises:
        DamagedError: the file is damaged.
    """
    uri = join_uri(ledger.uri, STORED)
    if not ledger.storage.exists(uri):
        return None
    try:
        body = json.loads(ledger.storage.read(uri))
        shards = tuple(shard_of(index, fields) for index, fields in enumerate(body["shards"]))
        return (shards, dict(body["accepted"])) if body["archive"] == archive else None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{uri}: is damaged ({type(error).__name__}). Restore it or use another sink.uri.") from None
