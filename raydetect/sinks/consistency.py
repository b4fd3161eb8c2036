"""Checks that committed shards belong to a job and a listing, and that their files exist."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
MAX_LOOKUPS = 100  # files missing in a listing are looked up by name, as listings of some stores lag behind


def rows_digest(run: Mapping[str, Any]) -> str:
    """Digest of what determines the rows of a job, except the archive, whose shards have their own fingerprints."""
    return digest({name: value for name, value in run["result"].items() if name != "archive"})


def names_text(names: Sequence[str], count: int | None = None) -> str:
    """Formats the first few names: `a, b, c and 9 more`."""
    more = (len(names) if count is None else count) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def difference(receipt: Receipt, shard: Shard) -> str:
    """Describes how a receipt differs from the shard with the same index; empty if they match."""
    if receipt.uri != shard.uri:
        return f"was {receipt.uri} and is now {shard.uri}"
    if receipt.run and receipt.span != shard.span:
        return f"was the part {receipt.span} of {shard.uri} and is now {shard.span}"
    if receipt.fingerprint != shard.fingerprint:
        return f"has other content now ({shard.uri})"
    return ""


def rows_with(statuses: tuple[str, ...], ledger: Ledger, committed: Iterable[int]) -> dict[int, int]:
    """Counts the rows with one of the given statuses, for committed shards that have any."""
    if not statuses:
        return {}
    counts = {
        receipt.shard: sum(receipt.statuses.get(status, 0) for status in statuses)
        for receipt in ledger.receipts(committed)
    }
    return {shard: count for shard, count in counts.items() if count}


def refuse_without_images(totals: Totals, where: str) -> None:
    """Refuses to finish a run without images.

    Args:
        totals: sums of all receipts.
        where: the source, for the message.

    Raises:
        SpecError: no shard has a row.
    """
    withdrawn = totals.left_out.counts.get(WITHDRAWN, LeftOut(0)).count
    if totals.shards > withdrawn and not totals.rows:
        text = left_out_text(totals.left_out.counts) or "nothing"
        raise SpecError(f"{where}: has no images; left out: {text}. Check source.uri, format and pattern.")


def refuse_other_shards(
    ledger: Ledger,
    committed: Iterable[int],
    shards: Sequence[Shard],
    run: str,
    describe: Callable[[], str] = lambda: "",
) -> None:
    """Refuses committed shards that belong to another job or differ from the shard of their index in a new listing.

    A receipt of an older raydetect records no span, so its shard must be the only one of its URI.

    Args:
        ledger: ledger of the results directory.
        committed: indexes of committed shards.
        shards: the new listing.
        run: digest of what determines the rows.
        describe: says what has changed in an archive of which the job is the same, and what to do.

    Raises:
        ResumeError: a committed shard does not match; the message names it.
    """
    counts = Counter(shard.uri for shard in shards)
    for receipt in ledger.receipts(committed):
        name = f"{receipt.shard:05d}"
        if receipt.run not in ("", run):
            message = f"committed shard {name} is of another job, with another artifact or spec"
        elif receipt.shard >= len(shards):
            message = f"the archive has changed, and committed shard {name} ({receipt.uri}) is not in it any more"
        elif change := difference(receipt, shards[receipt.shard]):
            message = f"the archive has changed, and committed shard {name} {change}"
        elif not receipt.run and counts[receipt.uri] > 1:
            message = (
                f"the archive has changed, and whether committed shard {name} of {receipt.uri} has is not recorded"
            )
        else:
            continue
        more = describe() if receipt.run == run else ""
        usual = "Use another sink.uri, or the archive and job it was started with."
        raise ResumeError(f"{ledger.uri}: {message}. {more or usual}")


def refuse_taken(ledger: Ledger, news: Iterable[int], shards: Sequence[Shard], run: str) -> None:
    """Removes this job's `run.json` if another job has committed shards while it was written.

    Args:
        ledger: ledger of the results directory.
        news: indexes of shards that were committed since this job was planned.
        shards: shards of this job.
        run: digest of what determines its rows.

    Raises:
        ResumeError: another job has committed shards.
    """
    try:
        refuse_other_shards(ledger, news, shards, run)
    except ResumeError as error:
        ledger.forget()
        raise ResumeError(
            f"{ledger.uri}: another job took the results directory over while this one was starting; its records "
            "exist, but its run.json is gone. Start that job again to continue it; give this one another sink.uri."
        ) from error


def complete(ledger: Ledger, receipts: Iterable[Receipt], shards: Sequence[Shard], run: str) -> Iterator[Receipt]:
    """Yields the receipts of a run and raises unless they cover all its shards and all their files exist.

    Afterwards removes parts and heatmaps that no receipt names.

    Args:
        ledger: ledger of the results directory.
        receipts: all listed receipts.
        shards: all planned shards.
        run: digest of what determines the rows.

    Raises:
        IncompleteError: records or files are missing or do not match; the message counts them and names the first.
    """
    files = listed_files(ledger)
    left = set(range(len(shards)))
    foreign, gaps = list[str](), Gaps(ledger, files)
    for receipt in _with_unlisted(ledger, receipts, left):
        planned = shards[receipt.shard] if receipt.shard < len(shards) else None
        if planned is None or receipt.run not in ("", run) or difference(receipt, planned):
            foreign.append(f"ledger/{receipt.shard:05d}.json")
            continue
        for part in receipt.parts:
            gaps.add(part)
        yield receipt
    _refuse_incomplete(ledger, [shards[index] for index in sorted(left)], len(shards), foreign)
    gaps.refuse()
    _remove_orphans(ledger, files.keys() - gaps.seen)


def _remove_orphans(ledger: Ledger, names: Iterable[str]) -> None:
    """Removes files that no receipt names, left by an interrupted rewrite of a shard; readers of `scores/` see them."""
    orphans = sorted(name for name in names if WRITTEN.fullmatch(name))
    for name in orphans:
        ledger.storage.delete(join_uri(ledger.uri, name))
    if orphans:
        log.warning(
            "%s: removed %d files that no ledger record names (%s)", ledger.uri, len(orphans), names_text(orphans)
        )


def _with_unlisted(ledger: Ledger, receipts: Iterable[Receipt], left: set[int]) -> Iterator[Receipt]:
    """Yields the receipts, then those missing in the listing; removes their indexes from `left`."""
    for receipt in receipts:
        left.discard(receipt.shard)
        yield receipt
    for index in sorted(left)[:MAX_LOOKUPS]:
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
            f"({names}). They were removed during the run. The same command scores them again."
        )
    if foreign:
        raise IncompleteError(
            f"{ledger.uri}: the run is not finished: {len(foreign):,} ledger records are of another job or archive "
            f"({names_text(foreign)}). Remove them, and the same command scores their shards again."
        )


def listed_files(ledger: Ledger, folders: Sequence[str] = ("scores", "heatmaps")) -> dict[str, int]:
    """Lists the files below some folders: size in bytes by path in the results directory."""
    size_by_path: dict[str, int] = {}
    start = len(normalise_uri(ledger.uri)) + 1
    for folder in folders:
        try:
            files = ledger.storage.list(join_uri(ledger.uri, folder))
            size_by_path |= {file.uri[start:]: file.size_bytes for file in files}
        except MissingError:
            continue
    return size_by_path


def named_files(part: Part) -> list[tuple[str, int]]:
    """Returns path and size in bytes of the files of a part; size 0 if an older raydetect did not record it."""
    return [(part.path, part.bytes), *((one.path, one.bytes) for one in part.heatmap_zips)]


@dataclass(slots=True)
class Gaps:
    """Collects files that receipts name but that are missing or have another size."""

    ledger: Ledger
    files: Mapping[str, int]
    count: int = 0
    names: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    _lookups: int = 0

    def add(self, part: Part) -> None:
        """Checks the files of a part."""
        for path, size in named_files(part):
            self.look(path, size)

    def look(self, path: str, size: int) -> None:
        """Checks one file; `size` in bytes, 0 = unknown."""
        self.seen.add(path)
        actual = self.files.get(path)
        if actual is None and self._lookups < MAX_LOOKUPS:
            self._lookups += 1
            info = self.ledger.storage.info(join_uri(self.ledger.uri, path))
            actual = None if info is None else info.size_bytes
        if actual is None or (size and actual != size):
            self.count += 1
            self.names = [*self.names, path][: NAMED + 1]

    def refuse(self) -> None:
        """Raises if files are missing or differ.

        Raises:
            IncompleteError: there are such files.
        """
        if self.count:
            raise IncompleteError(f"{self.ledger.uri}: the run is not finished: {self.text()}")

    def text(self) -> str:
        """Describes what is missing and what to do; "" if nothing is."""
        if not self.count:
            return ""
        return (
            f"{self.count:,} files of committed shards are missing or have another size "
            f"({names_text(self.names, self.count)}). {repair_hint(self.ledger.uri)}"
        )
