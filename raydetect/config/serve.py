"""`kind: serve`: serves fitted detectors over HTTP, for single images and whole archives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config.shared import BATCH_SIZE, Flag, FlagSpec, MiB, ResourceSpec, StorageOptions
from raydetect.config.validation import STRICT

BODIES_IN_FLIGHT = 4  # bodies of the maximum size
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSpec:
    """A served detector."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    artifact: Annotated[str, Field(description="the fitted detector, or a fleet")]
    flag: Flag = field(default_factory=FlagSpec)

    def __post_init__(self) -> None:
        if self.flag.fdr is not None:
            raise ValueError("flag.fdr applies to whole archives, not to single images; use flag.alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowSpec:
    """URI prefixes that clients may use, each a folder. Nothing else is allowed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    sources: Annotated[tuple[str, ...], Field(description="prefixes of images and archives to read")] = ()
    sinks: Annotated[tuple[str, ...], Field(description="prefixes of results directories to write")] = ()
    artifacts: Annotated[tuple[str, ...], Field(description="prefixes of artifacts that may replace a served one")] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSpec:
    """Limits per request and of concurrent requests."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    max_body_bytes: Annotated[int, Field(gt=0, description="body of one request; a larger one is refused with 413")] = (
        256 * MiB
    )
    max_image_bytes: Annotated[int, Field(gt=0, description="size of one encoded image")] = 64 * MiB
    max_pixels: Annotated[int, Field(gt=0, description="pixels of one image, according to its header")] = 100_000_000
    max_images: Annotated[int, Field(ge=1, description="images per request; more are refused with 413")] = 64
    max_requests: Annotated[
        int, Field(ge=1, description="concurrent requests; more are refused with 429 and Retry-After")
    ] = 128
    max_runs: Annotated[int, Field(ge=1, description="concurrent archive runs; more are refused with 429")] = 4
    max_bytes_in_flight: Annotated[
        int | None,
        Field(
            gt=0,
            description="bodies and images of all requests together; more are refused with 429; none = four bodies",
        ),
    ] = None
    request_seconds: Annotated[float, Field(gt=0, description="timeout of a request, answered with 503")] = 60.0
    fetch_seconds: Annotated[
        float, Field(gt=0, description="timeout of one image by URL, which is then unreadable")
    ] = 20.0

    def __post_init__(self) -> None:
        if self.max_bytes_in_flight is not None and self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError(
                "max_bytes_in_flight is less than max_body_bytes, so the largest body would never fit; raise it"
            )

    @property
    def bytes_in_flight(self) -> int:
        """`max_bytes_in_flight` or its default."""
        return self.max_bytes_in_flight or BODIES_IN_FLIGHT * self.max_body_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSpec:
    """`kind: serve`: the settings of `raydetect serve`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["serve"]
    detectors: Annotated[
        Mapping[Annotated[str, Field(pattern=NAME)], ServedSpec],
        Field(min_length=1, description="served detectors by the name used in requests"),
    ]
    storage: Annotated[StorageOptions, Field(description="storage of artifacts, sources and results")] = field(
        default_factory=StorageOptions
    )
    host: Annotated[str, Field(description="address to listen on; any but loopback requires tokens")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; with --local, 0 chooses a free one")] = (
        8000
    )
    hosts: Annotated[tuple[str, ...], Field(description="accepted host names, besides those of loopback")] = ()
    tokens_file: Annotated[
        str | None, Field(description="YAML file with bearer tokens; none = the variable RAYDETECT_TOKENS, if set")
    ] = None
    allow: AllowSpec = field(default_factory=AllowSpec)
    heatmaps: Annotated[
        str | None, Field(description="folder for stored heatmaps; none = heatmaps are returned inline only")
    ] = None
    batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            description="images in one forward pass, which requests share; none = 1 on CPUs, where a single image is "
            f"answered sooner, and {BATCH_SIZE} on GPUs and for archives, as in jobs",
        ),
    ] = None
    batch_wait_seconds: Annotated[float, Field(ge=0, description="how long a batch waits for more images")] = 0.005
    limits: LimitSpec = field(default_factory=LimitSpec)
    max_workers: Annotated[
        int | None, Field(ge=1, description="maximum number of replicas; none = always resources.num_workers")
    ] = None
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    @property
    def online_batch_size(self) -> int:
        """Images in one forward pass for requests with single images."""
        return self.batch_size or (BATCH_SIZE if self.resources.gpus_per_worker else 1)

    @property
    def archive_batch_size(self) -> int:
        """The same for archive runs."""
        return self.batch_size or BATCH_SIZE

    def __post_init__(self) -> None:
        if self.resources.bank_shards != 1:
            raise ValueError("resources.bank_shards applies to scoring jobs only; remove it")
        if self.max_workers is not None and self.max_workers < self.resources.num_workers:
            raise ValueError(f"max_workers = {self.max_workers} is less than resources.num_workers; raise it")
