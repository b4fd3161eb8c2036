"""Runs a cell (fit, scoring, metrics) in this process or in a Ray task; pixels do not leave it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from raydetect.archives.chunks import read_chunks
from raydetect.archives.dataset_layouts import Labelled
from raydetect.archives.open import open_archive
from raydetect.artifacts.store import load_artifact, package_versions
from raydetect.blocks.coresets.group import Group
from raydetect.config import FIT_CHUNK_BYTES, FIT_CHUNK_IMAGES, FitSpec, SourceSpec, source_storage
from raydetect.config.validation import to_plain, validate
from raydetect.errors import RaydetectError
from raydetect.evaluation.cells import Cell, Evaluation, cell_view, learns_from
from raydetect.evaluation.labelled_images import EvaluationOutcome, evaluate_images, member_chunks, peak_memory_bytes
from raydetect.fitting.fit_run import ProgressCallback
from raydetect.fitting.worker import fit_worker
from raydetect.metrics.figures import image_figures, pixel_figures
from raydetect.metrics.quality import Quality, counted
from raydetect.records import Chunk, Member
from raydetect.storage import Storage, join_uri, normalise_uri


class EvaluationError(RaydetectError):
    """The metrics cannot be computed from the labelled images."""


def run_cell(evaluation: Evaluation, cell: Cell, on_progress: ProgressCallback) -> dict[str, Any]:
    """Fits the cell's detector, evaluates it on the test images, and returns the content of the cell's file.

    Raises:
        EvaluationError: a class is missing, or a score is not finite.
        RaydetectError: the fit failed, or the data cannot be read.
    """
    spec, uri = evaluation.spec, join_uri(evaluation.output, "artifacts", cell.name)
    device = _device(spec.resources.gpus_per_worker)
    fit_spec = cell_fit_spec(evaluation, cell, uri)
    auxiliary = None if fit_spec.auxiliary is None else auxiliary_chunks(evaluation, cell)
    report = fit_worker(fit_spec, cell_chunks(evaluation, cell, "train"), None, Group(), on_progress, device, auxiliary)
    assert report is not None
    artifact = load_artifact(report.uri, Storage(spec.storage))
    artifact.detector.to(device)
    source, threads = cell_source(evaluation, "test"), spec.resources.cpus_per_worker
    masks = Storage(source_storage(spec, source))
    chunks = cell_chunks(evaluation, cell, "test")
    try:
        outcome = evaluate_images(artifact, chunks, source, masks, spec.batch_size, threads)
        figures = figures_of(outcome.quality, spec.replicates)
    except ValueError as error:
        raise EvaluationError(f"{cell.line}, category {cell.category!r}: {error}") from None
    facts = report.facts
    return {
        "line": cell.line,
        "detector": to_plain(cell.detector),
        "category": cell.category,
        "seed": cell.seed,
        "artifact": {"uri": report.uri, "digest": report.digest},
        "weights": facts["weights"],
        "fitted_images": facts["images"]["fitted"],
        **({"hints": facts["hints"]} if "hints" in facts else {}),
        **({"auxiliary": facts["auxiliary"]} if "auxiliary" in facts else {}),
        "fit_seconds": round(sum(facts["seconds"].values()), 3),
        "categories": figures,
        "packages": package_versions(),
        **_scoring_facts(outcome),
        **peak_memory_bytes(device),
    }


def figures_of(quality: Quality, replicates: int) -> dict[str, Any]:
    """Counts and metrics of every category, overall and for each kind of defect against all normal images.

    Raises:
        ValueError: a category lacks a class.
    """
    found = {}
    for category in quality.categories:
        mine = quality.of(category)
        try:
            whole = _plain_figures(mine, replicates)
        except ValueError as error:
            raise ValueError(f"category {category!r}: {error}") from None
        defects = {name: _plain_figures(mine.of(category, name), replicates) for name in mine.defects(category)}
        found[category] = {**whole, "defects": defects}
    if not found:
        raise ValueError("no image has a label. Label images by {defect} or {label} in source.pattern, or a sidecar.")
    return found


def _plain_figures(quality: Quality, replicates: int) -> dict[str, Any]:
    figures = {**image_figures(quality, 0, replicates), **pixel_figures(quality, 0, replicates)}
    return {"images": counted(quality), "figures": {name: f.plain() for name, f in figures.items()}}


def _scoring_facts(outcome: EvaluationOutcome) -> Mapping[str, Any]:
    return {
        "test_images": outcome.images,
        "bad_images": outcome.bad,
        "unlabelled_images": outcome.unlabelled,
        "judge_seconds": round(outcome.seconds, 3),
        "score_seconds": round(outcome.score_seconds, 3),
        "images_per_second": round(outcome.images / max(outcome.score_seconds, 1e-9), 3),
    }


def cell_fit_spec(evaluation: Evaluation, cell: Cell, uri: str) -> FitSpec:
    """Returns the job of a cell's fit, whose artifact is written to a URI."""
    spec = evaluation.spec
    values = {
        "kind": "fit",
        "source": cell_source(evaluation, "train"),
        "detector": cell.detector,
        "artifact": uri,
        "storage": spec.storage,
        "seed": cell.seed,
        "batch_size": spec.batch_size,
        "calibration": {"holdout_ratio": spec.holdout_ratio},
        "preprocess": spec.preprocess,
        "view": cell_view(spec, cell),
        "auxiliary": cell_auxiliary(evaluation, cell),
        "resources": spec.resources,
    }
    return validate(FitSpec, values, "evaluate")


def cell_source(evaluation: Evaluation, split: str) -> SourceSpec:
    """Returns where the images of a split, `train` or `test`, are."""
    spec = evaluation.spec
    if spec.archive is not None:
        return spec.archive.train if split == "train" else spec.archive.test
    assert spec.data is not None
    return SourceSpec(uri=normalise_uri(spec.data.uri), format="prefix")


def cell_auxiliary(evaluation: Evaluation, cell: Cell) -> SourceSpec | None:
    """Returns where the auxiliary images of the detector of a cell are; None if it learns from none."""
    if learns_from(cell) == "none":
        return None
    return evaluation.spec.auxiliary or cell_source(evaluation, "train")


def auxiliary_chunks(evaluation: Evaluation, cell: Cell) -> Iterator[Chunk]:
    """Yields the images of `cell_auxiliary`: those of the job, or of all categories of the data set but the cell's."""
    if evaluation.spec.auxiliary is not None:
        return _archive_chunks(evaluation, evaluation.spec.auxiliary)
    return _chosen_chunks(evaluation, [image for image in evaluation.others if image.category != cell.category])


def cell_chunks(evaluation: Evaluation, cell: Cell, split: str) -> Iterator[Chunk]:
    """Returns the images of a cell's split, which are read as they are needed."""
    if evaluation.spec.archive is not None:
        return _archive_chunks(evaluation, cell_source(evaluation, split))
    chosen = [i for i in evaluation.images if i.split == split and cell.category in (None, i.category)]
    return _chosen_chunks(evaluation, chosen)


def _chosen_chunks(evaluation: Evaluation, chosen: Iterable[Labelled]) -> Iterator[Chunk]:
    """Yields some images of the data set."""
    source = cell_source(evaluation, "train")
    storage, root = Storage(source_storage(evaluation.spec, source)), normalise_uri(source.uris()[0])
    return member_chunks((_member(image, root, storage) for image in chosen), FIT_CHUNK_IMAGES)


def _archive_chunks(evaluation: Evaluation, source: SourceSpec) -> Iterator[Chunk]:
    archive = open_archive(source, Storage(source_storage(evaluation.spec, source)))
    for shard in archive.shards():
        yield from read_chunks(archive, shard, source, FIT_CHUNK_IMAGES, FIT_CHUNK_BYTES)


def _member(image: Labelled, root: str, storage: Storage) -> Member:
    uri = join_uri(root, image.path)
    return Member(
        f"{root}#{image.path}",
        uri,
        data=storage.read(uri),
        label=image.label,
        category=image.category,
        defect=image.defect,
        mask_uri=None if image.mask is None else join_uri(root, image.mask),
    )


def _device(gpus: float) -> torch.device:
    if gpus and not torch.cuda.is_available():
        raise EvaluationError(f"resources.gpus_per_worker = {gpus}: torch sees no GPU here. Set it to 0.")
    return torch.device("cuda" if gpus else "cpu")
