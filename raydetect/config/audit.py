"""`kind: audit`: what came since the last audit, scored, compared with the nights before, and judged by rules."""

import datetime
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from raydetect.config.score import ScoreSpec, SinkSpec
from raydetect.config.shared import FlagSpec, MiB, ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.validation import STRICT

NIGHT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def _text(value: Any) -> Any:
    """20261122 is meant as a name, as is a date, which Python and other readers of YAML may give."""
    return str(value) if isinstance(value, datetime.date | int) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineSpec:
    """Which earlier nights a night is compared with."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    nights: Annotated[int, Field(ge=1, description="the last so many, of the same artifact")] = 7
    alarmed: Annotated[
        Literal["skip", "use"],
        Field(description="nights with an alarm: skipped, so that a fault does not become usual"),
    ] = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSpec:
    """Where the summary is sent. The secret and the allowed prefixes come from the environment alone."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    url: Annotated[str, Field(description="https://... or http://..., below a prefix of RAYDETECT_WEBHOOK_ALLOW")] = (
        field(repr=False)
    )  # its path may open the webhook
    when: Annotated[Literal["alarm", "always"], Field(description="which audits are told of")] = "always"
    attempts: Annotated[int, Field(ge=1, le=10, description="with pauses of 1, 2, 4, ... seconds between")] = 4
    request_seconds: Annotated[float, Field(gt=0, le=300, description="after which an attempt is given up")] = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSpec:
    """`kind: audit`: the whole archive, of which each night scores what is new."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["audit"]
    source: SourceSpec
    artifact: Annotated[str, Field(description="the fitted detector")]
    sink: Annotated[SinkSpec, Field(description="uri: the folder of all audits")]
    storage: Annotated[StorageOptions, Field(description="storage of everything that names none")] = field(
        default_factory=StorageOptions
    )
    flag: FlagSpec = field(default_factory=lambda: FlagSpec(alpha=0.01))
    night: Annotated[
        str | None,
        BeforeValidator(_text),
        Field(
            pattern=NIGHT,
            description="its name, e.g. 2026-11-22; none = a number, and the last night again when nothing is new",
        ),
    ] = None
    baseline: BaselineSpec = field(default_factory=BaselineSpec)
    alarm_when: Annotated[
        tuple[str, ...],
        Field(
            description='rules, such as "flagged_rate > 0.02" or "dirty lens: sharpness_ks_low > 0.3 and images > 50"'
        ),
    ] = ()
    webhook: Annotated[WebhookSpec | None, Field(description="none = nobody is told")] = None
    pictures: Annotated[int, Field(ge=0, le=500, description="images in the report's gallery")] = 48
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass")] = 16
    chunk_images: Annotated[int, Field(ge=1, description="images per Parquet part, at most")] = 64
    chunk_bytes: Annotated[int, Field(ge=1, description="encoded bytes after which a chunk is closed")] = 128 * MiB
    resources: ResourceSpec = field(default_factory=ResourceSpec)


def night_score(spec: AuditSpec, results_uri: str) -> ScoreSpec:
    """The scoring job of one night. Bad rows are for the rules to judge, so none are too many here."""
    return ScoreSpec(
        kind="score",
        source=spec.source,
        artifact=spec.artifact,
        sink=replace(spec.sink, uri=results_uri),
        storage=spec.storage,
        flag=spec.flag,
        batch_size=spec.batch_size,
        chunk_images=spec.chunk_images,
        chunk_bytes=spec.chunk_bytes,
        max_bad_fraction=1.0,
        resources=spec.resources,
    )
