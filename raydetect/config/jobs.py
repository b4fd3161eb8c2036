"""The kinds of job files, their public form, and the settings that determine rows."""

from typing import Any

from raydetect.config.audit import AuditSpec
from raydetect.config.calibrate import CalibrateSpec
from raydetect.config.evaluate import EvaluateSpec
from raydetect.config.fit import FitSpec
from raydetect.config.score import MAX_REGIONS, ScoreSpec
from raydetect.config.serve import ServeSpec
from raydetect.config.shared import SourceSpec, StorageOptions
from raydetect.config.validation import apply_overrides, digest, nearest, to_plain, validate
from raydetect.config.yaml_text import shown_key
from raydetect.errors import SpecError

FREE_RESOURCES = ("num_workers", "detectors_in_memory", "bank_shards")  # they do not affect rows
NEW_DEFAULTS = (("max_regions", MAX_REGIONS), ("close_ups", True))  # of `sink`
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
    """Validates the values of a job file.

    Args:
        values: content of the YAML file.
        where: the file's name, for messages.
        overrides: `a.b=c` arguments of `--set`.

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
    """Refuses integers that do not fit into 64 bits, which libraries require.

    Raises:
        SpecError: one does not fit.
    """
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise SpecError(f"{where}: {path}: does not fit into 64 bits. Use a smaller number.")
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_huge(item, where, f"{path}.{shown_key(str(name))}" if path else shown_key(str(name)))


def source_storage(spec: JobSpec, source: SourceSpec) -> StorageOptions:
    """Storage options of a source."""
    return source.storage or spec.storage


def sink_storage(spec: ScoreSpec | AuditSpec) -> StorageOptions:
    """Storage options of the results."""
    return spec.sink.storage or spec.storage


def public_spec(spec: JobSpec) -> dict[str, Any]:
    """The spec with all defaults and without credentials, as stored in run.json and artifacts."""
    return without_credentials(to_plain(spec))


def without_credentials(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a job file without key, secret and token of any storage, which may be written and printed."""
    public: dict[str, Any] = _redact(values)
    return public


def result_digest(spec: JobSpec) -> str:
    """sha256 over the settings that determine rows: the public spec without storage and the number of workers.

    Includes threads per worker, since floating-point sums may depend on them.
    """
    return digest(result_settings(public_spec(spec)))


def result_settings(public: dict[str, Any]) -> dict[str, Any]:
    """The part of a public spec that determines the rows.

    The defaults of `sink.max_regions` and `sink.close_ups` are left out, so that results of older versions, which have
    neither regions nor close-ups, can be resumed.
    """
    settings = {k: _without_storage(v) for k, v in public.items() if k not in ("storage", "max_bad_fraction")}
    for name in ("max_failures", "max_bank_bytes", "checkpoint_epochs", "engine"):
        settings.pop(name, None)
    if "sink" in settings:
        settings["sink"] = {k: v for k, v in settings["sink"].items() if (k, v) not in NEW_DEFAULTS}
    settings["resources"] = {k: v for k, v in settings["resources"].items() if k not in FREE_RESOURCES}
    return settings


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
