"""One worker's part of a fit job: reads and decodes the archive once, then fits one detector or a fleet."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from raydetect.artifacts.fit_preprocess import FitRules
from raydetect.blocks.coresets.group import Group
from raydetect.config import FitSpec, SourceSpec, source_storage
from raydetect.detectors._registry import build_from
from raydetect.fitting.fit_run import FitRun, ProgressCallback
from raydetect.fitting.fleet import fit_fleet, fit_shared
from raydetect.fitting.holdout import drop_duplicates
from raydetect.fitting.image_cache import ImageCache
from raydetect.fitting.reading.auxiliary import AuxiliaryImages, auxiliary_kind, require_auxiliary
from raydetect.fitting.reading.counts import ReadFacts
from raydetect.fitting.reading.images import read_images
from raydetect.fitting.shared_errors import shared_errors
from raydetect.fitting.timings import Phases
from raydetect.records import Chunk, FitReport
from raydetect.storage import Storage, normalise_uri
from raydetect.views.hints import dark_hints, hints


def fit_worker(
    spec: FitSpec,
    chunks: Iterable[Chunk],
    calibration: Iterable[Chunk] | None,
    group: Group,
    on_progress: ProgressCallback,
    device: torch.device,
    auxiliary: Iterable[Chunk] | None = None,
) -> FitReport | None:
    """Runs one worker's part of a fit job, starting from encoded images.

    Args:
        spec: the job.
        chunks: this worker's encoded images.
        calibration: this worker's encoded images of the separate calibration archive, if the job has one.
        group: the workers.
        on_progress: progress callback.
        device: torch device of this worker.
        auxiliary: this worker's encoded auxiliary images, if the job has some.

    Returns:
        The report on the first worker, None on the others.

    Raises:
        SpecError: the job cannot run as specified.
        TooManyBadRows: too many images are bad.
    """
    torch.set_num_threads(spec.resources.cpus_per_worker)
    phases = Phases()
    with phases.phase("read"):
        cache, read = _read(spec, spec.source, chunks, group, on_progress, "read images")
        calibration_cache = None
        if calibration is not None:
            assert spec.calibration.source is not None
            calibration_cache, _ = _read(
                spec, spec.calibration.source, calibration, group, on_progress, "read calibration images"
            )
        auxiliary_images = None if auxiliary is None else read_auxiliary(spec, auxiliary, group, on_progress)
    where = ", ".join(spec.source.uris()) + read.labels_text
    work = FitRun(
        spec,
        normalise_uri(spec.artifact),
        group,
        cache,
        calibration_cache,
        on_progress,
        device,
        where,
        phases,
        auxiliary_images,
    )
    if spec.per_category == "calibration":
        return fit_shared(work, read)
    return fit_fleet(work, read) if spec.per_category else work.run(read)


def read_auxiliary(
    spec: FitSpec, chunks: Iterable[Chunk], group: Group, on_progress: ProgressCallback
) -> AuxiliaryImages:
    """Reads auxiliary images at the size of the others; a region or alignment is of the parts to score alone.

    Args:
        spec: the job, with `auxiliary`.
        chunks: this worker's encoded auxiliary images.
        group: the workers.
        on_progress: progress callback.

    Raises:
        RaydetectError: images are bad and the job does not allow it, or masks are missing.
    """
    assert spec.auxiliary is not None
    detector = build_from(spec.detector, spec.seed)
    require_auxiliary(spec, detector)
    has_masks = auxiliary_kind(detector) == "labelled masks"
    masks = Storage(source_storage(spec, spec.auxiliary)) if has_masks else None
    seen = replace(spec, view=spec.view.settings)
    return AuxiliaryImages(*_read(seen, spec.auxiliary, chunks, group, on_progress, "read auxiliary images", masks))


def _read(
    spec: FitSpec,
    source: SourceSpec,
    chunks: Iterable[Chunk],
    group: Group,
    on_progress: ProgressCallback,
    phase: str,
    masks: Storage | None = None,
) -> tuple[ImageCache, ReadFacts]:
    threads = spec.resources.cpus_per_worker
    with shared_errors(group):
        rules = FitRules(spec)
        cache, counts = read_images(chunks, source, rules, threads, lambda done: on_progress(phase, done, None), masks)
    read = counts.checked_total(group, spec.max_bad_fraction, ", ".join(source.uris()))
    found = hints(counts.sizes, cache.preprocess.view, cache.preprocess.image_size) + dark_hints(counts.levels)
    read = replace(read, hints=tuple(found))
    drop_duplicates(cache, group)
    return cache, read
