"""Checks of evaluation and calibration jobs; they import torch."""

from functools import partial

from raydetect.archives.open import open_archive
from raydetect.artifacts.fleet import read_index, read_records
from raydetect.check.locations import Check, first_shard, reachable
from raydetect.config import CalibrateSpec, EvaluateSpec, source_storage
from raydetect.evaluation.cells import plan_evaluation
from raydetect.fitting.recalibrate import refuse_fitted
from raydetect.planning.plan import refuse_without_categories
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.run_progress import progress
from raydetect.storage import Storage, normalise_uri


def evaluate_checks(spec: EvaluateSpec) -> list[Check]:
    """Returns the checks of an evaluation job."""
    checks: list[Check] = [lambda: reachable(spec.output, spec.storage, "output")]
    if spec.results:
        storage = Storage(spec.storage)
        return checks + [partial(progress, Ledger(normalise_uri(uri), storage)) for uri in spec.results]
    return [*checks, lambda: plan_evaluation(spec)]


def calibrate_checks(spec: CalibrateSpec) -> list[Check]:
    """Returns the checks of a calibration job."""
    storage = Storage(spec.storage)

    def fits() -> None:
        index = read_index(normalise_uri(spec.artifact), storage)
        refuse_fitted(spec, read_records(index, storage).values())
        archive = open_archive(spec.source, Storage(source_storage(spec, spec.source)))
        refuse_without_categories(spec.source, index, tuple(archive.shards()))

    return [
        lambda: first_shard(spec.source, source_storage(spec, spec.source)),
        fits,
        lambda: reachable(spec.output, spec.storage, "output"),
    ]
