"""`kind: audit`: scores what is new since the last audit, compares it with earlier nights and checks alarm rules."""

import datetime
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from raydetect.config.score import ScoreSpec, SinkSpec
from raydetect.config.shared import BATCH_SIZE, Flag, FlagSpec, MiB, ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.validation import STRICT

NIGHT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def _text(value: Any) -> Any:
    """Converts names such as 20261122 or a date, which Python code and other YAML readers may pass as such."""
    return str(value) if isinstance(value, datetime.date | int) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineSpec:
    """The earlier nights that a night is compared with."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    nights: Annotated[int, Field(ge=1, description="number of previous nights with the same artifact")] = 7
    alarmed: Annotated[
        Literal["skip", "use"],
        Field(description="nights with an alarm: skip them, so that a fault does not become the norm, or use them"),
    ] = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSpec:
    """Where the summary is sent. The secret and the allowed prefixes come from environment variables only."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    url: Annotated[str, Field(description="https://... or http://..., below a prefix of RAYDETECT_WEBHOOK_ALLOW")] = (
        field(repr=False)
    )  # its path may be a secret
    when: Annotated[Literal["alarm", "always"], Field(description="which audits are reported")] = "always"
    attempts: Annotated[int, Field(ge=1, le=10, description="number of attempts, 1, 2, 4, ... seconds apart")] = 4
    request_seconds: Annotated[float, Field(gt=0, le=300, description="timeout of one attempt")] = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSpec:
    """`kind: audit`: an archive, of which each night scores what is new."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["audit"]
    source: SourceSpec
    artifact: Annotated[str, Field(description="the fitted detector")]
    sink: Annotated[SinkSpec, Field(description="uri: folder of all audits")]
    storage: Annotated[StorageOptions, Field(description="storage for everything that has none of its own")] = field(
        default_factory=StorageOptions
    )
    flag: Flag = field(default_factory=FlagSpec)
    night: Annotated[
        Annotated[str, Field(pattern=NIGHT)] | None,
        BeforeValidator(_text),
        Field(
            description="name, e.g. 2026-11-22; none = the next number, or the last night again if nothing is new",
        ),
    ] = None
    baseline: BaselineSpec = field(default_factory=BaselineSpec)
    alarm_when: Annotated[
        tuple[str, ...],
        Field(
            description='rules, such as "flagged_rate > 0.02" or "dirty lens: sharpness_ks_low > 0.3 and images > 50"'
        ),
    ] = ()
    webhook: Annotated[WebhookSpec | None, Field(description="where to send the summary; none = nowhere")] = None
    pictures: Annotated[int, Field(ge=0, le=500, description="images in the report's gallery")] = 48
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass")] = BATCH_SIZE
    chunk_images: Annotated[int, Field(ge=1, description="images that a worker scores at a time, at most")] = 64
    chunk_bytes: Annotated[int, Field(ge=1, description="encoded bytes after which a chunk is closed")] = 128 * MiB
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    def __post_init__(self) -> None:
        if self.flag.nothing:
            raise ValueError(
                "flag: none decides nothing, but an audit compares the flagged share of nights; set a rule"
            )


def night_score(spec: AuditSpec, results_uri: str) -> ScoreSpec:
    """The scoring job of one night; never fails for bad rows, which the alarm rules check."""
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
