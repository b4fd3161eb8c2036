"""Whether committed shards are those of a job and of a listing, and whether their files are there."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raydetect.config.validation import digest
from raydetect.errors import IncompleteError, MissingError, ResumeError, SpecError
from raydetect.left_out import WITHDRAWN, left_out_text
from raydetect.records import PART_FILE, LeftOut, Part, Receipt, Shard
from raydetect.sinks.ledger import Ledger, Totals, repair_hint
from raydetect.storage import join_uri, normalise_uri

log = logging.getLogger("raydetect.sinks")
NAMED = 3
WRITTEN = re.compile(PART_FILE)
ASKED_BY_NAME = 100  # what a listing lacks is asked for by itself, as listings of some stores lag; no more than these


def rows_digest(run: Mapping[str, Any]) -> str:
    """Digest of what decides the rows of a job, less the archive, whose shards name themselves."""
    return digest({name: value for name, value in run["result"].items() if name != "archive"})


def names_text(names: Sequence[str], count: int | None = None) -> str:
    """The first few names: `a, b, c and 9 more`."""
    more = (len(names) if count is None else count) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def unlike(receipt: Receipt, shard: Shard) -> str:
    """How a receipt differs from the shard of its index; empty when it is the shard's."""
    if receipt.uri != shard.uri:
        return f"was {receipt.uri}, and is {shard.uri} now"
    if receipt.run and receipt.span != shard.span:
        return f"was the part {receipt.span} of {shard.uri}, and is {shard.span} now"
    if receipt.fingerprint != shard.fingerprint:
        return f"has other content now ({shard.uri})"
    return ""


def rows_with(statuses: tuple[str, ...], ledger: Ledger, committed: Iterable[int]) -> dict[int, int]:
    """Committed shards that hold rows with one of some statuses, and how many."""
    if not statuses:
        return {}
    counts = {
        receipt.shard: sum(receipt.statuses.get(status, 0) for status in statuses)
        for receipt in ledger.receipts(committed)
    }
    return {shard: count for shard, count in counts.items() if count}


def refuse_without_images(totals: Totals, where: str) -> None:
    """No manifest says that a run over nothing is finished.

    Args:
        totals: of all receipts.
        where: the source, for the message.

    Raises:
        SpecError: no shard gave a row.
    """
    withdrawn = totals.left_out.found.get(WITHDRAWN, LeftOut(0)).count
    if totals.shards > withdrawn and not totals.rows:
        told = left_out_text(totals.left_out.found) or "nothing"
        raise SpecError(f"{where}: gave no image; left out: {told}. Check source.uri, format and pattern.")


def refuse_other_shards(ledger: Ledger, committed: Iterable[int], shards: Sequence[Shard], run: str) -> None:
    """Every committed shard must be the one of its index in a new listing, and of this job.

    A receipt of an older raydetect tells no span, so its shard must be the only one of its URI.

    Args:
        ledger: of the results directory.
        committed: indexes.
        shards: the new listing.
        run: digest of what decides the rows.

    Raises:
        ResumeError: one is not; says which.
    """
    counts = Counter(shard.uri for shard in shards)
    for receipt in ledger.receipts(committed):
        name = f"{receipt.shard:05d}"
        if receipt.run not in ("", run):
            message = f"committed shard {name} is of another job, with another artifact or spec"
        elif receipt.shard >= len(shards):
            message = f"the archive has changed, and committed shard {name} ({receipt.uri}) is not in it any more"
        elif differs := unlike(receipt, shards[receipt.shard]):
            message = f"the archive has changed, and committed shard {name} {differs}"
        elif not receipt.run and counts[receipt.uri] > 1:
            message = (
                f"the archive has changed, and whether committed shard {name} of {receipt.uri} has is not recorded"
            )
        else:
            continue
        raise ResumeError(
            f"{ledger.uri}: {message}. Use another sink.uri, or the archive and job that it was begun with."
        )


def refuse_taken(ledger: Ledger, news: Iterable[int], shards: Sequence[Shard], run: str) -> None:
    """Gives a directory back when another job has committed there while this one wrote its `run.json`.

    Args:
        ledger: of the results directory.
        news: indexes of shards that were committed since this job was planned.
        shards: of this job.
        run: digest of what decides its rows.

    Raises:
        ResumeError: another job has.
    """
    try:
        refuse_other_shards(ledger, news, shards, run)
    except ResumeError as error:
        ledger.forget()
        raise ResumeError(
            f"{ledger.uri}: another job took the results directory over while this one began; its records are there, "
            "and its run.json is gone. Start that job again, which goes on with what it has; give this one another "
            "sink.uri."
        ) from error


def complete(ledger: Ledger, receipts: Iterable[Receipt], shards: Sequence[Shard], run: str) -> Iterator[Receipt]:
    """Passes the receipts of a run on, and ends well only when they are those of all its shards with all their files.

    Parts and heatmaps that no receipt names are then removed.

    Args:
        ledger: of the results directory.
        receipts: all that are listed.
        shards: all that were planned.
        run: digest of what decides the rows.

    Raises:
        IncompleteError: a record or file is missing, or is another one; says how many and names the first.
    """
    files = listed_files(ledger)
    left = set(range(len(shards)))
    foreign, gaps = list[str](), Gaps(ledger, files)
    for receipt in _with_unlisted(ledger, receipts, left):
        planned = shards[receipt.shard] if receipt.shard < len(shards) else None
        if planned is None or receipt.run not in ("", run) or unlike(receipt, planned):
            foreign.append(f"ledger/{receipt.shard:05d}.json")
            continue
        for part in receipt.parts:
            gaps.add(part)
        yield receipt
    _refuse_incomplete(ledger, [shards[index] for index in sorted(left)], len(shards), foreign)
    gaps.refuse()
    _remove_orphans(ledger, files.keys() - gaps.seen)


def _remove_orphans(ledger: Ledger, names: Iterable[str]) -> None:
    """Parts of an interrupted start over what a shard held before; whoever reads `scores/` whole would count them."""
    orphans = sorted(name for name in names if WRITTEN.fullmatch(name))
    for name in orphans:
        ledger.storage.delete(join_uri(ledger.uri, name))
    if orphans:
        log.warning(
            "%s: removed %d files that no ledger record names (%s)", ledger.uri, len(orphans), names_text(orphans)
        )


def _with_unlisted(ledger: Ledger, receipts: Iterable[Receipt], left: set[int]) -> Iterator[Receipt]:
    """The receipts, then those that the listing lacked; takes the indexes of all out of `left`."""
    for receipt in receipts:
        left.discard(receipt.shard)
        yield receipt
    for index in sorted(left)[:ASKED_BY_NAME]:
        try:
            receipt = ledger.receipt(index)
        except MissingError:
            continue
        left.discard(index)
        yield receipt


def _refuse_incomplete(ledger: Ledger, missing: Sequence[Shard], planned: int, foreign: Sequence[str]) -> None:
    if missing:
        names = names_text([f"{shard.name} of {shard.uri}" for shard in missing])
        raise IncompleteError(
            f"{ledger.uri}: the run is not finished: {len(missing):,} of {planned:,} shards have no ledger record "
            f"({names}). It was removed while the run went on. The same command scores them again."
        )
    if foreign:
        raise IncompleteError(
            f"{ledger.uri}: the run is not finished: {len(foreign):,} ledger records are of another job or archive "
            f"({names_text(foreign)}). Remove them, and the same command scores their shards again."
        )


def listed_files(ledger: Ledger) -> dict[str, int]:
    """Size in bytes of every file below `scores/` and `heatmaps/`, by its path in the results directory."""
    found: dict[str, int] = {}
    start = len(normalise_uri(ledger.uri)) + 1
    for folder in ("scores", "heatmaps"):
        try:
            found |= {file.uri[start:]: file.size_bytes for file in ledger.storage.list(join_uri(ledger.uri, folder))}
        except MissingError:
            continue
    return found


def named_files(part: Part) -> list[tuple[str, int]]:
    """Path and size in bytes of the files of a part; 0 = an older raydetect did not note it."""
    heatmaps = [(part.heatmap_path, part.heatmap_bytes)] if part.heatmap_path else []
    return [(part.path, part.bytes), *heatmaps]


@dataclass(slots=True)
class Gaps:
    """Files that receipts name and a listing lacks, or lists with another size."""

    ledger: Ledger
    files: Mapping[str, int]
    count: int = 0
    names: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    _asked: int = 0

    def add(self, part: Part) -> None:
        """Looks for the files of a part."""
        for path, size in named_files(part):
            self.look(path, size)

    def look(self, path: str, size: int) -> None:
        """Looks for one file; `size` in bytes, 0 = not known."""
        self.seen.add(path)
        found = self.files.get(path)
        if found is None and self._asked < ASKED_BY_NAME:
            self._asked += 1
            info = self.ledger.storage.info(join_uri(self.ledger.uri, path))
            found = None if info is None else info.size_bytes
        if found is None or (size and found != size):
            self.count += 1
            self.names = [*self.names, path][: NAMED + 1]

    def refuse(self) -> None:
        """Raises when there are any.

        Raises:
            IncompleteError: there are.
        """
        if self.count:
            raise IncompleteError(f"{self.ledger.uri}: the run is not finished: {self.text()}")

    def text(self) -> str:
        """What is missing, and what to do; "" when nothing is."""
        if not self.count:
            return ""
        return (
            f"{self.count:,} files of committed shards are missing or have another size "
            f"({names_text(self.names, self.count)}). {repair_hint(self.ledger.uri)}"
        )
