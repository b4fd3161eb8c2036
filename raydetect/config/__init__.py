"""Job file settings: frozen, strict dataclasses in which every field is documented and validated."""

from raydetect.config.audit import AuditSpec, BaselineSpec, WebhookSpec, night_score
from raydetect.config.calibrate import CalibrateSpec
from raydetect.config.evaluate import ArchiveSpec, EvaluateSpec, LabelledSpec, Layout
from raydetect.config.fit import (
    AT_LEAST_2X,
    ENSEMBLE,
    FEW_IMAGES,
    FIT_CHUNK_BYTES,
    FIT_CHUNK_IMAGES,
    HOLDOUT_RATIO,
    CalibrationSpec,
    DetectorSpec,
    FitSpec,
    JpegScale,
    MemberSpec,
    Precision,
    PreprocessSpec,
    Preset,
)
from raydetect.config.jobs import (
    JobSpec,
    parse_job,
    public_spec,
    result_digest,
    result_settings,
    sink_storage,
    source_storage,
    without_credentials,
)
from raydetect.config.score import MAX_REGIONS, Heatmaps, ScoreSpec, SinkSpec
from raydetect.config.serve import AllowSpec, LimitSpec, ServedSpec, ServeSpec
from raydetect.config.shared import USUAL_LEVEL, FlagSpec, MiB, ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.view import STRETCH, TileSpec, ViewSpec
from raydetect.moved_modules import names_of

__all__ = [
    "AT_LEAST_2X",
    "ENSEMBLE",
    "FEW_IMAGES",
    "FIT_CHUNK_BYTES",
    "FIT_CHUNK_IMAGES",
    "HOLDOUT_RATIO",
    "MAX_REGIONS",
    "STRETCH",
    "USUAL_LEVEL",
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
    "JpegScale",
    "LabelledSpec",
    "Layout",
    "LimitSpec",
    "MemberSpec",
    "MiB",
    "Precision",
    "PreprocessSpec",
    "Preset",
    "ResourceSpec",
    "ScoreSpec",
    "ServeSpec",
    "ServedSpec",
    "SinkSpec",
    "SourceSpec",
    "StorageOptions",
    "TileSpec",
    "ViewSpec",
    "WebhookSpec",
    "night_score",
    "parse_job",
    "public_spec",
    "result_digest",
    "result_settings",
    "sink_storage",
    "source_storage",
    "without_credentials",
]

__getattr__ = names_of("raydetect.config", "raydetect.config.validation")
