"""Checks of evaluation and calibration jobs; they import torch."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, islice

from raydetect.archives.open import open_archive
from raydetect.artifacts.fit_preprocess import FitRules
from raydetect.artifacts.fleet import read_index, read_records
from raydetect.artifacts.replacement import refuse_existing
from raydetect.check.first_images import MAX_BYTES, MAX_IMAGES, FirstImages
from raydetect.check.locations import Check, first_shard, reachable
from raydetect.config import CalibrateSpec, EvaluateSpec, source_storage
from raydetect.evaluation.cells import Cell, Evaluation, plan_evaluation
from raydetect.evaluation.run import cell_chunks, cell_fit_spec, cell_source
from raydetect.fitting.recalibrate import refuse_fitted
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
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


def evaluation_hints(spec: EvaluateSpec) -> list[str]:
    """Returns hints on the view, as `FirstImages` does for each category; reads only its first images.

    Raises:
        SpecError: none of the first images of a category can be read.
        RaydetectError: the data cannot be read.
    """
    if spec.results:
        return []
    evaluation = plan_evaluation(spec)
    looks: dict[str | None, dict[Preprocess, Cell]] = {}
    for cell in evaluation.cells:
        preprocess = FitRules(cell_fit_spec(evaluation, cell, evaluation.output)).common
        looks.setdefault(cell.category, {}).setdefault(preprocess, cell)
    found = [hint for of_category in looks.values() for hint in _hints(evaluation, of_category, len(looks))]
    return list(dict.fromkeys(found))


def _hints(evaluation: Evaluation, looks: Mapping[Preprocess, Cell], parts: int) -> Iterator[str]:
    """Hints on the training images of a category, of which a part of the usual number is read."""
    cell = next(iter(looks.values()))
    rules = DecodeRules.of(cell_source(evaluation, "train"))
    seen = [FirstImages(rules, partial(_always, preprocess)) for preprocess in looks]
    members = chain.from_iterable(chunk.members for chunk in cell_chunks(evaluation, cell, "train"))
    held = 0
    for member in islice(members, max(1, MAX_IMAGES // parts)):
        for images in seen:
            images.note(member)
        held += len(member.data)
        if held > MAX_BYTES // parts:
            break
    for images in seen:
        images.refuse_unreadable("archive.train.uri" if evaluation.spec.data is None else "data.uri")
        yield from images.hints()


def _always(preprocess: Preprocess, _: str | None) -> Preprocess:
    return preprocess


def calibrate_checks(spec: CalibrateSpec) -> list[Check]:
    """Returns the checks of a calibration job."""
    storage = Storage(spec.storage)

    def free() -> None:
        if not spec.replace and normalise_uri(spec.output) != normalise_uri(spec.artifact):
            refuse_existing(spec.output, storage, "output", "calibrate with --replace (replace: true)")

    def fits() -> None:
        index = read_index(normalise_uri(spec.artifact), storage)
        refuse_fitted(spec, read_records(index, storage).values())
        archive = open_archive(spec.source, Storage(source_storage(spec, spec.source)))
        refuse_without_categories(spec.source, index, tuple(archive.shards()))

    return [
        lambda: first_shard(spec.source, source_storage(spec, spec.source)),
        fits,
        free,
        lambda: reachable(spec.output, spec.storage, "output"),
    ]
