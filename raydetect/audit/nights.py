"""The folder of all audits: which shards each night covers, and what is known of the nights that are finished.

claims/00012.json        shards of the night; written first, so that a killed audit goes on with the same ones
nights/00012/results/    an ordinary results directory
nights/00012/report.html
statistics/00012.json    counts and distributions, to compare later nights with
summaries/00012.json     the audit, for machines; written last: the night is finished
webhooks/00012.json      the webhook was told
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raydetect.config.validation import to_plain
from raydetect.errors import ResumeError, StorageError
from raydetect.left_out import WITHDRAWN, left_out_of
from raydetect.records import LeftOut, Shard
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage, join_uri

FORMAT_VERSION = 1
RECORD = re.compile(r"/(\d{5,})\.json$")
ShardKey = tuple[str, tuple[int, int] | None, str]


@dataclass(frozen=True, slots=True)
class Claim:
    """What one night covers.

    Attributes:
        number: 1 for the first.
        night: its name.
        shards: numbered from 0.
    """

    number: int
    night: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Nights:
    """Reads and writes the records of all audits of one job. One audit at a time may run in a folder."""

    uri: str
    storage: Storage

    def numbers(self, kind: str) -> list[int]:
        """Numbers of the nights that have a record of a kind, ascending."""
        folder = join_uri(self.uri, kind)
        if not self.storage.exists(folder):
            return []
        found = (RECORD.search(file.uri) for file in self.storage.list(folder))
        return sorted(int(name.group(1)) for name in found if name)

    def claims(self) -> list[Claim]:
        """All claims, in order.

        Raises:
            StorageError, ResumeError: a record is damaged, or of a newer format.
        """
        return [self._claim(number) for number in self.numbers("claims")]

    def claim(self, night: str, shards: Sequence[Shard], number: int) -> Claim:
        """Gives shards to a new night."""
        made = Claim(number, night, tuple(replace(shard, index=place) for place, shard in enumerate(shards)))
        body = {"number": number, "night": night, "shards": [_plain(shard) for shard in made.shards]}
        self.write("claims", number, body)
        return made

    def without_changed(self, claim: Claim, listed: Sequence[Shard]) -> Claim:
        """The claim of a night that is not finished, less what was deleted or overwritten before it was scored.

        Such a shard keeps its place, which names files, and gives no row; what is there now is for the next night.

        Args:
            claim: of the night.
            listed: what the archive holds now.
        """
        committed = Ledger(self.results_uri(claim.number), self.storage).committed()
        there = {shard_key(shard) for shard in listed}
        kept = [
            shard if shard.index in committed or shard_key(shard) in there else _withdrawn(shard)
            for shard in claim.shards
        ]
        return claim if tuple(kept) == claim.shards else self.claim(claim.night, kept, claim.number)

    def results_uri(self, number: int) -> str:
        """The results directory of a night."""
        return join_uri(self.uri, "nights", f"{number:05d}", "results")

    def report_uri(self, number: int) -> str:
        """The report of a night."""
        return join_uri(self.uri, "nights", f"{number:05d}", "report.html")

    def record_uri(self, kind: str, number: int) -> str:
        """Where a record lies."""
        return join_uri(self.uri, kind, f"{number:05d}.json")

    def read(self, kind: str, number: int) -> dict[str, Any] | None:
        """A record, None when it is not there.

        Raises:
            StorageError, ResumeError: it is damaged, or of a newer format.
        """
        place = self.record_uri(kind, number)
        if not self.storage.exists(place):
            return None
        try:
            body = json.loads(self.storage.read(place))
            version = int(body["format_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(place, error) from None
        if version != FORMAT_VERSION:
            raise ResumeError(
                f"{place}: has format {version}, this raydetect reads {FORMAT_VERSION}. Update raydetect or use "
                "another sink.uri."
            )
        return dict(body)

    def write(self, kind: str, number: int, body: Mapping[str, Any]) -> None:
        """Writes a record, the same bytes for the same content."""
        text = json.dumps({"format_version": FORMAT_VERSION, **body}, indent=1, sort_keys=True, allow_nan=False)
        self.storage.write(self.record_uri(kind, number), text.encode())

    def _claim(self, number: int) -> Claim:
        body = self.read("claims", number)
        try:
            assert body is not None
            shards = tuple(_shard(place, words) for place, words in enumerate(body["shards"]))
            return Claim(int(body["number"]), str(body["night"]), shards)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            place = self.record_uri("claims", number)
            raise _damaged(place, error) from None


def _damaged(place: str, error: Exception) -> StorageError:
    return StorageError(f"{place}: is damaged ({type(error).__name__}). Restore it or use another sink.uri.")


def shard_key(shard: Shard) -> ShardKey:
    """What makes a shard the same one: where it is, which part, and what is in it."""
    return shard.uri, shard.span, shard.fingerprint


def unclaimed(shards: Sequence[Shard], claims: Sequence[Claim]) -> list[Shard]:
    """The shards of a listing that no night covers."""
    taken = {shard_key(shard) for claim in claims for shard in claim.shards}
    return [shard for shard in shards if shard_key(shard) not in taken]


def _withdrawn(shard: Shard) -> Shard:
    left_out = {**shard.left_out, WITHDRAWN: LeftOut(1, (shard.uri,))}
    return Shard(shard.index, shard.uri, WITHDRAWN, 0, WITHDRAWN, left_out=left_out)


def _plain(shard: Shard) -> dict[str, Any]:
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


def _shard(place: int, words: Mapping[str, Any]) -> Shard:
    span = words["span"]
    return Shard(
        place,
        str(words["uri"]),
        str(words["format"]),
        int(words["size_bytes"]),
        str(words["fingerprint"]),
        None if span is None else (int(span[0]), int(span[1])),
        base64.b64decode(words["listing"]),
        left_out_of(words.get("left_out", {})),
        str(words.get("index_uri", "")),
    )
