"""Reading a results directory: progress from the ledger, and how well scores rank labelled images."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydetect.errors import MissingError
from raydetect.left_out import left_out_text
from raydetect.metrics.roc import auroc
from raydetect.records import Receipt
from raydetect.sinks.consistency import Gaps, listed_files, named_files
from raydetect.sinks.ledger import Ledger, Totals


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run is, from `run.json` and the ledger; `num_categories` is 0 without a fleet.

    `finished` is a run whose manifest is there and whose shards all have their record; `lost` counts the records that
    are missing beside a manifest, and `gaps` says which files of committed shards are, "" when none or nobody looked.
    `flags_wait` says that the whole archive decides what is flagged (`flag.fdr`), and
    the run is not finished; `fdr` is the manifest's entry once it is.
    """

    uri: str
    num_shards: int
    totals: Totals
    finished: bool
    num_categories: int = 0
    flags_wait: bool = False
    fdr: Mapping[str, Any] | None = None
    lost: int = 0
    gaps: str = ""

    @property
    def flagged(self) -> int | None:
        """How many images are flagged; None while that is left to the end of the run."""
        if self.flags_wait:
            return None
        return self.totals.flagged if self.fdr is None else int(self.fdr["flagged"])

    def plain(self) -> dict[str, Any]:
        """For machines."""
        run: dict[str, Any] = {"uri": self.uri, "num_shards": self.num_shards, "num_categories": self.num_categories}
        run |= {"finished": self.finished, "lost_records": self.lost, "missing": self.gaps}
        return {**run, **self.totals.plain(), "flagged": self.flagged, "fdr": self.fdr}

    def lines(self) -> list[str]:
        """For people."""
        totals = self.totals
        state = "finished" if self.finished else "not finished"
        if self.lost:
            state += f": manifest.json is there, but the records of {self.lost:,} shards are missing"
        share = 100.0 * totals.shards / max(1, self.num_shards)
        kinds = ", ".join(f"{count:,} {status}" for status, count in sorted(totals.statuses.items()))
        lines = [
            f"{self.uri}: {state}",
            f"Shards     {totals.shards:,} of {self.num_shards:,} committed ({share:.1f} %)",
            f"Images     {totals.rows:,} ({kinds or 'none yet'})",
            f"Flagged    {'when all shards are committed (flag.fdr)' if self.flagged is None else f'{self.flagged:,}'}",
            f"Heatmaps   {totals.heatmaps:,}",
        ]
        if totals.left_out.found:
            lines.append(f"Left out   {left_out_text(totals.left_out.found)}")
        if self.num_categories:
            lines.insert(1, f"Fleet      of {self.num_categories:,} categories")
        if self.fdr is not None:
            lines.append(f"FDR        {fdr_text(self.fdr)}")
        if totals.notes:
            lines.append(f"Notes      {notes_text(totals.notes)}")
        spent = totals.last_unix - totals.first_unix
        if totals.shards > 1 and spent > 0:
            lines.append(f"Pace       {totals.shards / spent * 60:.1f} shards/min between first and last commit")
        if self.gaps:
            lines.append(f"Missing    {self.gaps}")
        elif not self.finished:
            lines.append("Start the same job again to go on.")
        return lines


class ProgressReader:
    """A results directory whose progress is asked for again and again: each receipt is read once."""

    def __init__(self, ledger: Ledger, on_receipt: Callable[[Receipt], None] = lambda _: None) -> None:
        """Reads nothing yet; `on_receipt` is told of each that is read."""
        self._on_receipt = on_receipt
        self._ledger, self._seen, self._totals = ledger, frozenset[int](), Totals()
        self._lock = threading.Lock()

    def progress(self) -> RunProgress:
        """Progress as it is now; needs no cluster.

        Raises:
            StorageError: it is no results directory, or a record is damaged.
        """
        with self._lock:
            run = self._ledger.run()
            if run is None:
                raise MissingError(f"{self._ledger.uri}: holds no run.json, so no run was begun there. Check the URI.")
            manifest = self._ledger.manifest()  # before the listing, which then holds all that is said
            committed = self._ledger.committed()
            if not self._seen <= committed:  # another run began there
                self._seen, self._totals = frozenset(), Totals()
            for receipt in self._ledger.receipts(committed - self._seen):
                self._totals.add(receipt)
                self._on_receipt(receipt)
            self._seen = committed
            categories = len(run["result"].get("categories", {}))
            totals = copy.deepcopy(self._totals)
            shards = int(run["num_shards"])
            missing = shards - sum(index < shards for index in committed)
            finished = manifest is not None and not missing
            waits = not finished and run["result"]["spec"].get("flag", {}).get("fdr") is not None
            fdr = manifest.get("fdr") if manifest is not None and finished else None
            lost = 0 if manifest is None else missing
            return RunProgress(self._ledger.uri, shards, totals, finished, categories, waits, fdr, lost)


def progress(ledger: Ledger) -> RunProgress:
    """Progress of a results directory; needs no cluster.

    One listing tells whether the files of committed shards are there and as large as they were; `verify` reads them.

    Raises:
        StorageError: it is no results directory, or a record is damaged.
    """
    files: list[tuple[str, int]] = []
    found = ProgressReader(
        ledger, lambda receipt: files.extend(f for p in receipt.parts for f in named_files(p))
    ).progress()
    gaps = Gaps(ledger, listed_files(ledger))
    for path, size in files:
        gaps.look(path, size)
    return replace(found, finished=found.finished and not gaps.count, gaps=gaps.text())


def notes_text(notes: Mapping[str, int]) -> str:
    """`3 exif_ignored, 2 pages_not_read`: rows with a note, by kind."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(notes.items()))


def fdr_text(fdr: Mapping[str, Any]) -> str:
    """The manifest's decision on flags in a sentence or two."""
    level = f"{100 * fdr['level']:g} %"
    if fdr["p_threshold"] is None:
        text = f"no p-value of {fdr['tested']:,} images is small enough for a false discovery rate of {level}."
        if fdr["needed_held_out"]:
            text += f" Those of the smallest one need {fdr['needed_held_out']:,} held-out normal images."
        return text
    return (
        f"flagged is p_value <= {fdr['p_threshold']:.6g}. If all {fdr['tested']:,} images were normal, "
        f"{fdr['expected_false']:.2f} would be there: {100 * fdr['false_share']:.2f} % of the flagged; asked: {level}."
    )


def labelled_auroc(ledger: Ledger) -> tuple[float, int] | None:
    """(image AUROC, number of labelled images) of committed rows; None unless both labels are there.

    Scores of different artifacts cannot be compared: for a fleet it is the mean of its categories' AUROCs, over
    those categories that have both labels.
    """
    groups: dict[str, list[pa.Table]] = {}
    for receipt in ledger.receipts():
        for part in receipt.parts:
            if part.labelled:
                for digest, table in _by_artifact(ledger, part.path):
                    groups.setdefault(digest, []).append(table)
    found = []
    for tables in groups.values():
        labels, scores = (pa.concat_tables(tables)[name].to_numpy() for name in ("label", "image_score"))
        if len(np.unique(labels)) == 2:
            found.append((auroc(labels, scores), len(labels)))
    if not found:
        return None
    return sum(value for value, _ in found) / len(found), sum(count for _, count in found)


def _by_artifact(ledger: Ledger, path: str) -> Iterator[tuple[str, pa.Table]]:
    """(artifact, its label and image_score) of a part's labelled rows."""
    # from memory: Arrow's threads may hold a Python file until after the interpreter has ended, which aborts
    data = pa.BufferReader(ledger.storage.read(f"{ledger.uri}/{path}"))
    table = pq.ParquetFile(data).read(columns=["label", "image_score", "artifact"]).drop_null()
    for digest in table["artifact"].unique():
        yield digest.as_py(), table.filter(pc.equal(table["artifact"], digest)).drop_columns("artifact")
