"""The folder of all audits of a job: the shards of each night, and the records of finished nights.

claims/00012.json        shards of the night; written first, so that a killed audit resumes with the same ones
nights/00012/results/    an ordinary results directory
nights/00012/report.html
statistics/00012.json    counts and distributions, to compare later nights with
summaries/00012.json     the machine-readable audit; written last: the night is finished
webhooks/00012.json      the webhook has accepted the summary
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raydetect.archives.formats.loose_files import file_keys, regroup_files
from raydetect.archives.stored_shards import plain_shard, shard_of
from raydetect.config import SourceSpec
from raydetect.errors import ResumeError, StorageError
from raydetect.left_out import WITHDRAWN
from raydetect.records import LeftOut, Shard
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage, join_uri

FORMAT_VERSION = 1
RECORD = re.compile(r"/(\d{5,})\.json$")
ShardKey = bytes | tuple[str, tuple[int, int] | None, str]


@dataclass(frozen=True, slots=True)
class Claim:
    """The shards of one night.

    Attributes:
        number: of the night, from 1.
        night: name of the night.
        shards: numbered from 0.
    """

    number: int
    night: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Nights:
    """Reads and writes the records of all audits of one job. Only one audit may run in a folder at a time."""

    uri: str
    storage: Storage

    def numbers(self, kind: str) -> list[int]:
        """Numbers of the nights that have a record of this kind, ascending."""
        folder = join_uri(self.uri, kind)
        if not self.storage.exists(folder):
            return []
        found = (RECORD.search(file.uri) for file in self.storage.list(folder))
        return sorted(int(name.group(1)) for name in found if name)

    def claims(self) -> list[Claim]:
        """All claims, in order.

        Raises:
            StorageError, ResumeError: a record is damaged or has a newer format.
        """
        return [self._claim(number) for number in self.numbers("claims")]

    def claim(self, night: str, shards: Sequence[Shard], number: int) -> Claim:
        """Writes and returns the claim of a night on these shards."""
        claim = Claim(number, night, tuple(replace(shard, index=index) for index, shard in enumerate(shards)))
        body = {"number": number, "night": night, "shards": [plain_shard(shard) for shard in claim.shards]}
        self.write("claims", number, body)
        return claim

    def without_changed(self, claim: Claim, listed: Sequence[Shard]) -> Claim:
        """The claim of an unfinished night without the shards that were deleted or overwritten before they were scored.

        Such a shard keeps its index, which file names depend on, and gives no rows; its new content goes to the next
        night.

        Args:
            claim: of the night.
            listed: shards now in the archive.
        """
        committed = Ledger(self.results_uri(claim.number), self.storage).committed()
        there = {key for shard in listed for key in shard_keys(shard)}
        kept = [
            shard if shard.index in committed or there.issuperset(shard_keys(shard)) else _withdrawn(shard)
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
        """The URI of a record."""
        return join_uri(self.uri, kind, f"{number:05d}.json")

    def read(self, kind: str, number: int) -> dict[str, Any] | None:
        """Reads a record; None if it does not exist.

        Raises:
            StorageError, ResumeError: the record is damaged or has a newer format.
        """
        uri = self.record_uri(kind, number)
        if not self.storage.exists(uri):
            return None
        try:
            body = json.loads(self.storage.read(uri))
            version = int(body["format_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(uri, error) from None
        if version != FORMAT_VERSION:
            raise ResumeError(
                f"{uri}: has format {version}, but this raydetect reads {FORMAT_VERSION}. Update raydetect or use "
                "another sink.uri."
            )
        return dict(body)

    def write(self, kind: str, number: int, body: Mapping[str, Any]) -> None:
        """Writes a record; the same content gives the same bytes."""
        text = json.dumps({"format_version": FORMAT_VERSION, **body}, indent=1, sort_keys=True, allow_nan=False)
        self.storage.write(self.record_uri(kind, number), text.encode())

    def _claim(self, number: int) -> Claim:
        body = self.read("claims", number)
        try:
            assert body is not None
            shards = tuple(shard_of(index, fields) for index, fields in enumerate(body["shards"]))
            return Claim(int(body["number"]), str(body["night"]), shards)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            uri = self.record_uri("claims", number)
            raise _damaged(uri, error) from None


def _damaged(uri: str, error: Exception) -> StorageError:
    return StorageError(f"{uri}: is damaged ({type(error).__name__}). Restore it or use another sink.uri.")


def shard_keys(shard: Shard) -> Collection[ShardKey]:
    """Identifies the content of a shard: a part of a container, or each loose image, by location and fingerprint."""
    if shard.format == "prefix":
        return file_keys(shard)
    return [(shard.uri, shard.span, shard.fingerprint)]


def unclaimed(shards: Sequence[Shard], claims: Sequence[Claim], source: SourceSpec) -> list[Shard]:
    """Returns shards of what no night has claimed: containers as listed, then loose images, regrouped.

    So a loose image is of one night, from whichever folder or glob it was listed and whatever was added beside it.
    """
    taken = {key for claim in claims for shard in claim.shards for key in shard_keys(shard)}
    containers = [shard for shard in shards if shard.format != "prefix" and taken.isdisjoint(shard_keys(shard))]
    return [*containers, *regroup_files((shard for shard in shards if shard.format == "prefix"), taken, source)]


def _withdrawn(shard: Shard) -> Shard:
    left_out = {**shard.left_out, WITHDRAWN: LeftOut(1, (shard.uri,))}
    return Shard(shard.index, shard.uri, WITHDRAWN, 0, WITHDRAWN, left_out=left_out)
