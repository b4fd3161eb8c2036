"""Describes how a job will read its source, before it runs: labels, files left out, and notes on the listing."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice

from raydetect.archives.base import Archive, Listing
from raydetect.archives.chunks import read_members
from raydetect.archives.labels import labels_text
from raydetect.archives.open import open_archive
from raydetect.check.first_images import MAX_BYTES, MAX_IMAGES, FirstImages
from raydetect.config import (
    AuditSpec,
    CalibrateSpec,
    EvaluateSpec,
    FitSpec,
    JobSpec,
    ScoreSpec,
    SourceSpec,
    source_storage,
)
from raydetect.errors import SpecError
from raydetect.images.opening import DecodeRules
from raydetect.left_out import LeftOutCount, left_out_text
from raydetect.records import Member
from raydetect.storage import Storage


def source_lines(spec: JobSpec) -> list[str]:
    """Returns one line for each fact; reads only the first images, up to MAX_IMAGES and MAX_BYTES.

    Raises:
        RaydetectError: the source cannot be read.
    """
    if isinstance(spec, EvaluateSpec):
        from raydetect.check.evaluate import evaluation_hints

        return [f"Hint: {hint}" for hint in evaluation_hints(spec)]
    if not isinstance(spec, FitSpec | ScoreSpec | AuditSpec | CalibrateSpec):
        return []
    archive, listing = _listed(spec)
    left_out = LeftOutCount()
    counts: Counter[tuple[int | None, str]] = Counter()
    seen = _first_images(spec) if isinstance(spec, FitSpec) else None
    is_all = False
    for member in _first_members(archive, listing, spec.source, left_out):
        if member is None:
            is_all = True
        else:
            counts[member.label, member.raw_label] += 1
            if seen is not None:
                seen.note(member)
    if is_all:
        _refuse_useless(spec, counts, left_out)
    if seen is not None:
        seen.refuse_unreadable("source.uri")
    lines = [f"Note: {note}" for note in listing.notes] + _seen_lines(counts, left_out, is_all)
    if seen is None:
        return lines
    return [*lines, *_level(spec, listing, counts if is_all else None), *(f"Hint: {hint}" for hint in seen.hints())]


def _seen_lines(counts: Counter[tuple[int | None, str]], left_out: LeftOutCount, is_all: bool) -> list[str]:
    of = "" if is_all else f", of the first {counts.total():,} images"
    lines = []
    if any(label is not None for label, _ in counts):
        lines.append(f"label: {labels_text([(*key, count) for key, count in counts.items()])}{of}")
    if left_out.counts:
        lines.append(f"Left out{of}: {left_out_text(left_out.counts)}")
    return lines


def _level(spec: JobSpec, listing: Listing, counts: Counter[tuple[int | None, str]] | None) -> list[str]:
    """Says at which level the fit will allow to flag, from all images that were read or else from the listing."""
    from raydetect.check.level import level_text, loose_normal_images

    assert isinstance(spec, FitSpec)
    if counts is None:
        normal = loose_normal_images(spec.source, listing.shards)
    else:
        normal = sum(count for (label, _), count in counts.items() if label != 1)
    text = level_text(spec, normal)
    return [f"Note: {text}."] if text else []


def _listed(spec: FitSpec | ScoreSpec | AuditSpec | CalibrateSpec) -> tuple[Archive, Listing]:
    """The archive and its listing; for a scoring job with the notes of its plan."""
    if isinstance(spec, ScoreSpec):
        from raydetect.planning.plan import plan_score

        plan = plan_score(spec)
        return plan.archive, Listing(plan.shards, plan.notes)
    archive = open_archive(spec.source, Storage(source_storage(spec, spec.source)))
    return archive, archive.listing()


def _first_images(spec: FitSpec) -> FirstImages:
    """What the fit would see; imports torch, as its other checks did."""
    from raydetect.artifacts.fit_preprocess import FitRules

    return FirstImages(DecodeRules.of(spec.source), FitRules(spec).of)


def _refuse_useless(spec: JobSpec, counts: Counter[tuple[int | None, str]], left_out: LeftOutCount) -> None:
    """Refuses a source that the job would refuse after reading everything.

    Raises:
        SpecError: there is no image, or no normal image to fit on.
    """
    assert isinstance(spec, FitSpec | ScoreSpec | AuditSpec | CalibrateSpec)
    where = ", ".join(spec.source.uris())
    if not counts:
        text = left_out_text(left_out.counts) or "nothing"
        raise SpecError(f"{where}: has no images; left out: {text}. Check source.uri, format and pattern.")
    if isinstance(spec, FitSpec) and all(label == 1 for label, _ in counts):
        text = labels_text([(*key, count) for key, count in counts.items()])
        raise SpecError(f"{where}: has no normal images (label: {text}). Set source.normal_names, or add some.")


def _first_members(
    archive: Archive, listing: Listing, source: SourceSpec, left_out: LeftOutCount
) -> Iterator[Member | None]:
    """Yields the first members, then None if these are all."""
    left_out.add_all(listing.shards[0].left_out)
    held = 0
    members = chain.from_iterable(read_members(archive, shard, source, left_out) for shard in listing.shards)
    for member in islice(members, MAX_IMAGES):
        yield member
        held += len(member.data)
        if held > MAX_BYTES:
            return
    if next(members, None) is None:
        yield None
