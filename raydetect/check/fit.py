"""Mistakes of a fit job. Its detector is built, so this loads torch."""

from raydetect.archives.naming import Naming
from raydetect.archives.open import open_archive
from raydetect.archives.prefix import loose_names
from raydetect.artifact_record import read_record
from raydetect.check.places import Check, first_shard, reachable
from raydetect.detectors._ensemble import learns_from_labels, parts
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.spec import FitSpec, ResourceSpec, source_storage
from raydetect.storage import Storage, normalise_uri


def fit_checks(spec: FitSpec) -> list[Check]:
    """What can be said of a fit before it runs."""
    checks: list[Check] = [
        lambda: build_from(spec.detector, spec.seed).load_weights(),
        lambda: first_shard(spec.source, source_storage(spec, spec.source)),
        lambda: reachable(spec.artifact, spec.storage, "artifact"),
        lambda: _trainable(spec),
        lambda: _labelled(spec),
    ]
    extra = spec.calibration.source
    if extra is not None:
        checks.append(lambda: first_shard(extra, source_storage(spec, extra)))
    return checks


def _trainable(spec: FitSpec) -> None:
    """Words of the job that only some detectors understand.

    Raises:
        SpecError: this one does not.
    """
    phases = {phase for _, part in parts(build_from(spec.detector, spec.seed)) for phase in part.phases}
    if spec.precision != "float32" and "train" not in phases:
        raise SpecError(f"precision: {spec.detector.title} is not trained, so only float32 fits it. Remove it.")
    if spec.resources.detectors_in_memory != ResourceSpec().detectors_in_memory:
        raise SpecError("resources.detectors_in_memory: is for scoring with a fleet, not for a fit. Remove it.")
    if spec.extend is not None:
        if "collect" not in phases:
            raise SpecError(f"extend: {spec.detector.name} has no memory bank to extend. Fit it anew on all images.")
        read_record(normalise_uri(spec.extend), Storage(spec.storage))


def _labelled(spec: FitSpec) -> None:
    """Labels of loose images stand in their paths, so they are known before an image is read.

    Raises:
        SpecError: the detector learns from anomalous images, all images are loose, and no path of them, or of one
            category of a fleet, tells of one.
    """
    if not learns_from_labels(build_from(spec.detector, spec.seed)):
        return
    naming, told = Naming.of(spec.source), dict[str, bool]()
    for shard in open_archive(spec.source, Storage(source_storage(spec, spec.source))).shards():
        if shard.format != "prefix":
            return  # sidecars or a column inside may tell
        for facts in map(naming.read, loose_names(shard)):
            if facts is not None:
                group = (facts.category or "") if spec.per_category else ""
                told[group] = told.get(group, False) or facts.label == 1
    lacking = sorted(group for group, found in told.items() if not found)
    if lacking:
        of = f" of category {lacking[0]!r}" if lacking[0] else ""
        raise SpecError(
            f"source.pattern: {spec.detector.title} learns from some anomalous images, and no path{of} tells of one. "
            "Add some, and let {defect} or {label} of the pattern tell them."
        )
