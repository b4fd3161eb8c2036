"""Recalibrates a fitted artifact: scores normal images it has not seen to set new thresholds, without fitting.

The new artifact has the tensors of the old one and a record that refers to it (`lineage`). A fleet gets a new
calibration for every category, from images of that category; a detector that its categories share is loaded once.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from raydetect.artifacts.fleet import ArtifactIndex, member_uri, read_index, read_records, write_fleet
from raydetect.artifacts.record import ArtifactRecord, Calibration, write_record
from raydetect.artifacts.replacement import remove_replaced
from raydetect.artifacts.store import load_artifact, package_versions
from raydetect.artifacts.tensor_header import tensors_uri
from raydetect.blocks.coresets.group import Group
from raydetect.config import CalibrateSpec, public_spec
from raydetect.config.validation import to_plain
from raydetect.detectors._base import Detector
from raydetect.errors import SpecError
from raydetect.fitting.calibrate import calibrate
from raydetect.fitting.fit_run import ProgressCallback
from raydetect.fitting.holdout import normal_keys
from raydetect.fitting.image_cache import ImageCache
from raydetect.fitting.reading.counts import ReadImages
from raydetect.images.decode import DecodePool, decode_stream
from raydetect.images.opening import DecodeRules
from raydetect.records import Chunk, Member
from raydetect.storage import Storage, join_uri, normalise_uri


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """The result of a recalibration.

    Attributes:
        uri: of the new artifact.
        digest: of the new artifact.
        held_out: number of calibration images by category; the key is None for an artifact that is not a fleet.
        before: the same numbers for the old artifact.
        bad: number of images that could not be used.
    """

    uri: str
    digest: str
    held_out: dict[str | None, int]
    before: dict[str | None, int]
    bad: int


@dataclass(slots=True)
class _Images:
    """Images by category, each decoded by the rules of its detector."""

    caches: dict[str | None, ImageCache]
    counts: ReadImages = field(default_factory=ReadImages)


def recalibrate(
    spec: CalibrateSpec, chunks: Iterable[Chunk], on_progress: ProgressCallback, device: torch.device
) -> Recalibrated:
    """Scores the images of the source and writes the artifact with the new calibration.

    Raises:
        SpecError: a category has no normal image, or the detector was fitted on this source.
        ArtifactError: the artifact is missing or damaged.
        TooManyBadRows: too many images are bad; nothing is written.
        CalibrationError: a score is not finite.
    """
    torch.set_num_threads(spec.resources.cpus_per_worker)
    storage, uri = Storage(spec.storage), normalise_uri(spec.output)
    index = read_index(normalise_uri(spec.artifact), storage)
    records = read_records(index, storage)
    refuse_fitted(spec, records.values())
    storage.require_writable(uri)
    storage.remove_leftovers(uri)
    images = _read(spec, index, records, chunks, on_progress)
    bad = images.counts.checked_total(Group(), spec.max_bad_fraction, ", ".join(spec.source.uris())).bad
    keys = {name: _keys(record, images.caches[name]) for name, record in records.items()}
    detectors = _detectors(index, records, storage, device)
    calibrations = {
        name: _new_calibration(spec, detector, images.caches[name], keys[name], on_progress)
        for name, detector in detectors
    }
    digests = {
        name: _write(spec, record, calibrations[name], _place(uri, name), bad, index.is_shared)
        for name, record in records.items()
    }
    if index.is_shared and uri != index.uri:
        _copy_tensors(index.uri, uri, storage, index.body["tensors"])
    members = {name: digest for name, digest in digests.items() if name is not None}
    new_digest = write_fleet(uri, storage, members, index.body) if members else digests[None]
    remove_replaced(uri, storage)
    held_out = {name: len(calibration.scores) for name, calibration in calibrations.items()}
    before = {name: len(record.calibration.scores) for name, record in records.items()}
    return Recalibrated(uri, new_digest, held_out, before, bad)


def refuse_fitted(spec: CalibrateSpec, records: Iterable[ArtifactRecord]) -> None:
    """Refuses a source that a detector was fitted on, as its images score too low for a calibration.

    Raises:
        SpecError: a detector was fitted on one of the source's URIs.
    """
    uris = {normalise_uri(uri).rstrip("/") for uri in spec.source.uris()}
    for record in records:
        source = record.body.get("spec", {}).get("source", {}).get("uri", [])
        fitted = [source] if isinstance(source, str) else source
        common = sorted(uris & {normalise_uri(uri).rstrip("/") for uri in fitted})
        if common:
            raise SpecError(
                f"source.uri: the detector was fitted on {common[0]}, and p-values are valid only for images it has "
                "not seen. Use other normal images."
            )


def _read(
    spec: CalibrateSpec,
    index: ArtifactIndex,
    records: dict[str | None, ArtifactRecord],
    chunks: Iterable[Chunk],
    on_progress: ProgressCallback,
) -> _Images:
    images = _Images({name: ImageCache(record.preprocess) for name, record in records.items()})
    for chunk in chunks:
        images.counts.note_chunk(chunk)
        groups: dict[str | None, list[Member]] = {}
        for member in chunk.members:
            name = member.category if index.categories else None
            if name in images.caches:
                groups.setdefault(name, []).append(member)
            else:
                images.counts.note_bad(f"{member.key}: the fleet has no detector for category {name!r}.")
        for name, members in groups.items():
            _decode(spec, members, images.caches[name], images.counts)
        on_progress("read images", len(chunk.members), None)
    return images


def _decode(spec: CalibrateSpec, members: list[Member], cache: ImageCache, counts: ReadImages) -> None:
    with DecodePool(spec.resources.cpus_per_worker) as pool:
        decoded = decode_stream(members, DecodeRules.of(spec.source), cache.preprocess, pool)
        for member in members:
            counts.note(member, cache.add_decoded(member, decoded), spec.source)


def _detectors(
    index: ArtifactIndex, records: Mapping[str | None, ArtifactRecord], storage: Storage, device: torch.device
) -> Iterator[tuple[str | None, Detector]]:
    """Yields the detector of each category, loaded when it is needed; one that all share is loaded once."""
    first = next(iter(records.values()))
    shared = load_artifact(first.uri, storage).detector.to(device) if index.is_shared else None
    for name, record in records.items():
        yield name, shared or load_artifact(record.uri, storage).detector.to(device)


def _keys(record: ArtifactRecord, cache: ImageCache) -> list[str]:
    keys = normal_keys(cache)
    if not keys:
        raise SpecError(f"{record.uri}: the source has no normal image to calibrate it on. Add some.")
    return keys


def _new_calibration(
    spec: CalibrateSpec, detector: Detector, cache: ImageCache, keys: list[str], on_progress: ProgressCallback
) -> Calibration:
    return calibrate(
        detector, cache, [keys], spec.batch_size, Group(), lambda done: on_progress("calibrate images", done, None)
    )


def _copy_tensors(uri: str, new_uri: str, storage: Storage, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Copies tensors into the folder of an artifact of their own, and returns their entry there."""
    storage.write(join_uri(new_uri, entry["file"]), storage.read(tensors_uri(uri, entry)))
    return {name: value for name, value in entry.items() if name != "shared"}


def _place(uri: str, category: str | None) -> str:
    return uri if category is None else member_uri(uri, category)


def _write(
    spec: CalibrateSpec, record: ArtifactRecord, calibration: Calibration, uri: str, bad: int, shares: bool
) -> str:
    """Writes one detector's artifact, or only its record if it shares the tensors of the fleet; returns its digest."""
    storage, body = Storage(spec.storage), dict(record.body)
    if uri != record.uri and not shares:
        body["tensors"] = _copy_tensors(record.uri, uri, storage, body["tensors"])
    images: dict[str, Any] = {**body.get("images", {}), "held_out": len(calibration.scores)}
    images.pop("held_out_tiles", None)  # those of the fit, by which its rate was measured
    entry = {"artifact": record.uri, "digest": record.digest, "images": body.get("images", {})}
    changed = {
        "calibration": to_plain(calibration),
        "calibrated_by": {"spec": public_spec(spec), "bad": bad, "packages": package_versions()},
        "images": images,
        "lineage": [*body.get("lineage", []), entry],
    }
    return write_record(uri, storage, {**body, **changed})
