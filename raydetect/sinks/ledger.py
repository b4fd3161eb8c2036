"""The ledger of a results directory: the job, the committed shards and the final manifest."""

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from raydetect.config.validation import differences, to_plain, validate
from raydetect.errors import DamagedError, IncompleteError, MissingError, ResumeError, SpecError, StorageError
from raydetect.left_out import LeftOutCount
from raydetect.records import Receipt
from raydetect.sinks.schemas import Manifest, Run
from raydetect.storage import Storage, join_uri, relative_to
from raydetect.storage.read_ahead import read_ahead

log = logging.getLogger("raydetect.sinks")
FORMAT_VERSION = 1
RECEIPT_NAME = re.compile(r"/ledger/(\d{5,})\.json$")
READERS = 16
MAX_DIFFERENCES, MAX_DIFFERENCE = 12, 400  # lines, characters per line


@dataclass(frozen=True, slots=True)
class Ledger:
    """Reads and writes the records of one results directory.

    Attributes:
        uri: the results directory.
        storage: storage of that URI.
    """

    uri: str
    storage: Storage

    def begin(self, run: Mapping[str, Any], replaces: Mapping[str, Any] | None = None) -> bool:
        """Writes `run.json` and reads it back, or checks that the existing one describes the same rows.

        Args:
            run: content of `run.json`, with the entry `result` that determines the rows.
            replaces: a `run.json` that may be overwritten, because it differs only in the archive and all committed
                shards are part of the new archive too.

        Returns:
            Whether `run.json` was written.

        Raises:
            ResumeError: the directory belongs to another spec, artifact or archive; the message lists the differences.
        """
        old = self.run()
        if old is not None and old["result"] == to_plain(run["result"]):
            return False
        if old is not None and (replaces is None or old["result"] != replaces["result"]):
            self._refuse(differences(old["result"], to_plain(run["result"])))
        self.withdraw()
        self._write("run.json", {"format_version": FORMAT_VERSION, **run})
        self.require_own(run)
        return True

    def replace_run(self, run: Mapping[str, Any]) -> None:
        """Writes `run.json`, whatever it holds; for a change of the rule for flags, which rewrites the rows too."""
        self._write("run.json", run)

    def forget(self) -> None:
        """Removes `run.json`, so that the job that owns the records can be started again."""
        self.storage.delete(join_uri(self.uri, "run.json"))

    def compare(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """Refuses a run whose rows would not match those of this directory; allows differences in the archive.

        Returns:
            The existing `run.json`.

        Raises:
            ResumeError: the runs differ; the message lists the differences.
        """
        old = self.run()
        if old is not None:
            changed = differences(old["result"], to_plain(run["result"]))
            if any(not line.startswith("archive: ") for line in changed):
                self._refuse(changed)
        return old

    def _refuse(self, changed: list[str]) -> NoReturn:
        raise ResumeError(
            f"{self.uri}: holds the results of another job; these differ (there -> here): "
            f"{_short(changed)}. Use another sink.uri, or the job it was started with."
        )

    def require_own(self, run: Mapping[str, Any]) -> None:
        """Checks that `run.json` exists and describes the rows of this run; takes one small request.

        Raises:
            StorageError: `run.json` was removed.
            ResumeError: it belongs to another job, or to the same job with another listing of the archive.
        """
        current = self.run()
        if current is None:
            raise StorageError(
                f"{join_uri(self.uri, 'run.json')}: was removed during the run. Start the same job again to score "
                "what is missing."
            )
        changed = differences(current["result"], to_plain(run["result"]))
        if changed:
            raise ResumeError(
                f"{self.uri}: another job took the results directory over while this one ran; these differ (there -> "
                f"here): {_short(changed)}. This job has stopped. Give each job its own sink.uri."
            )

    def withdraw(self, shards: Iterable[int] = ()) -> None:
        """Removes the manifest, then the records of shards, so that the same job scores them again.

        Parts and heatmaps stay and are overwritten later.

        Args:
            shards: indexes of the shards.
        """
        if self.storage.info(join_uri(self.uri, "manifest.json")) is not None:
            self.storage.delete(join_uri(self.uri, "manifest.json"))
        for shard in shards:
            self.storage.delete(join_uri(self.uri, f"ledger/{shard:05d}.json"))

    def remove_leftovers(self) -> None:
        """Removes unfinished files of killed processes from this directory."""
        self.storage.remove_leftovers(self.uri)

    def run(self) -> dict[str, Any] | None:
        """Reads `run.json`; None if no run was started here.

        Raises:
            DamagedError: the file is damaged.
            ResumeError: the file has a newer format.
        """
        return self._read_versioned("run.json", Run)

    def require_run(self) -> dict[str, Any]:
        """Reads `run.json`.

        Raises:
            MissingError: no run was started here.
            DamagedError, ResumeError: as `run`.
        """
        run = self.run()
        if run is None:
            raise self.no_run()
        return run

    def no_run(self) -> MissingError:
        """The error for a folder in which no run was started; names the results of a folder of audits."""
        nights = join_uri(self.uri, "nights")
        if self.storage.exists(join_uri(self.uri, "claims")) and self.storage.exists(nights):
            first = relative_to(next(iter(self.storage.list(nights))).uri, nights).partition("/")[0]
            return MissingError(
                f"{self.uri}: is a folder of audits, with a results directory for each night, such as "
                f"{join_uri(nights, first, 'results')}. Name one of them."
            )
        return MissingError(f"{self.uri}: holds no run.json, so no run was started there. Check the URI.")

    def manifest(self) -> dict[str, Any] | None:
        """Reads `manifest.json`; None while the run is not finished.

        Raises:
            DamagedError: the file is damaged.
            ResumeError: the file has a newer format.
        """
        return self._read_versioned("manifest.json", Manifest)

    def committed(self) -> frozenset[int]:
        """Returns the indexes of the committed shards, from one listing without reading records."""
        folder = join_uri(self.uri, "ledger")
        if not self.storage.exists(folder):
            return frozenset()
        names = (RECEIPT_NAME.search(file.uri) for file in self.storage.list(folder))
        return frozenset(int(name.group(1)) for name in names if name)

    def write_receipt(self, receipt: Receipt) -> None:
        """Commits a shard."""
        self._write(f"ledger/{receipt.shard:05d}.json", to_plain(receipt))

    def receipts(self, shards: Iterable[int] | None = None) -> Iterator[Receipt]:
        """Yields receipts in order of shards, read by several threads.

        Args:
            shards: indexes of committed shards; None = all.

        Raises:
            StorageError: a record is damaged.
        """
        yield from read_ahead(self.receipt, sorted(self.committed() if shards is None else shards), READERS)

    def receipt(self, shard: int) -> Receipt:
        """Reads the receipt of one committed shard.

        Raises:
            MissingError: the record does not exist.
            DamagedError: the file is not a record, or is the record of another shard.
        """
        name = f"ledger/{shard:05d}.json"
        uri = join_uri(self.uri, name)
        body = self._read(name)
        if body is None:
            raise MissingError(f"{uri}: the ledger record is missing. Start the same job again to score the shard.")
        try:
            receipt = validate(Receipt, body, uri)
        except SpecError as error:
            raise self._damaged(name, str(error).partition("\n")[0].removeprefix(f"{uri}: ")) from None
        if receipt.shard != shard:
            raise self._damaged(name, f"it is the record of shard {receipt.shard:05d}")
        return receipt

    def finish(
        self,
        facts: Mapping[str, Any],
        decide: "Callable[[Totals], Mapping[str, Any]]" = lambda totals: {},
        checked: Callable[[Iterable[Receipt]], Iterable[Receipt]] = lambda receipts: receipts,
    ) -> dict[str, Any]:
        """Creates `manifest.json` from all receipts and returns it; writes it unless it exists with the same content.

        Removes an existing manifest if the run turns out to be incomplete.

        Args:
            facts: further entries about the run.
            decide: computes entries from the sums of all receipts; they replace those of the sums.
            checked: passes receipts on and raises if they do not make a complete run.

        Raises:
            IncompleteError: raised by `checked`.
            DamagedError: a record is damaged.
        """
        totals = Totals()
        try:
            for receipt in checked(self.receipts()):
                totals.add(receipt)
        except (IncompleteError, DamagedError):
            self._withdraw_manifest()
            raise
        body = {"format_version": FORMAT_VERSION, **facts, **totals.plain(), **decide(totals)}
        if self._bytes("manifest.json") != _text(body):
            self._write("manifest.json", body)
        return body

    def _withdraw_manifest(self) -> None:
        try:
            self.withdraw()
        except StorageError as error:
            log.warning("the run is incomplete, but its manifest.json cannot be removed: %s", error)

    def part_uris(self) -> list[str]:
        """Returns the URIs of committed Parquet parts, in order of shards and chunks."""
        return [join_uri(self.uri, part.path) for receipt in self.receipts() for part in receipt.parts]

    def _write(self, name: str, body: Mapping[str, Any]) -> None:
        self.storage.write(join_uri(self.uri, name), _text(body))

    def _bytes(self, name: str) -> bytes | None:
        try:
            return self.storage.read(join_uri(self.uri, name))
        except MissingError:
            return None

    def _read(self, name: str) -> dict[str, Any] | None:
        data = self._bytes(name)
        if data is None:
            return None
        try:
            body = json.loads(data)
        except ValueError as error:
            raise self._damaged(name, str(error) if data else "it is empty") from None
        if not isinstance(body, dict):
            raise self._damaged(name, "it is not a JSON object")
        return body

    def _read_versioned(self, name: str, schema: type[Run] | type[Manifest]) -> dict[str, Any] | None:
        body = self._read(name)
        if body is None:
            return None
        version = body.get("format_version")
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise ResumeError(
                f"{join_uri(self.uri, name)}: has format {version}, this raydetect reads {FORMAT_VERSION}. "
                "Update raydetect or use another sink.uri."
            )
        try:
            validate(schema, body, name)
        except SpecError as error:
            raise self._damaged(name, str(error).partition("\n")[0].removeprefix(f"{name}: ")) from None
        return body

    def _damaged(self, name: str, reason: str) -> DamagedError:
        return DamagedError(f"{join_uri(self.uri, name)}: is damaged ({reason.rstrip('.')}). {repair_hint(self.uri)}")


def repair_hint(uri: str) -> str:
    """Says how to repair damaged results."""
    return f"`raydetect verify {shlex.quote(uri)} --repair` removes what is damaged; then start the same job again."


def _text(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode()


def _short(changed: list[str]) -> str:
    """Shortens many or long differences."""
    shown = [line if len(line) <= MAX_DIFFERENCE else line[:MAX_DIFFERENCE] + "..." for line in changed]
    more = len(shown) - MAX_DIFFERENCES
    return "; ".join(shown[:MAX_DIFFERENCES]) + (f"; and {more:,} more" if more > 0 else "")


def _is_unreadable(receipt: Receipt) -> bool:
    """Whether no row of the shard could be read; such a shard counts as bad."""
    return 0 < receipt.rows == receipt.statuses.get("unreadable", 0)


@dataclass(slots=True)
class Totals:
    """Sums over receipts; addition is associative and independent of order."""

    shards: int = 0
    rows: int = 0
    flagged: int = 0
    labelled: int = 0
    heatmaps: int = 0
    parts: int = 0
    clipped_pixels: int = 0
    regions: int = 0
    regions_left_out: int = 0
    close_ups: int = 0
    bad_shards: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    p_counts: Counter[float] = field(default_factory=Counter)
    left_out: LeftOutCount = field(default_factory=LeftOutCount)
    notes: Counter[str] = field(default_factory=Counter)
    first_unix: float = float("inf")
    last_unix: float = 0.0

    def add(self, receipt: Receipt) -> None:
        """Adds the receipt of one shard."""
        self.shards += 1
        self.rows += receipt.rows
        self.statuses.update(receipt.statuses)
        self.bad_shards += bool(receipt.statuses.get("bad_shard")) or _is_unreadable(receipt)
        for part in receipt.parts:
            self.parts += 1
            self.flagged += part.flagged
            self.labelled += part.labelled
            self.heatmaps += part.heatmaps
            self.clipped_pixels += part.clipped_pixels
            self.regions += part.regions
            self.regions_left_out += part.regions_left_out
            self.close_ups += part.close_ups
            self.p_counts.update(part.p_counts)
            self.left_out.add_all(part.left_out)
            self.notes.update(part.notes)
        self.first_unix = min(self.first_unix, receipt.committed_unix)
        self.last_unix = max(self.last_unix, receipt.committed_unix)

    @property
    def bad_rows(self) -> int:
        """Number of rows without a score."""
        return self.rows - self.statuses.get("ok", 0)

    def plain(self) -> dict[str, Any]:
        """Returns the entries of the manifest, none of which depends on when or where the run happened."""
        return {
            "shards": self.shards,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "bad_shards": self.bad_shards,
            "flagged": self.flagged,
            "heatmaps": self.heatmaps,
            "parts": self.parts,
            "clipped_pixels": self.clipped_pixels,
            "regions": self.regions,
            "regions_left_out": self.regions_left_out,
            "close_ups": self.close_ups,
            "statuses": dict(sorted(self.statuses.items())),
            "left_out": to_plain(dict(sorted(self.left_out.counts.items()))),
            "notes": dict(sorted(self.notes.items())),
        }
