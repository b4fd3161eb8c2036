"""Runs a whole job in one process: the reference that every other way of running must match."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from raydetect.archives.chunks import read_chunks
from raydetect.archives.open import open_archive
from raydetect.artifacts.sharded_bank import sharded_search
from raydetect.artifacts.store import StoredDetectors
from raydetect.blocks.coresets.group import Group
from raydetect.config import FIT_CHUNK_BYTES, FIT_CHUNK_IMAGES, CalibrateSpec, FitSpec, SourceSpec, source_storage
from raydetect.errors import SpecError
from raydetect.fitting.fit_run import ProgressCallback
from raydetect.fitting.recalibrate import Recalibrated, recalibrate
from raydetect.fitting.worker import fit_worker
from raydetect.planning.committer import OnProgress, commit_all
from raydetect.planning.plan import ScorePlan, finish, only_record
from raydetect.planning.stream import Stream
from raydetect.records import Chunk, FitReport
from raydetect.scoring.device_queue import DeviceQueue
from raydetect.scoring.garbage import loaded_is_spared
from raydetect.scoring.scorer import Scorer, score_and_write
from raydetect.storage import Storage

CHUNKS_IN_FLIGHT, READERS = 4, 3


def fit(spec: FitSpec, on_progress: ProgressCallback) -> FitReport:
    """Fits a detector in this process and writes the artifact.

    Raises:
        SpecError: the job cannot run with these settings.
        TooManyBadRows: too many images of the source are bad.
    """
    calibration, auxiliary = (
        None if source is None else read_source(spec, source) for source in (spec.calibration.source, spec.auxiliary)
    )
    device = _device(spec.resources.gpus_per_worker)
    report = fit_worker(spec, read_source(spec, spec.source), calibration, Group(), on_progress, device, auxiliary)
    assert report is not None
    return report


def read_source(spec: FitSpec | CalibrateSpec, source: SourceSpec) -> Iterator[Chunk]:
    """Yields the encoded images of a source of a job, which are read as they are needed."""
    archive = open_archive(source, Storage(source_storage(spec, source)))
    for shard in archive.shards():
        yield from read_chunks(archive, shard, source, FIT_CHUNK_IMAGES, FIT_CHUNK_BYTES)


def score(plan: ScorePlan, on_progress: OnProgress) -> dict[str, Any]:
    """Scores the remaining shards of a plan in this process and returns the manifest.

    Threads read, decode and write while the device computes. At most 2 * CHUNKS_IN_FLIGHT + READERS chunks of encoded
    images are in memory.

    Args:
        plan: the scoring plan.
        on_progress: called with each scored chunk, and with each receipt.

    Raises:
        ArchiveError: a shard or member is bad and the source is set to `fail`.
        TooManyBadRows: the run is complete but too many rows are bad.
    """
    torch.set_num_threads(plan.spec.resources.cpus_per_worker)
    plan.begin()
    if plan.todo:
        with loaded_is_spared():
            _score_todo(plan, on_progress)
    return finish(plan)


def _score_todo(plan: ScorePlan, on_progress: OnProgress) -> None:
    spec = plan.spec
    storage, device = Storage(spec.storage), _device(spec.resources.gpus_per_worker)
    search = None
    if spec.resources.bank_shards > 1:
        search = sharded_search(only_record(plan.artifact, plan.records), storage, spec.resources.bank_shards, device)
    scorer = Scorer(StoredDetectors(plan.artifact, storage, search), spec, DeviceQueue(device))
    stream = Stream(plan, partial(score_and_write, scorer, plan.sink), CHUNKS_IN_FLIGHT, READERS)
    commit_all(plan, stream.scored(), on_progress)


def calibrate(spec: CalibrateSpec, on_progress: ProgressCallback) -> Recalibrated:
    """Writes an artifact with a new calibration, without refitting.

    Raises:
        RaydetectError: the artifact or the images cannot be used.
    """
    return recalibrate(spec, read_source(spec, spec.source), on_progress, _device(spec.resources.gpus_per_worker))


def _device(gpus: float) -> torch.device:
    if gpus and not torch.cuda.is_available():
        raise SpecError(f"resources.gpus_per_worker = {gpus}: torch sees no GPU here. Set it to 0.")
    return torch.device("cuda" if gpus else "cpu")
