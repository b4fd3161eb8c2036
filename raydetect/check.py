"""Every mistake of a job file that can be found without a cluster, in seconds."""

import os
from collections.abc import Callable
from functools import partial

from raydetect.archives.naming import Naming
from raydetect.archives.open import open_archive
from raydetect.archives.prefix import loose_names
from raydetect.artifact_record import read_record
from raydetect.audit.measures import MEASURES
from raydetect.audit.rules import parse_rules
from raydetect.audit.webhook import webhook_of
from raydetect.detectors._ensemble import learns_from_labels, parts
from raydetect.detectors._registry import build_from
from raydetect.errors import RaydetectError, SpecError
from raydetect.evaluation.cells import plan_evaluation
from raydetect.fleet_record import read_index, read_records
from raydetect.gateway.allow import Prefixes
from raydetect.gateway.desk import load_served
from raydetect.gateway.tokens import read_tokens
from raydetect.plan import plan_score, refuse_without_categories
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.results import progress
from raydetect.spec import (
    AuditSpec,
    CalibrateSpec,
    EvaluateSpec,
    FitSpec,
    JobSpec,
    ResourceSpec,
    ScoreSpec,
    ServeSpec,
    SourceSpec,
    StorageOptions,
    night_score,
    sink_storage,
    source_storage,
)
from raydetect.storage import Storage, join_uri, normalise_uri
from raydetect.worker.recalibrate import refuse_fitted


def find_problems(spec: JobSpec) -> list[str]:
    """One sentence for each mistake; empty when the job can run."""
    if isinstance(spec, ServeSpec):
        checks = _serve_checks(spec)
    elif isinstance(spec, EvaluateSpec):
        checks = _evaluate_checks(spec)
    elif isinstance(spec, CalibrateSpec):
        checks = _calibrate_checks(spec)
    elif isinstance(spec, FitSpec):
        checks = _fit_checks(spec)
    else:
        checks = _score_checks(spec) + (_audit_checks(spec) if isinstance(spec, AuditSpec) else [])
    found = [sentence for check in checks if (sentence := _sentence(check))]
    if not found and isinstance(spec, ScoreSpec):
        found = [sentence for sentence in [_sentence(lambda: plan_score(spec))] if sentence]
    return list(dict.fromkeys(found))


def _fit_checks(spec: FitSpec) -> list[Callable[[], object]]:
    checks: list[Callable[[], object]] = [
        lambda: build_from(spec.detector, spec.seed).load_weights(),
        lambda: _first_shard(spec.source, source_storage(spec, spec.source)),
        lambda: _reachable(spec.artifact, spec.storage, "artifact"),
        lambda: _trainable(spec),
        lambda: _labelled(spec),
    ]
    extra = spec.calibration.source
    if extra is not None:
        checks.append(lambda: _first_shard(extra, source_storage(spec, extra)))
    return checks


def _audit_checks(spec: AuditSpec) -> list[Callable[[], object]]:
    return [
        lambda: parse_rules(spec.alarm_when, MEASURES),
        lambda: webhook_of(spec.webhook, os.environ),
        lambda: plan_score(night_score(spec, join_uri(spec.sink.uri, "none")), ()),
    ]


def _score_checks(spec: ScoreSpec | AuditSpec) -> list[Callable[[], object]]:
    models = Storage(spec.storage)
    return [
        lambda: _first_shard(spec.source, source_storage(spec, spec.source)),
        lambda: read_records(read_index(normalise_uri(spec.artifact), models), models),
        lambda: _reachable(spec.sink.uri, sink_storage(spec), "sink.uri"),
    ]


def _serve_checks(spec: ServeSpec) -> list[Callable[[], object]]:
    storage = Storage(spec.storage)
    allow = spec.allow
    checks: list[Callable[[], object]] = [
        lambda: read_tokens(spec),
        lambda: [Prefixes.of(uris) for uris in (allow.sources, allow.sinks, allow.artifacts)],
    ]
    return checks + [partial(load_served, name, served, storage) for name, served in spec.detectors.items()]


def _evaluate_checks(spec: EvaluateSpec) -> list[Callable[[], object]]:
    checks: list[Callable[[], object]] = [lambda: _reachable(spec.output, spec.storage, "output")]
    if spec.results:
        storage = Storage(spec.storage)
        return checks + [partial(progress, Ledger(normalise_uri(uri), storage)) for uri in spec.results]
    return [*checks, lambda: plan_evaluation(spec)]


def _calibrate_checks(spec: CalibrateSpec) -> list[Callable[[], object]]:
    storage = Storage(spec.storage)

    def fits() -> None:
        index = read_index(normalise_uri(spec.artifact), storage)
        refuse_fitted(spec, read_records(index, storage).values())
        archive = open_archive(spec.source, Storage(source_storage(spec, spec.source)))
        refuse_without_categories(spec.source, index, tuple(archive.shards()))

    return [
        lambda: _first_shard(spec.source, source_storage(spec, spec.source)),
        fits,
        lambda: _reachable(spec.output, spec.storage, "output"),
    ]


def _sentence(check: Callable[[], object]) -> str | None:
    try:
        check()
    except RaydetectError as error:
        return str(error)
    return None


def _first_shard(source: SourceSpec, options: StorageOptions) -> None:
    next(iter(open_archive(source, Storage(options)).shards()))


def _reachable(uri: str, options: StorageOptions, word: str) -> None:
    """The bucket must be there; folders are made when something is written.

    Raises:
        SpecError: it is not.
    """
    uri = normalise_uri(uri)
    storage = Storage(options)
    scheme, _, rest = uri.partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    if scheme == "s3" and not storage.exists(bucket):
        raise SpecError(f"{word}: the bucket {bucket} does not exist. Create it or mend the URI.")


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
