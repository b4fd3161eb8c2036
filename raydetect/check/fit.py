"""Checks of a fit job. They build its detector, so they import torch."""

from functools import partial

from raydetect.archives.formats.loose_files import loose_names
from raydetect.archives.open import open_archive
from raydetect.archives.path_patterns import Naming
from raydetect.artifacts.fit_preprocess import FitRules, fit_preprocess
from raydetect.artifacts.replacement import refuse_existing
from raydetect.check.incomplete import REPLACE
from raydetect.check.locations import Check, first_shard, reachable
from raydetect.config import FitSpec, ResourceSpec, source_storage
from raydetect.detectors._ensemble import learns_from_labels, parts
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.fitting.holdout import crosses
from raydetect.fitting.reading.auxiliary import require_auxiliary
from raydetect.storage import Storage, normalise_uri


def fit_checks(spec: FitSpec) -> list[Check]:
    """Returns the checks of a fit job."""
    checks: list[Check] = [
        lambda: build_from(spec.detector, spec.seed).load_weights(),
        lambda: first_shard(spec.source, source_storage(spec, spec.source)),
        lambda: reachable(spec.artifact, spec.storage, "artifact"),
        lambda: _free(spec),
        lambda: _trainable(spec),
        lambda: _labelled(spec),
        lambda: _masks(spec),
    ]
    for extra in (spec.calibration.source, spec.auxiliary):
        if extra is not None:
            checks.append(partial(first_shard, extra, source_storage(spec, extra)))
    return checks


def _free(spec: FitSpec) -> None:
    """Checks that no artifact is replaced unasked; one that is extended in place is named by the job itself.

    Raises:
        SpecError: there is one.
    """
    in_place = spec.extend is not None and normalise_uri(spec.extend) == normalise_uri(spec.artifact)
    if not (spec.replace or in_place):
        refuse_existing(spec.artifact, Storage(spec.storage), "artifact", REPLACE)


def _trainable(spec: FitSpec) -> None:
    """Checks settings that only some detectors support.

    Raises:
        SpecError: this detector does not support a setting of the job.
    """
    detector = build_from(spec.detector, spec.seed)
    phases = {phase for _, part in parts(detector) for phase in part.phases}
    crosses(spec, detector, 0)
    require_auxiliary(spec, detector)
    if spec.resources.detectors_in_memory != ResourceSpec().detectors_in_memory:
        raise SpecError("resources.detectors_in_memory: applies to scoring with a fleet, not to a fit. Remove it.")
    if spec.extend is not None:
        if "collect" not in phases:
            raise SpecError(f"extend: {spec.detector.name} has no memory bank to extend. Fit it again on all images.")
        fit_preprocess(spec)


def _masks(spec: FitSpec) -> None:
    """Reads the mask and picture that the view names, and those of the categories in the paths of loose images.

    Raises:
        SpecError: one is missing or cannot be used.
    """
    rules = FitRules(spec)
    if not spec.view.has_files_of_category:
        return
    naming = Naming.of(spec.source)
    for shard in open_archive(spec.source, Storage(source_storage(spec, spec.source))).shards():
        if shard.format == "prefix":
            for facts in map(naming.read, loose_names(shard)):
                rules.of(None if facts is None else facts.category)


def _labelled(spec: FitSpec) -> None:
    """Checks the labels of loose images, which come from their paths and are known before an image is read.

    Raises:
        SpecError: the detector needs anomalous images, all images are loose, and no path, or no path of one category
            of a fleet, is labelled anomalous.
    """
    if not learns_from_labels(build_from(spec.detector, spec.seed)):
        return
    naming, has_anomalous = Naming.of(spec.source), dict[str, bool]()
    for shard in open_archive(spec.source, Storage(source_storage(spec, spec.source))).shards():
        if shard.format != "prefix":
            return  # sidecars or a label column inside may have labels
        for facts in map(naming.read, loose_names(shard)):
            if facts is not None:
                group = (facts.category or "") if spec.per_category is True else ""
                has_anomalous[group] = has_anomalous.get(group, False) or facts.label == 1
    lacking = sorted(group for group, found in has_anomalous.items() if not found)
    if lacking:
        of = f" of category {lacking[0]!r}" if lacking[0] else ""
        raise SpecError(
            f"source.pattern: {spec.detector.title} needs labelled anomalous images, and no path{of} is labelled "
            "anomalous. Add some, and label them by {defect} or {label} in the pattern."
        )
