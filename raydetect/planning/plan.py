"""Plans the remaining shards of a scoring job, which are the listing minus the ledger, and finishes the job."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from raydetect.archives.base import Archive, Listing, archive_fingerprint
from raydetect.archives.open import open_archive
from raydetect.artifacts.fleet import ArtifactIndex, read_index, read_records
from raydetect.artifacts.record import ArtifactRecord
from raydetect.artifacts.region_threshold import RegionThreshold
from raydetect.config import FlagSpec, ScoreSpec, SourceSpec, public_spec, result_settings, sink_storage, source_storage
from raydetect.config.validation import to_plain, validate
from raydetect.errors import SpecError, TooManyBadRows
from raydetect.metrics.conformal import ROUNDING, threshold_for
from raydetect.metrics.discovery import discover
from raydetect.planning.late_images import ACCEPTED, Change, compare, read_shards, refuse_changed, write_shards
from raydetect.records import OK, Shard
from raydetect.sinks.consistency import (
    complete,
    refuse_other_shards,
    refuse_taken,
    refuse_without_images,
    rows_digest,
    rows_with,
)
from raydetect.sinks.ledger import Ledger, Totals
from raydetect.sinks.parquet import ResultsSink
from raydetect.sinks.reflagging import DONE, refuse_under_way
from raydetect.sinks.run_progress import has_regions
from raydetect.storage import Storage, normalise_uri

CARRIED = ("region_threshold", DONE)  # entries of run.json that stay as they were before a reflag


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """A scoring job after validation and listing; nothing is written yet.

    Attributes:
        spec: the job.
        archive: the opened archive.
        shards: the whole listing.
        todo: shards without a ledger record.
        artifact: maps each category to the artifact that scores it.
        records: artifact records by category; a single one under None without a fleet.
        ledger: ledger of the results directory.
        run: content of `run.json`.
        before: the existing `run.json`, if it has an older listing of the archive with the same committed shards; else
            None.
        notes: remarks on the source for the user.
        late: how the archive has changed, if that is accepted now.
        retried: committed shards that are scored again, with the number of rows that are the reason.
    """

    spec: ScoreSpec
    archive: Archive
    shards: tuple[Shard, ...]
    todo: tuple[Shard, ...]
    artifact: ArtifactIndex
    records: Mapping[str | None, ArtifactRecord]
    ledger: Ledger
    run: Mapping[str, Any]
    before: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    retried: Mapping[int, int] = field(default_factory=dict)
    late: Change | None = None

    def begin(self) -> None:
        """Writes `run.json` if it is missing or has an older listing; removes the manifest of an older listing.

        Raises:
            ResumeError: another job was started there.
        """
        if self.late is not None:
            write_shards(self.ledger, self.run["result"]["archive"], self.shards, self.run[ACCEPTED])
        is_new = self.ledger.begin(self.run, self.before)
        if self.todo:
            self.ledger.remove_leftovers()
            self.ledger.withdraw(self.retried)
        if is_new:
            known = {shard.index for shard in self.shards} - {shard.index for shard in self.todo}
            refuse_taken(self.ledger, self.ledger.committed() - known, self.shards, rows_digest(self.run))

    @property
    def sink(self) -> ResultsSink:
        """The sink that workers write to."""
        return ResultsSink(self.ledger.uri, self.ledger.storage)


def only_record(artifact: ArtifactIndex, records: Mapping[str | None, ArtifactRecord]) -> ArtifactRecord:
    """Returns the record of a single artifact.

    Raises:
        SpecError: it is a fleet, whose banks cannot be sharded.
    """
    if artifact.categories:
        raise SpecError(
            f"resources.bank_shards: {artifact.uri} is a fleet, whose banks cannot be sharded. Set it to 1."
        )
    return records[None]


def plan_score(
    spec: ScoreSpec,
    chosen: tuple[Shard, ...] | None = None,
    retry: tuple[str, ...] = (),
    accept_new: bool = False,
) -> ScorePlan:
    """Lists the archive, reads the artifact's records and the ledger, and checks that they match. Writes nothing.

    Args:
        spec: the job.
        chosen: shards of an earlier listing, numbered from 0, instead of all.
        retry: statuses; committed shards that contain rows with one of them are scored again.
        accept_new: whether an archive that has changed is accepted, of which only what is new is scored.

    Raises:
        SpecError, StorageError, ArtifactError, ResumeError: the job cannot run as it is.
    """
    artifact = read_index(normalise_uri(spec.artifact), Storage(spec.storage))
    records = read_records(artifact, Storage(spec.storage))
    if spec.resources.bank_shards > 1:
        only_record(artifact, records).require_bank(spec.resources.bank_shards)
    check_flag(records, spec.flag)
    ledger = Ledger(normalise_uri(spec.sink.uri), Storage(sink_storage(spec)))
    archive = open_archive(spec.source, Storage(source_storage(spec, spec.source)))
    listing = archive.listing() if chosen is None else Listing(chosen)
    content, shards = Storage(source_storage(spec, spec.source)), listing.shards
    refuse_without_categories(spec.source, artifact, shards)
    run = describe_run(spec, artifact, records, shards)
    before = ledger.compare(run)
    refuse_under_way(ledger.uri, before)
    if before is not None and DONE in before:
        run |= {name: before[name] for name in CARRIED if name in before}
    committed = ledger.committed()
    late, kept = None, read_shards(ledger, run["result"]["archive"]) if before is not None else None
    if kept is None and accept_new and before is not None and before["result"] != to_plain(run["result"]):
        late = compare(ledger, committed, shards, spec.source, content)
        refuse_changed(ledger, late)
        kept = late.shards, late.plain(before.get(ACCEPTED, {}))
    if kept is not None:
        shards = kept[0]
        run |= {**_sizes(shards), ACCEPTED: kept[1]}
    retried = rows_with(retry, ledger, committed)
    committed -= retried.keys()
    if before is None or before["result"] != to_plain(run["result"]):
        described = partial(_change_text, ledger, committed, listing.shards, spec.source)
        refuse_other_shards(ledger, committed, shards, rows_digest(run), described)
    else:
        before = None
    todo = tuple(shard for shard in shards if shard.index not in committed)
    notes = (*listing.notes, *_job_notes(spec, run, bool(todo)))
    return ScorePlan(spec, archive, shards, todo, artifact, records, ledger, run, before, notes, retried, late)


def _job_notes(spec: ScoreSpec, run: Mapping[str, Any], has_work: bool) -> Iterator[str]:
    """What a person may not expect of the results of a job with shards to score."""
    if has_work and spec.flag.nothing and spec.sink.heatmaps == "flagged":
        yield "flag: none flags no image, so sink.heatmaps: flagged stores no heatmap. Set it to all or top_k for some."
    has_maps = spec.sink.style == "map" and spec.sink.heatmaps != "none"
    if has_work and not has_maps and not has_regions(run):
        yield (
            "rows will have no regions and no anomaly maps are stored, so `raydetect export --as coco` will not be "
            "possible. Set sink.style: map, and sink.heatmaps: flagged or all, if outlines are needed."
        )
    if has_work and DONE in run:
        scored_with = validate(FlagSpec, run[DONE]["scored_with"], "run.json")
        yield (
            f"the results were reflagged; shards scored now have the regions and heatmaps of {spec.flag.text}, the "
            f"others those of {scored_with.text}."
        )


def check_flag(records: Mapping[str | None, ArtifactRecord], flag: FlagSpec) -> None:
    """Checks that every detector has enough held-out images for the flag rule.

    For `fdr`, checks the number required if every image is flagged; fewer flags require more
    (`Discovery.needed_held_out`).

    Raises:
        SpecError: a detector has too few; names the category with the fewest.
    """
    smallest = min(records, key=lambda category: len(records[category].calibration.scores))
    scores = np.asarray(records[smallest].calibration.scores)
    smallest_p = flag.smallest_p(len(scores))
    if smallest_p is None:
        return
    try:
        threshold_for(scores, smallest_p[1], smallest_p[0])
    except SpecError as error:
        raise SpecError(str(error) if smallest is None else f"category {smallest!r}: {error}") from None


def refuse_without_categories(source: SourceSpec, artifact: ArtifactIndex, shards: tuple[Shard, ...]) -> None:
    """Checks that images can have a category, which a fleet needs; loose images have it in their path only.

    Raises:
        SpecError: no image of the source can have a category.
    """
    loose = bool(shards) and all(shard.format == "prefix" for shard in shards)
    if artifact.categories and loose and "{category}" not in (source.pattern or ""):
        raise SpecError(
            f"source.pattern: has no {{category}}, by which the fleet {artifact.uri} selects a detector. "
            "Add it, such as {category}/{name}."
        )


def by_category(
    records: Mapping[str | None, ArtifactRecord], describe: Callable[[ArtifactRecord], dict[str, Any]]
) -> dict[str, Any]:
    """An entry of `run.json` about a detector; for a fleet, those of every category under `categories`."""
    single = records.get(None)
    if single is not None:
        return describe(single)
    return {"categories": {category: describe(record) for category, record in records.items()}}


def _scale(record: ArtifactRecord) -> dict[str, Any]:
    """`low` and `high` of heatmaps with style `map`."""
    low, high = record.calibration.map_scale()
    return {"low": low, "high": high}


def flag_level(record: ArtifactRecord) -> dict[str, Any]:
    """The p-value at which images are flagged if the job states no rule, and what it follows from."""
    calibrated = len(record.calibration.scores)
    _, level = FlagSpec().smallest_p(calibrated) or ("", 1.0)
    return {"level": level, "calibrated": calibrated}


def _view(record: ArtifactRecord) -> dict[str, Any]:
    """What tells where maps lie in their pictures: the size of the inputs and the view, without its region."""
    return {"image_size": list(record.image_size), **to_plain(record.preprocess.view.spec.recorded())}


def _sizes(shards: tuple[Shard, ...]) -> dict[str, int]:
    return {"num_shards": len(shards), "num_bytes": sum(shard.size_bytes for shard in shards)}


def _change_text(ledger: Ledger, committed: Iterable[int], listed: tuple[Shard, ...], source: SourceSpec) -> str:
    """What has changed in an archive, and what to do."""
    change = compare(ledger, committed, listed, source, None)
    text = f"In all: {change.text()}. " if change.text() else ""
    if change.changed or not change.text():
        return f"{text}Use another sink.uri." if text else ""
    return f"{text}Use another sink.uri, or score only what is new with `raydetect score --accept-new`."


def describe_run(
    spec: ScoreSpec,
    artifact: ArtifactIndex,
    records: Mapping[str | None, ArtifactRecord],
    shards: tuple[Shard, ...],
) -> dict[str, Any]:
    """The content of `run.json`."""
    public = public_spec(spec)
    members = {category: ref.digest for category, ref in artifact.categories.items()}
    return {
        "kind": "score",
        "spec": public,
        "result": {
            "spec": result_settings(public),
            "artifact": artifact.digest,
            "archive": archive_fingerprint(shards),
            **({"categories": members} if members else {}),  # so that a resume can name the one that differs
        },
        **_sizes(shards),
        "heatmap_scale": by_category(records, _scale),
        "region_threshold": by_category(
            records, lambda record: RegionThreshold.of(record.calibration, spec.flag, spec.sink.max_regions).plain()
        ),
        **({"flag_level": by_category(records, flag_level)} if spec.flag.is_usual else {}),
        "view": by_category(records, _view),
        "packages": artifact.body.get("packages", {}),
        **_rasters(records),
    }


def _rasters(records: Mapping[str | None, ArtifactRecord]) -> dict[str, Any]:
    """The bands and range by which pictures are shown in reports, if all artifacts look at the same ones."""
    specs = {record.preprocess.view.spec for record in records.values()}
    stated = {(spec.bands, spec.range) for spec in specs}
    if len(stated) != 1 or stated == {(None, None)}:
        return {}
    ((bands, values),) = stated
    return {"rasters": {"bands": bands, "range": values}}


def finish(plan: ScorePlan) -> dict[str, Any]:
    """Writes the manifest of a complete run and checks the number of bad rows.

    Raises:
        StorageError: records or files of planned shards are missing; no manifest is written.
        ResumeError: another job has taken over the results directory.
        TooManyBadRows: more bad rows or shards than the job allows; everything is still written.
    """
    whole = partial(complete, plan.ledger, shards=plan.shards, run=rows_digest(plan.run))
    plan.ledger.require_own(plan.run)
    where = ", ".join(plan.spec.source.uris())
    manifest = plan.ledger.finish(manifest_facts(plan.run), partial(decide, plan.spec.flag, plan.records, where), whole)
    refuse_too_many_bad_rows(manifest, plan.spec.max_bad_fraction, plan.ledger.uri)
    return manifest


def manifest_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `run.json` that the manifest repeats."""
    names = ("kind", "result", "num_bytes", "heatmap_scale", ACCEPTED, *CARRIED)
    return {**{name: run[name] for name in names if name in run}, "heatmap_style": run["spec"]["sink"]["style"]}


def decide(flag: FlagSpec, records: Mapping[str | None, ArtifactRecord], where: str, totals: Totals) -> dict[str, Any]:
    """Decides the flags that depend on the whole archive (`flag.fdr`), for the manifest.

    Args:
        flag: the job's flag rule.
        records: artifact records by category; a single one under None without a fleet.
        where: the source, for messages.
        totals: sums of all receipts.

    Returns:
        `flagged`, and `fdr` with the p-value threshold and, for every artifact, the lowest flagged image score (None if
        no row is flagged); empty for other flag rules.
    """
    refuse_without_images(totals, where)
    level = flag.fdr
    if level is None:
        return {}
    held_out = max(len(record.calibration.scores) for record in records.values())
    discovery = discover(totals.p_counts, level, held_out)
    record = records.get(None)
    thresholds = {category or "": _score_threshold(r, discovery.p_threshold) for category, r in records.items()}
    facts = {**to_plain(discovery), "false_share": discovery.false_share}
    facts["threshold"] = {"categories": thresholds} if record is None else thresholds[""]
    return {"flagged": discovery.flagged, "fdr": facts}


def _score_threshold(record: ArtifactRecord, p_threshold: float | None) -> float | None:
    scores = np.asarray(record.calibration.scores)
    if p_threshold is None or p_threshold * (len(scores) + 1) < 1 - ROUNDING:
        return None
    return threshold_for(scores, p_threshold)


def refuse_too_many_bad_rows(manifest: Mapping[str, Any], limit: float, uri: str) -> None:
    """Checks the number of bad rows and shards of a finished run.

    Raises:
        TooManyBadRows: it exceeds the limit.
    """
    rows, bad = manifest["rows"], manifest["bad_rows"]
    shards, bad_shards = manifest["shards"], manifest["bad_shards"]
    if bad > limit * rows or bad_shards > limit * shards:
        kinds = ", ".join(f"{count} {status}" for status, count in manifest["statuses"].items() if status != OK)
        raise TooManyBadRows(
            f"{uri}: {bad} of {rows} rows and {bad_shards} of {shards} shards are bad ({kinds}), more than "
            f"max_bad_fraction = {limit}. All rows are written; see the column `error`."
        )
