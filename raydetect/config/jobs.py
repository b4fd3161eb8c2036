"""All kinds of job files, and what of a job is public or decides its rows."""

from typing import Any

from raydetect.config.audit import AuditSpec
from raydetect.config.calibrate import CalibrateSpec
from raydetect.config.evaluate import EvaluateSpec
from raydetect.config.fit import FitSpec
from raydetect.config.score import ScoreSpec
from raydetect.config.serve import ServeSpec
from raydetect.config.shared import SourceSpec, StorageOptions
from raydetect.config.validation import apply_overrides, digest, nearest, to_plain, validate
from raydetect.config.yaml_text import shown_key
from raydetect.errors import SpecError

FREE_RESOURCES = ("num_workers", "detectors_in_memory", "bank_shards")  # they do not change rows
JobSpec = FitSpec | ScoreSpec | AuditSpec | ServeSpec | EvaluateSpec | CalibrateSpec
KINDS: dict[str, type[JobSpec]] = {
    "fit": FitSpec,
    "score": ScoreSpec,
    "audit": AuditSpec,
    "serve": ServeSpec,
    "evaluate": EvaluateSpec,
    "calibrate": CalibrateSpec,
}


def parse_job(values: dict[str, Any], where: str, overrides: tuple[str, ...] = ()) -> JobSpec:
    """A job from the plain values of its file.

    Args:
        values: what the YAML file held.
        where: the file's name, for messages.
        overrides: `a.b=c` texts of `--set`.

    Raises:
        SpecError: every mistake, one line each.
    """
    values = apply_overrides(values, overrides)
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        message = f"kind {shown_key(kind)!r} is unknown" if isinstance(kind, str) else "kind is missing"
        raise SpecError(f"{where}: {message}.{nearest(str(kind), list(KINDS))}")
    spec = validate(KINDS[kind], values, where)
    _refuse_huge(to_plain(spec), where)
    return spec


def _refuse_huge(value: Any, where: str, path: str = "") -> None:
    """What counts images, bytes and the like goes on to libraries that take 64 bits.

    Raises:
        SpecError: a whole number has more.
    """
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise SpecError(f"{where}: {path}: is beyond whole numbers of 64 bits. Write a smaller one.")
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_huge(item, where, f"{path}.{shown_key(str(name))}" if path else shown_key(str(name)))


def source_storage(spec: JobSpec, source: SourceSpec) -> StorageOptions:
    """The storage that a source of this job uses."""
    return source.storage or spec.storage


def sink_storage(spec: ScoreSpec | AuditSpec) -> StorageOptions:
    """The storage that the results of this job use."""
    return spec.sink.storage or spec.storage


def public_spec(spec: JobSpec) -> dict[str, Any]:
    """The spec with all defaults and without credentials: what run.json and the artifact hold."""
    public: dict[str, Any] = _redact(to_plain(spec))
    return public


def result_digest(spec: JobSpec) -> str:
    """sha256 over what decides the rows: the public spec less storage and what workers may have more or less of.

    Threads per worker stay in: floating-point sums may depend on them.
    """
    return digest(result_settings(public_spec(spec)))


def result_settings(public: dict[str, Any]) -> dict[str, Any]:
    """The part of a public spec that decides the rows."""
    words = {k: _without_storage(v) for k, v in public.items() if k not in ("storage", "max_bad_fraction")}
    for name in ("max_failures", "max_bank_bytes", "checkpoint_epochs", "engine"):
        words.pop(name, None)
    words["resources"] = {k: v for k, v in words["resources"].items() if k not in FREE_RESOURCES}
    return words


def _without_storage(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "storage"} if isinstance(value, dict) else value


def _redact(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: {i: j for i, j in v.items() if i not in ("key", "secret", "token")}
            if k == "storage" and isinstance(v, dict)
            else _redact(v)
            for k, v in value.items()
        }
    return value
