"""Says before a fit at which level its calibration will allow to flag, where the number of its images is known."""

from collections.abc import Iterable

from raydetect.archives.formats.loose_files import loose_names
from raydetect.archives.open import open_archive
from raydetect.archives.path_patterns import Naming
from raydetect.config import FitSpec, SourceSpec, source_storage
from raydetect.detectors._ensemble import Ensemble
from raydetect.detectors._registry import build_from
from raydetect.fitting.ensemble_scale import scaling_size
from raydetect.fitting.holdout import calibration_size
from raydetect.metrics.conformal import usual_level_text
from raydetect.records import Shard
from raydetect.storage import Storage


def level_text(spec: FitSpec, normal: int | None) -> str:
    """Why a job without a flag rule will not flag at the usual level; "" if it will, or if that is not known yet.

    Images that turn out to be bad make the level coarser. Nothing is said on fleets, whose categories have levels of
    their own, whether they share a detector or not.

    Args:
        spec: the job.
        normal: number of normal images of the source; None = unknown.
    """
    detector = build_from(spec.detector, spec.seed)
    extra = spec.calibration.source
    if extra is not None:
        archive = open_archive(extra, Storage(source_storage(spec, extra)))
        calibrated = loose_normal_images(extra, archive.shards())
    else:
        calibrated = None if normal is None or normal < 2 else calibration_size(spec, detector, normal)
    if not calibrated or spec.per_category:
        return ""
    if isinstance(detector, Ensemble):
        calibrated -= scaling_size(calibrated)
    return usual_level_text(calibrated)


def loose_normal_images(source: SourceSpec, shards: Iterable[Shard]) -> int | None:
    """Counts loose images that their paths do not label anomalous, without reading one; None with other shards."""
    naming, count = Naming.of(source), 0
    for shard in shards:
        if shard.format != "prefix":
            return None
        found = map(naming.read, loose_names(shard))
        count += sum(facts is not None and facts.label != 1 for facts in found)
    return count
