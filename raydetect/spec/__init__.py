"""The job file's words: frozen, strict dataclasses with a doc line and a check under every field."""

from raydetect.spec.audit import AuditSpec, BaselineSpec, WebhookSpec, night_score
from raydetect.spec.calibrate import CalibrateSpec
from raydetect.spec.evaluate import ArchiveSpec, EvaluateSpec, LabelledSpec, Layout
from raydetect.spec.fit import (
    ENSEMBLE,
    FIT_CHUNK_BYTES,
    FIT_CHUNK_IMAGES,
    CalibrationSpec,
    DetectorSpec,
    FitSpec,
    MemberSpec,
    Preset,
)
from raydetect.spec.jobs import (
    JobSpec,
    parse_job,
    public_spec,
    result_digest,
    result_words,
    sink_storage,
    source_storage,
)
from raydetect.spec.score import Heatmaps, ScoreSpec, SinkSpec
from raydetect.spec.serve import AllowSpec, LimitSpec, ServedSpec, ServeSpec
from raydetect.spec.words import FlagSpec, MiB, ResourceSpec, SourceSpec, StorageOptions

__all__ = [
    "ENSEMBLE",
    "FIT_CHUNK_BYTES",
    "FIT_CHUNK_IMAGES",
    "AllowSpec",
    "ArchiveSpec",
    "AuditSpec",
    "BaselineSpec",
    "CalibrateSpec",
    "CalibrationSpec",
    "DetectorSpec",
    "EvaluateSpec",
    "FitSpec",
    "FlagSpec",
    "Heatmaps",
    "JobSpec",
    "LabelledSpec",
    "Layout",
    "LimitSpec",
    "MemberSpec",
    "MiB",
    "Preset",
    "ResourceSpec",
    "ScoreSpec",
    "ServeSpec",
    "ServedSpec",
    "SinkSpec",
    "SourceSpec",
    "StorageOptions",
    "WebhookSpec",
    "night_score",
    "parse_job",
    "public_spec",
    "result_digest",
    "result_words",
    "sink_storage",
    "source_storage",
]
