"""Decides the flags of a scored run anew, by another rule, from its rows and the calibration of its artifact."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydetect.artifacts.fleet import read_index, read_records
from raydetect.artifacts.record import ArtifactRecord
from raydetect.config import FlagSpec, ReflagSpec, result_settings
from raydetect.config.validation import apply_overrides, to_plain, validate
from raydetect.errors import ArtifactError, IncompleteError, MissingError, ResumeError, SpecError
from raydetect.left_out import LeftOutCount
from raydetect.metrics.conformal import threshold_for
from raydetect.planning.plan import by_category, check_flag, decide, flag_level, manifest_facts
from raydetect.records import LeftOut, Receipt
from raydetect.sinks.archive_flags import NEEDED, archive_flags
from raydetect.sinks.consistency import Gaps, listed_files, rows_digest
from raydetect.sinks.ledger import Ledger, Totals
from raydetect.sinks.reflagging import DONE, UNDER_WAY, check_parts, rewrite_shard
from raydetect.sinks.rows import read_part
from raydetect.sinks.run_progress import flags_nothing, has_regions
from raydetect.storage import Storage, join_uri, normalise_uri
from raydetect.storage.read_ahead import read_ahead

WRITERS = 8
NIGHT = re.compile(r"(?P<folder>.+)/nights/(?P<number>\d{5,})/results")
ProgressCallback = Callable[[str, int, int | None], None]
Records = Mapping[str | None, ArtifactRecord]


@dataclass(frozen=True, slots=True)
class Reflagged:
    """The result of a reflag.

    Attributes:
        before: the rule until now.
        after: the new rule.
        flagged_before: number of flagged images by the rule until now; None if it had decided nothing.
        manifest: the new manifest.
    """

    before: FlagSpec
    after: FlagSpec
    flagged_before: int | None
    manifest: Mapping[str, Any]

    @property
    def lacking(self) -> dict[str, LeftOut]:
        """Flagged images without what only images that were flagged by the scoring got, by kind: count and names."""
        entries = self.manifest.get(DONE, {}).get("lacking", {})
        return {kind: LeftOut(int(one["count"]), tuple(one["names"])) for kind, one in entries.items()}


@dataclass(slots=True)
class Reflag:
    """A reflag after validation; nothing is written yet.

    Attributes:
        ledger: ledger of the results directory.
        run: its `run.json`.
        before: the rule until now.
        flag: the new rule.
        records: artifact records by category; empty if the rule needs no calibration.
        is_resumed: whether an interrupted reflag is continued.
    """

    ledger: Ledger
    run: Mapping[str, Any]
    before: FlagSpec
    flag: FlagSpec
    records: Records
    is_resumed: bool = False

    @property
    def is_done(self) -> bool:
        """Whether the run is finished and has the rule already."""
        return not self.is_resumed and self.before == self.flag and self.ledger.manifest() is not None

    def execute(self, on_progress: ProgressCallback) -> Reflagged:
        """Rewrites the rows, their records, `run.json` and the manifest. Killed, the same call continues.

        Args:
            on_progress: called with what is done, the number of shards since the last call, and their total.

        Raises:
            DamagedError: a part is damaged; nothing is changed, unless an interrupted reflag is continued.
            StorageError: a file cannot be read or written.
        """
        run, num_shards = dict(self.run), int(self.run["num_shards"])
        self.ledger.remove_leftovers()
        if not self.is_resumed:
            for _ in read_ahead(partial(check_parts, self.ledger), self.ledger.receipts(), WRITERS):
                on_progress("checked shards", 1, num_shards)
            counted = sum(part.flagged for receipt in self.ledger.receipts() for part in receipt.parts)
            fdr = (self.ledger.manifest() or {}).get("fdr")
            flagged = None if flags_nothing(run) else counted if fdr is None else fdr["flagged"]
            run = _with_flag(run, self.flag, self.records)
            run[UNDER_WAY] = {"before": to_plain(self.before), "flagged_before": flagged}
            self.ledger.withdraw()
            self.ledger.replace_run(run)
        work = partial(rewrite_shard, self.ledger, limits=_limits(self.flag, self.records), run=rows_digest(run))
        for _ in read_ahead(work, self.ledger.receipts(), WRITERS):
            on_progress("reflagged shards", 1, num_shards)
        return self._finish(run)

    def _finish(self, run: dict[str, Any]) -> Reflagged:
        under_way = run.pop(UNDER_WAY)
        totals = Totals()
        for receipt in self.ledger.receipts():
            totals.add(receipt)
        where = str(run["spec"]["source"]["uri"])
        decided = decide(self.flag, self.records, where, totals)
        if DONE in run:
            lacking = self._lacking_of(run, decided)
            run[DONE] = {"scored_with": run[DONE]["scored_with"], "lacking": to_plain(lacking)}
        self.ledger.replace_run(run)
        manifest = self.ledger.finish(
            manifest_facts(run), lambda totals: decide(self.flag, self.records, where, totals)
        )
        before = validate(FlagSpec, under_way["before"], "run.json")
        return Reflagged(before, self.flag, under_way["flagged_before"], manifest)

    def _lacking_of(self, run: Mapping[str, Any], decided: Mapping[str, Any]) -> dict[str, LeftOut]:
        """Counts the flagged images without regions or heatmap that had some if they had been scored by this rule."""
        sink, count, flags = run["spec"]["sink"], LeftOutCount(), archive_flags(decided)
        was_none = validate(FlagSpec, run[DONE]["scored_with"], "run.json").nothing
        wanted = {"heatmap": "heatmap_uri"} if sink["heatmaps"] == "flagged" else {}
        if has_regions(run) or (was_none and sink.get("max_regions")):
            wanted["regions"] = "regions"
        columns = tuple(dict.fromkeys(("key", "flagged", *wanted.values(), *NEEDED)))
        parts = (part for receipt in self.ledger.receipts() for part in receipt.parts)
        for table in read_ahead(lambda part: read_part(self.ledger, part, columns), parts, WRITERS) if wanted else ():
            stored = {name: table[name].is_valid() for name in wanted.values()}  # before regions are hidden
            flagged = pc.fill_null((table if flags is None else flags.apply(table))["flagged"], False)
            for kind, name in wanted.items():
                _count(count, kind, table["key"], pc.and_not(flagged, stored[name]))
        return dict(sorted(count.counts.items()))


def _count(count: LeftOutCount, kind: str, keys: pa.ChunkedArray, mask: pa.ChunkedArray) -> None:
    names = keys.filter(mask).to_pylist()
    if names:
        count.add_all({kind: LeftOut(len(names), tuple(names))})


def plan_reflag(ledger: Ledger, models: Storage, overrides: tuple[str, ...]) -> Reflag:
    """Reads the run and the rule, and checks that the run can be reflagged by it. Writes nothing.

    Args:
        ledger: ledger of the results directory.
        models: storage of the run's artifact.
        overrides: `flag=...` and `flag.a=b`; may be empty to continue an interrupted reflag.

    Raises:
        SpecError: no or another setting, or the calibration cannot support the rule.
        ArtifactError: the artifact is missing or was replaced, and the rule needs its calibration.
        MissingError, IncompleteError: there is no run, or it is not finished.
        ResumeError: another reflag was interrupted, or the results belong to an audit.
    """
    run = ledger.run()
    if run is None:
        raise MissingError(f"{ledger.uri}: holds no run.json, so no run was started there. Check the URI.")
    before = validate(FlagSpec, run["spec"]["flag"], "run.json")
    is_resumed = UNDER_WAY in run
    flag = _new_flag(run, overrides) if overrides else before
    if is_resumed and flag != before:
        raise ResumeError(
            f"{ledger.uri}: a reflag to {before.text} was interrupted. Run `raydetect reflag` without --set to end it, "
            "and then again with the new rule."
        )
    if not overrides and not is_resumed:
        raise SpecError("--set: says by which rule images are flagged. Add, for example, --set flag.alpha=0.05.")
    _refuse_night(ledger)
    _refuse_unfinished(ledger, run)
    records: Records = {}
    if flag.smallest_p(1) is not None:
        records = _records(ledger, run, models)
        check_flag(records, flag)
    return Reflag(ledger, run, before, flag, records, is_resumed)


def _new_flag(run: Mapping[str, Any], overrides: tuple[str, ...]) -> FlagSpec:
    return validate(ReflagSpec, apply_overrides({"flag": run["spec"]["flag"]}, overrides), "--set").flag


def _refuse_night(ledger: Ledger) -> None:
    """Refuses the results of a night, which its summary and later nights have been judged by."""
    match = NIGHT.fullmatch(ledger.uri)
    if match and ledger.storage.exists(join_uri(match["folder"], "claims", f"{match['number']}.json")):
        raise ResumeError(
            f"{ledger.uri}: belongs to the audits in {match['folder']}, whose summaries and baselines were computed "
            "from its flags. Set flag in the audit's job file for later nights."
        )


def _refuse_unfinished(ledger: Ledger, run: Mapping[str, Any]) -> None:
    """Refuses a run of which shards or files are missing."""
    missing = set(range(int(run["num_shards"]))) - ledger.committed()
    if missing:
        raise IncompleteError(
            f"{ledger.uri}: the run is not finished: {len(missing):,} of {run['num_shards']:,} shards have no ledger "
            "record. Let the job end first, or start it again with the new rule in another sink.uri."
        )
    if UNDER_WAY not in run:
        gaps = Gaps(ledger, listed_files(ledger))
        for receipt in _own(ledger, rows_digest(run)):
            for part in receipt.parts:
                gaps.add(part)
        gaps.refuse()


def _own(ledger: Ledger, digest: str) -> Iterator[Receipt]:
    for receipt in ledger.receipts():
        if receipt.run not in ("", digest):
            raise IncompleteError(
                f"{ledger.uri}: ledger/{receipt.shard:05d}.json is of another job. Start the job again first."
            )
        yield receipt


def _records(ledger: Ledger, run: Mapping[str, Any], models: Storage) -> Records:
    """The records of the run's artifact, whose calibration the rule needs."""
    uri, digest = normalise_uri(str(run["spec"]["artifact"])), str(run["result"]["artifact"])
    index = read_index(uri, models)
    if index.digest != digest:
        raise ArtifactError(
            f"{uri}: was replaced since {ledger.uri} was scored by the artifact with digest {digest[:16]}, whose "
            "calibration decides on p-values. Restore that one, or set flag.threshold, which needs no calibration."
        )
    return read_records(index, models)


def _limits(flag: FlagSpec, records: Records) -> dict[str | None, float | None]:
    """The lowest flagged image score by the digest of the artifact, under None for all; None: not one by one."""
    if flag.threshold is not None or flag.nothing or flag.fdr is not None:
        return {None: flag.threshold}
    limits: dict[str | None, float | None] = {None: None}
    for record in records.values():
        scores = np.asarray(record.calibration.scores)
        setting, level = flag.smallest_p(len(scores)) or ("flag", 1.0)
        limits[record.digest] = threshold_for(scores, level, setting)
    return limits


def _with_flag(run: Mapping[str, Any], flag: FlagSpec, records: Records) -> dict[str, Any]:
    """`run.json` with another rule; the same as before the first reflag if it is the rule of the scoring again."""
    scored_with = run.get(DONE, {}).get("scored_with", run["spec"]["flag"])
    spec = {**run["spec"], "flag": to_plain(flag)}
    settings = {**run["result"]["spec"], "flag": result_settings(spec)["flag"]}
    kept = {name: value for name, value in run.items() if name not in ("flag_level", DONE)}
    changed = {**kept, "spec": spec, "result": {**run["result"], "spec": settings}}
    if flag.is_usual:
        changed["flag_level"] = by_category(records, flag_level)
    if validate(FlagSpec, scored_with, "run.json") != flag:
        changed[DONE] = {"scored_with": scored_with}
    return changed
