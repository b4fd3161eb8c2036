"""`kind: serve`: fitted detectors behind HTTP, for single images and whole archives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config.shared import FlagSpec, MiB, ResourceSpec, StorageOptions
from raydetect.config.validation import STRICT

BODIES_IN_FLIGHT = 4  # of the largest size
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSpec:
    """One detector under a name."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    artifact: Annotated[str, Field(description="the fitted detector, or a fleet")]
    flag: FlagSpec = field(default_factory=lambda: FlagSpec(alpha=0.01))

    def __post_init__(self) -> None:
        if self.flag.fdr is not None:
            raise ValueError("flag.fdr is decided over a whole archive, never for single images; use flag.alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowSpec:
    """What clients may name: URI prefixes, each ending at a folder. Nothing is allowed unless it is listed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    sources: Annotated[tuple[str, ...], Field(description="prefixes of images and archives to read")] = ()
    sinks: Annotated[tuple[str, ...], Field(description="prefixes of results directories to write")] = ()
    artifacts: Annotated[tuple[str, ...], Field(description="prefixes of artifacts that may replace served ones")] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSpec:
    """What one request may ask for, and how many are answered at a time."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    max_body_bytes: Annotated[int, Field(gt=0, description="of one request; more is refused with 413")] = 256 * MiB
    max_image_bytes: Annotated[int, Field(gt=0, description="of one encoded image")] = 64 * MiB
    max_pixels: Annotated[int, Field(gt=0, description="of one image, known from its header")] = 100_000_000
    max_images: Annotated[int, Field(ge=1, description="in one request; more is refused with 413")] = 64
    max_requests: Annotated[
        int, Field(ge=1, description="in flight at a time; more are refused with 429 and Retry-After")
    ] = 128
    max_runs: Annotated[int, Field(ge=1, description="archive runs at a time; more are refused with 429")] = 4
    max_bytes_in_flight: Annotated[
        int | None,
        Field(
            gt=0, description="of the bodies and images of all requests; more are refused with 429; none = four bodies"
        ),
    ] = None
    request_seconds: Annotated[float, Field(gt=0, description="after which a request is answered with 503")] = 60.0
    fetch_seconds: Annotated[
        float, Field(gt=0, description="for one image of a web address; a slower one is unreadable")
    ] = 20.0

    def __post_init__(self) -> None:
        if self.max_bytes_in_flight is not None and self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError(
                "max_bytes_in_flight is less than max_body_bytes, so that no such body could come; raise it"
            )

    @property
    def bytes_in_flight(self) -> int:
        """`max_bytes_in_flight`, or what stands for none."""
        return self.max_bytes_in_flight or BODIES_IN_FLIGHT * self.max_body_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSpec:
    """`kind: serve`: what `raydetect serve` keeps warm."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["serve"]
    detectors: Annotated[
        Mapping[Annotated[str, Field(pattern=NAME)], ServedSpec],
        Field(min_length=1, description="served detectors by the name that requests use"),
    ]
    storage: Annotated[StorageOptions, Field(description="storage of artifacts, sources and results")] = field(
        default_factory=StorageOptions
    )
    host: Annotated[str, Field(description="address to listen on; anything but loopback needs tokens")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="to listen on; with --local, 0 takes a free one")] = 8000
    hosts: Annotated[
        tuple[str, ...], Field(description="host names by which clients may call this server, besides loopback's")
    ] = ()
    tokens_file: Annotated[
        str | None, Field(description="YAML file of bearer tokens; none = the variable RAYDETECT_TOKENS, if set")
    ] = None
    allow: AllowSpec = field(default_factory=AllowSpec)
    heatmaps: Annotated[
        str | None, Field(description="folder of stored heatmaps; none = they are sent inline only")
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass, of any requests together")] = 16
    batch_wait_seconds: Annotated[float, Field(ge=0, description="how long an image waits for others")] = 0.005
    limits: LimitSpec = field(default_factory=LimitSpec)
    max_workers: Annotated[
        int | None, Field(ge=1, description="replicas under load, at most; none = resources.num_workers always")
    ] = None
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    def __post_init__(self) -> None:
        if self.resources.bank_shards != 1:
            raise ValueError("resources.bank_shards cuts the bank of a scoring job; leave it out here")
        if self.max_workers is not None and self.max_workers < self.resources.num_workers:
            raise ValueError(f"max_workers = {self.max_workers} is less than resources.num_workers; raise it")
