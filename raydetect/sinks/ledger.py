"""The ledger of a results directory: what was asked, which shards are committed, the manifest at the end."""

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

from raydetect.config.validation import differences, to_plain, validate
from raydetect.errors import DamagedError, IncompleteError, MissingError, ResumeError, SpecError, StorageError
from raydetect.left_out import LeftOutCount
from raydetect.records import Receipt
from raydetect.sinks.schemas import Manifest, Run
from raydetect.storage import Storage, join_uri

log = logging.getLogger("raydetect.sinks")
FORMAT_VERSION = 1
RECEIPT_NAME = re.compile(r"/ledger/(\d{5,})\.json$")
READERS = 16
MAX_DIFFERENCES, MAX_DIFFERENCE = 12, 400  # lines, letters of each


@dataclass(frozen=True, slots=True)
class Ledger:
    """Reads and writes the records of one results directory.

    Attributes:
        uri: the results directory.
        storage: reaches it.
    """

    uri: str
    storage: Storage

    def begin(self, run: Mapping[str, Any], replaces: Mapping[str, Any] | None = None) -> bool:
        """Writes `run.json` and reads it back, or checks that the one there asks for the same rows.

        Args:
            run: must hold `result`: what decides the rows.
            replaces: a `run.json` that may be written over, because it differs in the archive alone and every
                committed shard is in the new one too.

        Returns:
            Whether it was written now.

        Raises:
            ResumeError: the directory belongs to another spec, artifact or archive; says what differs.
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

    def forget(self) -> None:
        """Takes `run.json` away, so that the job whose records are there may begin again."""
        self.storage.delete(join_uri(self.uri, "run.json"))

    def compare(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """Refuses a run that would mix other rows into this directory; a difference in the archive is left open.

        Returns:
            The `run.json` that is there.

        Raises:
            ResumeError: it would; says what differs.
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
            f"{_short(changed)}. Use another sink.uri, or the job it was begun with."
        )

    def require_own(self, run: Mapping[str, Any]) -> None:
        """`run.json` must be there and ask for the rows of this run; one small request.

        Raises:
            StorageError: it was removed.
            ResumeError: it is of another job, or of the same one with another listing of the archive.
        """
        found = self.run()
        if found is None:
            raise StorageError(
                f"{join_uri(self.uri, 'run.json')}: was removed while the run went on. Start the same job again; it "
                "scores what is missing."
            )
        changed = differences(found["result"], to_plain(run["result"]))
        if changed:
            raise ResumeError(
                f"{self.uri}: another job took the results directory over while this one ran; these differ (there -> "
                f"here): {_short(changed)}. This job has stopped. Give each job a sink.uri of its own."
            )

    def withdraw(self, shards: Iterable[int] = ()) -> None:
        """Takes the manifest away, then the records of shards, so that the same job scores them again.

        Parts and heatmaps stay; they are written over.

        Args:
            shards: whose records go.
        """
        if self.storage.info(join_uri(self.uri, "manifest.json")) is not None:
            self.storage.delete(join_uri(self.uri, "manifest.json"))
        for shard in shards:
            self.storage.delete(join_uri(self.uri, f"ledger/{shard:05d}.json"))

    def remove_leftovers(self) -> None:
        """Removes what killed processes left of files that they were writing here."""
        self.storage.remove_leftovers(self.uri)

    def run(self) -> dict[str, Any] | None:
        """`run.json`, None when the run was never begun.

        Raises:
            DamagedError: it is not what was written.
            ResumeError: it is of a newer format.
        """
        return self._read_versioned("run.json", Run)

    def manifest(self) -> dict[str, Any] | None:
        """`manifest.json`, None while the run is not finished.

        Raises:
            DamagedError: it is not what was written.
            ResumeError: it is of a newer format.
        """
        return self._read_versioned("manifest.json", Manifest)

    def committed(self) -> frozenset[int]:
        """Indexes of the committed shards, from one listing; opens no record."""
        folder = join_uri(self.uri, "ledger")
        if not self.storage.exists(folder):
            return frozenset()
        names = (RECEIPT_NAME.search(file.uri) for file in self.storage.list(folder))
        return frozenset(int(name.group(1)) for name in names if name)

    def write_receipt(self, receipt: Receipt) -> None:
        """Commits a shard."""
        self._write(f"ledger/{receipt.shard:05d}.json", to_plain(receipt))

    def receipts(self, shards: Iterable[int] | None = None) -> Iterator[Receipt]:
        """Receipts in order of shards, read by several threads.

        Args:
            shards: committed ones; None = all.

        Raises:
            StorageError: a record is damaged.
        """
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(self.receipt, sorted(self.committed() if shards is None else shards))

    def receipt(self, shard: int) -> Receipt:
        """The receipt of one committed shard.

        Raises:
            MissingError: it is not there.
            DamagedError: it is no record, or that of another shard.
        """
        name = f"ledger/{shard:05d}.json"
        place = join_uri(self.uri, name)
        body = self._read(name)
        if body is None:
            raise MissingError(f"{place}: the ledger record is missing. Start the same job again to score the shard.")
        try:
            found = validate(Receipt, body, place)
        except SpecError as error:
            raise self._damaged(name, str(error).partition("\n")[0].removeprefix(f"{place}: ")) from None
        if found.shard != shard:
            raise self._damaged(name, f"it is that of shard {found.shard:05d}")
        return found

    def finish(
        self,
        facts: Mapping[str, Any],
        decide: "Callable[[Totals], Mapping[str, Any]]" = lambda totals: {},
        checked: Callable[[Iterable[Receipt]], Iterable[Receipt]] = lambda receipts: receipts,
    ) -> dict[str, Any]:
        """Makes `manifest.json` from all receipts, and returns it; it is written unless it is there already.

        One that is there goes when the run turns out not to be whole.

        Args:
            facts: of the run.
            decide: what the sums of all receipts decide; its entries replace those of the sums.
            checked: passes receipts on, and raises when they do not make a whole run.

        Raises:
            IncompleteError: by `checked`.
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
            log.warning("the run is not whole, and its manifest.json stays: %s", error)

    def part_uris(self) -> list[str]:
        """Parquet parts that count, in order of shards and chunks; whatever else lies there does not."""
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
            raise self._damaged(name, "it is no JSON object")
        return body

    def _read_versioned(self, name: str, shape: type[Run] | type[Manifest]) -> dict[str, Any] | None:
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
            validate(shape, body, name)
        except SpecError as error:
            raise self._damaged(name, str(error).partition("\n")[0].removeprefix(f"{name}: ")) from None
        return body

    def _damaged(self, name: str, reason: str) -> DamagedError:
        return DamagedError(f"{join_uri(self.uri, name)}: is damaged ({reason.rstrip('.')}). {repair_hint(self.uri)}")


def repair_hint(uri: str) -> str:
    """What to do about damaged results."""
    return f"`raydetect verify {shlex.quote(uri)} --repair` takes away what is damaged; the same job makes it again."


def _text(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode()


def _short(changed: list[str]) -> str:
    """Of very many or very long differences the beginning."""
    shown = [line if len(line) <= MAX_DIFFERENCE else line[:MAX_DIFFERENCE] + "..." for line in changed]
    more = len(shown) - MAX_DIFFERENCES
    return "; ".join(shown[:MAX_DIFFERENCES]) + (f"; and {more:,} more" if more > 0 else "")


def _is_unreadable(receipt: Receipt) -> bool:
    """A shard of which nothing could be read counts as a bad one."""
    return 0 < receipt.rows == receipt.statuses.get("unreadable", 0)


@dataclass(slots=True)
class Totals:
    """Sums over receipts; adding is associative and does not depend on order."""

    shards: int = 0
    rows: int = 0
    flagged: int = 0
    labelled: int = 0
    heatmaps: int = 0
    parts: int = 0
    clipped_pixels: int = 0
    bad_shards: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    p_counts: Counter[float] = field(default_factory=Counter)
    left_out: LeftOutCount = field(default_factory=LeftOutCount)
    notes: Counter[str] = field(default_factory=Counter)
    first_unix: float = float("inf")
    last_unix: float = 0.0

    def add(self, receipt: Receipt) -> None:
        """Adds one shard."""
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
            self.p_counts.update(part.p_counts)
            self.left_out.add_all(part.left_out)
            self.notes.update(part.notes)
        self.first_unix = min(self.first_unix, receipt.committed_unix)
        self.last_unix = max(self.last_unix, receipt.committed_unix)

    @property
    def bad_rows(self) -> int:
        """Rows without a score."""
        return self.rows - self.statuses.get("ok", 0)

    def plain(self) -> dict[str, Any]:
        """What the manifest holds: nothing that depends on when or where the run happened."""
        return {
            "shards": self.shards,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "bad_shards": self.bad_shards,
            "flagged": self.flagged,
            "heatmaps": self.heatmaps,
            "parts": self.parts,
            "clipped_pixels": self.clipped_pixels,
            "statuses": dict(sorted(self.statuses.items())),
            "left_out": to_plain(dict(sorted(self.left_out.found.items()))),
            "notes": dict(sorted(self.notes.items())),
        }
