"""Progress of a run from its ledger, and the AUROC of its labelled images."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydetect.config import USUAL_LEVEL
from raydetect.left_out import left_out_text
from raydetect.metrics.conformal import usual_level_text
from raydetect.metrics.roc import auroc
from raydetect.records import Receipt
from raydetect.sinks.consistency import Gaps, listed_files, named_files, names_text
from raydetect.sinks.ledger import Ledger, Totals
from raydetect.sinks.reflagging import UNDER_WAY

NOTHING_FLAGGED = "nothing, by flag: none"


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Progress of a run, from `run.json` and the ledger.

    Attributes:
        uri: the results directory.
        num_shards: number of shards of the job.
        totals: sums over the committed shards.
        finished: whether the manifest exists and all shards have their records.
        num_categories: number of categories of the fleet; 0 without a fleet.
        flags_nothing: whether the job decides nothing (`flag: none`).
        reflagging: whether a reflag is running or was interrupted.
        flags_wait: whether flags are decided over the whole archive (`flag.fdr`) and the run is not finished.
        fdr: the manifest's entry `fdr` once the run is finished.
        lost: number of records that are missing although the manifest exists.
        gaps: description of missing files of committed shards; "" if there are none or they were not checked.
        regions: number of regions of the committed rows, and what limits them; "" if an older version began the run.
        level: why the level of flags is not the usual one; "" if it is.
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
    regions: str = ""
    level: str = ""
    flags_nothing: bool = False
    reflagging: bool = False

    @property
    def flagged(self) -> int | None:
        """Number of flagged images; None with `flag: none`, and with `flag.fdr` until the run is finished."""
        if self.flags_wait or self.flags_nothing:
            return None
        return self.totals.flagged if self.fdr is None else int(self.fdr["flagged"])

    def plain(self) -> dict[str, Any]:
        """Returns the progress as a JSON object."""
        run: dict[str, Any] = {"uri": self.uri, "num_shards": self.num_shards, "num_categories": self.num_categories}
        run |= {
            "finished": self.finished,
            "lost_records": self.lost,
            "missing": self.gaps,
            "reflagging": self.reflagging,
        }
        return {**run, **self.totals.plain(), "flagged": self.flagged, "fdr": self.fdr}

    def _flagged_text(self) -> str:
        if self.flags_nothing:
            return NOTHING_FLAGGED
        return "when all shards are committed (flag.fdr)" if self.flagged is None else f"{self.flagged:,}"

    def lines(self) -> list[str]:
        """Formats the progress as lines of text."""
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
            f"Flagged    {self._flagged_text()}",
            f"Heatmaps   {heatmaps_text(totals.plain())}",
        ]
        left_out = left_out_text(totals.left_out.counts)
        more = (("Level", self.level), ("Regions", self.regions), ("Left out", left_out))
        lines += [f"{name:<10} {text}" for name, text in more if text]
        if self.num_categories:
            lines.insert(1, f"Fleet      of {self.num_categories:,} categories")
        if self.fdr is not None:
            lines.append(f"FDR        {fdr_text(self.fdr)}")
        if totals.notes:
            lines.append(f"Notes      {notes_text(totals.notes)}")
        spent = totals.last_unix - totals.first_unix
        if totals.shards > 1 and spent > 0:
            lines.append(f"Pace       {totals.shards / spent * 60:.1f} shards/min between first and last commit")
        if self.reflagging:
            lines.append(f"A reflag is running or was interrupted; `raydetect reflag {self.uri}` continues it.")
        elif self.gaps:
            lines.append(f"Missing    {self.gaps}")
        elif not self.finished:
            lines.append("Start the same job again to continue.")
        return lines


class ProgressReader:
    """Polls the progress of a results directory; reads each receipt once."""

    def __init__(self, ledger: Ledger, on_receipt: Callable[[Receipt], None] = lambda _: None) -> None:
        """Prepares a reader; `on_receipt` is called with each receipt that is read."""
        self._on_receipt = on_receipt
        self._ledger, self._seen, self._totals = ledger, frozenset[int](), Totals()
        self._lock = threading.Lock()

    def progress(self) -> RunProgress:
        """Returns the current progress; needs no cluster.

        Raises:
            StorageError: the URI is not a results directory, or a record is damaged.
        """
        with self._lock:
            run = self._ledger.require_run()
            manifest = self._ledger.manifest()  # before the listing, which then includes all its shards
            committed = self._ledger.committed()
            if not self._seen <= committed:  # another run was started there
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
            regions = regions_text({**run, **totals.plain()}) if "region_threshold" in run else ""
            return RunProgress(
                self._ledger.uri,
                shards,
                totals,
                finished,
                categories,
                waits,
                fdr,
                lost,
                regions=regions,
                level=level_text(run),
                flags_nothing=flags_nothing(run),
                reflagging=UNDER_WAY in run,
            )


def progress(ledger: Ledger) -> RunProgress:
    """Returns the progress of a results directory; needs no cluster.

    Checks by one listing that the files of committed shards exist with their sizes; `verify` reads them.

    Raises:
        StorageError: the URI is not a results directory, or a record is damaged.
    """
    files: list[tuple[str, int]] = []
    run_progress = ProgressReader(
        ledger, lambda receipt: files.extend(f for p in receipt.parts for f in named_files(p))
    ).progress()
    gaps = Gaps(ledger, listed_files(ledger))
    for path, size in files:
        gaps.look(path, size)
    return replace(run_progress, finished=run_progress.finished and not gaps.count, gaps=gaps.text())


def has_regions(run: Mapping[str, Any]) -> bool:
    """Whether rows of the run, of some category at least, may have regions."""
    entry = run.get("region_threshold", {})
    return any(one.get("value") is not None for one in entry.get("categories", {"": entry}).values())


def flags_nothing(run: Mapping[str, Any]) -> bool:
    """Whether the job decides nothing (`flag: none`)."""
    return bool(run["result"]["spec"].get("flag", {}).get("nothing"))


def notes_text(notes: Mapping[str, int]) -> str:
    """Formats the counts of notes by kind: `3 exif_ignored, 2 pages_not_read`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(notes.items()))


def level_text(run: Mapping[str, Any]) -> str:
    """Says at which p-value images are flagged where a calibration is too small for the usual level; "" if none is."""
    entry = run.get("flag_level", {})
    found = {name: one for name, one in entry.get("categories", {"": entry}).items() if one}
    high = {name: one for name, one in found.items() if one["level"] > USUAL_LEVEL}
    if not high:
        return ""
    worst = max(high, key=lambda name: high[name]["level"])
    which = "" if not worst else f" of category {worst!r}"
    if len(high) > 1:
        which += f" and more of {len(high) - 1:,} other categories"
    return usual_level_text(high[worst]["calibrated"], which)


def heatmaps_text(sums: Mapping[str, Any]) -> str:
    """Says how many heatmaps and close-ups there are: `5; close-ups 12`."""
    close_ups = sums.get("close_ups", 0)  # none in manifests of older versions
    return f"{sums['heatmaps']:,}" + (f"; close-ups {close_ups:,}" if close_ups else "")


def regions_text(manifest: Mapping[str, Any]) -> str:
    """Says how many regions the rows have and what limits them: `12; 3 left out by sink.max_regions`.

    A reason that concerns some categories of a fleet is followed by the first of them.
    """
    entry = manifest.get("region_threshold", {})
    categories_by_note: dict[str, list[str]] = {}
    for category, one in entry.get("categories", {"": entry}).items():
        categories_by_note.setdefault(one.get("note", ""), []).append(category)
    notes = [
        note if categories == [""] else f"{note} ({names_text(categories)})"
        for note, categories in sorted(categories_by_note.items())
        if note
    ]
    left_out = manifest.get("regions_left_out", 0)
    cut = [f"{left_out:,} left out by sink.max_regions"] if left_out else []
    count = [f"{manifest.get('regions', 0):,}"] if "" in categories_by_note or manifest.get("regions") else []
    return "; ".join([*count, *cut, *notes])


def fdr_text(fdr: Mapping[str, Any]) -> str:
    """Describes the manifest's decision on flags in one or two sentences."""
    level = f"{100 * fdr['level']:g} %"
    if fdr["p_threshold"] is None:
        text = f"no p-value of {fdr['tested']:,} images is small enough for a false discovery rate of {level}."
        if fdr["needed_held_out"]:
            text += f" Flagging those of the smallest one would need {fdr['needed_held_out']:,} held-out normal images."
        return text
    return (
        f"flagged if p_value <= {fdr['p_threshold']:.6g}. If all {fdr['tested']:,} images were normal, "
        f"{fdr['expected_false']:.2f} would be flagged: {100 * fdr['false_share']:.2f} % of the flagged; limit {level}."
    )


def labelled_auroc(ledger: Ledger) -> tuple[float, int] | None:
    """Returns (image AUROC, number of labelled images) of committed rows; None unless both labels occur.

    Scores of different artifacts are not comparable: for a fleet it is the mean AUROC of the categories with both
    labels.
    """
    groups: dict[str, list[pa.Table]] = {}
    for receipt in ledger.receipts():
        for part in receipt.parts:
            if part.labelled:
                for digest, table in _by_artifact(ledger, part.path):
                    groups.setdefault(digest, []).append(table)
    results = []
    for tables in groups.values():
        labels, scores = (pa.concat_tables(tables)[name].to_numpy() for name in ("label", "image_score"))
        if len(np.unique(labels)) == 2:
            results.append((auroc(labels, scores), len(labels)))
    if not results:
        return None
    return sum(value for value, _ in results) / len(results), sum(count for _, count in results)


def _by_artifact(ledger: Ledger, path: str) -> Iterator[tuple[str, pa.Table]]:
    """Yields (artifact, label and image_score) of the labelled rows of a part."""
    # Read from memory: Arrow's threads may keep a Python file open until after interpreter shutdown, which aborts.
    data = pa.BufferReader(ledger.storage.read(f"{ledger.uri}/{path}"))
    table = pq.ParquetFile(data).read(columns=["label", "image_score", "artifact"]).drop_null()
    for digest in table["artifact"].unique():
        yield digest.as_py(), table.filter(pc.equal(table["artifact"], digest)).drop_columns("artifact")
