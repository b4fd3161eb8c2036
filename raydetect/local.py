"""A whole job in one process: the yardstick that every other way of running must equal."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raydetect.archives.base import cut_chunks
from raydetect.archives.open import open_archive
from raydetect.artifact_record import Calibration
from raydetect.detectors._base import Detector
from raydetect.detectors._registry import build_detector
from raydetect.errors import SpecError
from raydetect.plan import Committer, ScorePlan, finish
from raydetect.records import Part, Receipt
from raydetect.spec import FitSpec, SourceSpec, public_spec, source_storage
from raydetect.storage import Storage, normalise_uri
from raydetect.worker.artifact import StoredDetectors, save_artifact
from raydetect.worker.calibrate import calibrate
from raydetect.worker.collect import ImageSource, Survey, choose_holdout, collect, survey
from raydetect.worker.read import read_members
from raydetect.worker.score import Scorer
from raydetect.worker.train import train

Tick = Callable[[str, int, int | None], None]
"""Called with a phase's name, how much more is done, and the whole when known."""


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit made.

    Attributes:
        uri: the artifact's folder.
        digest: its digest.
        facts: counts, weights, seconds per phase and peak memory, as stored in the artifact.
    """

    uri: str
    digest: str
    facts: Mapping[str, Any]


@dataclass(slots=True)
class _Clock:
    """Seconds of each phase."""

    seconds: dict[str, float]
    begun: float

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        now = time.perf_counter()
        self.seconds[phase] = round(now - self.begun, 3)
        self.begun = now


def fit(spec: FitSpec, tick: Tick) -> FitReport:
    """Fits a detector in this process and writes the artifact.

    Raises:
        SpecError: the job cannot run as it is.
        TooManyBadRows: too many images of the source are bad.
    """
    if spec.resources.num_workers != 1:
        raise SpecError(
            f"resources.num_workers = {spec.resources.num_workers}: fitting runs in one process. Set it to 1."
        )
    torch.set_num_threads(spec.resources.cpus_per_worker)
    detector = build_detector(spec.detector.name, spec.detector.params, spec.seed)
    detector.to(_device(spec.resources.gpus_per_worker))
    clock = _Clock({}, time.perf_counter())
    weights = detector.load_weights()
    images = _image_source(spec, spec.source, detector)
    found = survey(images, _ticker(tick, "survey", None), spec.max_bad_fraction)
    clock.lap("survey")
    fit_keys, held_out, calibration_images = _split(spec, images, found, detector)
    losses = _fit_detector(detector, images, fit_keys, spec, tick)
    clock.lap("fit")
    count = len(held_out) if held_out is not None else None
    calibration = calibrate(detector, calibration_images, held_out, spec.batch_size, _ticker(tick, "calibrate", count))
    clock.lap("calibrate")
    facts = _facts(spec, weights, found, fit_keys, calibration, clock.seconds, losses)
    uri = normalise_uri(spec.artifact)
    digest = save_artifact(uri, Storage(spec.storage), spec.detector.name, detector, calibration, facts)
    return FitReport(uri, digest, facts)


def _image_source(spec: FitSpec, source: SourceSpec, detector: Detector) -> ImageSource:
    archive = open_archive(source, Storage(source_storage(spec, source)))
    threads = spec.resources.cpus_per_worker
    return ImageSource(archive, tuple(archive.shards()), source, detector.params.image_size, threads)


def _split(
    spec: FitSpec, images: ImageSource, found: Survey, detector: Detector
) -> tuple[frozenset[str], frozenset[str] | None, ImageSource]:
    """(keys to fit on, keys to calibrate on or None for all, where the latter lie)."""
    keys = found.normal_keys()
    if spec.calibration.source is not None:
        return frozenset(keys), None, _image_source(spec, spec.calibration.source, detector)
    held_out = choose_holdout(keys, spec.calibration.holdout_ratio, spec.seed)
    return frozenset(keys) - held_out, held_out, images


def _fit_detector(
    detector: Detector, images: ImageSource, keys: frozenset[str], spec: FitSpec, tick: Tick
) -> list[float]:
    if "collect" in detector.phases:
        state = collect(detector, images, keys, spec.batch_size, _ticker(tick, "collect", len(keys)))
        tick("finish", 0, None)
        detector.finish(state)
    if "train" in detector.phases:
        epochs = getattr(detector.params, "epochs", None)
        return train(detector, images, keys, _ticker(tick, "decode", len(keys)), _ticker(tick, "train epochs", epochs))
    return []


def _facts(
    spec: FitSpec,
    weights: str,
    found: Survey,
    fit_keys: frozenset[str],
    calibration: Calibration,
    seconds: dict[str, float],
    losses: list[float],
) -> dict[str, Any]:
    rate = len(calibration.scores) / max(seconds["calibrate"], 1e-9)
    return {
        "spec": public_spec(spec),
        "weights": weights,
        "images": {
            "fitted": len(fit_keys),
            "held_out": len(calibration.scores),
            "labelled_anomalous_left_out": sum(label == 1 for label in found.labels.values()),
            "bad": len(found.bad),
        },
        "seconds": seconds,
        "losses": [round(loss, 6) for loss in losses],
        "images_per_second": round(rate, 3),
    }


def _ticker(tick: Tick, phase: str, total: int | None) -> Callable[[int], None]:
    return lambda done: tick(phase, done, total)


def score(plan: ScorePlan, on_part: Callable[[Part, Receipt | None], None]) -> dict[str, Any]:
    """Scores what is left of a plan in this process and returns the manifest.

    Raises:
        ArchiveError: a bad shard or member, and the source says `fail`.
        TooManyBadRows: the run is complete and too much of it is bad.
    """
    spec = plan.spec
    torch.set_num_threads(spec.resources.cpus_per_worker)
    plan.ledger.begin(plan.run)
    if plan.todo:
        detectors = StoredDetectors(plan.artifact, Storage(spec.storage))
        scorer = Scorer(detectors, spec, str(_device(spec.resources.gpus_per_worker)))
        committer = Committer(plan)
        for shard in plan.todo:
            members = read_members(plan.archive, shard, spec.source)
            for chunk in cut_chunks(shard, members, spec.chunk_images, spec.chunk_bytes):
                result = scorer.score_chunk(chunk)
                part = plan.sink.write(chunk, result.rows, result.pictures, result.clipped_pixels)
                on_part(part, committer.add(part))
    return finish(plan)


def _device(gpus: float) -> torch.device:
    if gpus and not torch.cuda.is_available():
        raise SpecError(f"resources.gpus_per_worker = {gpus}: torch sees no GPU here. Set it to 0.")
    return torch.device("cuda" if gpus else "cpu")
