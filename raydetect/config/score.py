"""`kind: score`: scores an archive with an artifact and writes a results directory."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config.shared import BATCH_SIZE, Flag, FlagSpec, MiB, ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.validation import STRICT

Heatmaps = Literal["none", "flagged", "top_k", "all"]
MAX_REGIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkSpec:
    """Where results go and which images get a heatmap."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    uri: Annotated[str, Field(description="results directory")]
    storage: Annotated[StorageOptions | None, Field(description="storage of the results; none = the job's storage")] = (
        None
    )
    heatmaps: Annotated[Heatmaps, Field(description="which images get a heatmap")] = "flagged"
    top_k: Annotated[
        int, Field(ge=1, description="with top_k: heatmaps per chunk, which include the top_k of the whole run")
    ] = 8
    style: Annotated[
        Literal["overlay", "map"],
        Field(description="overlay on the image, or the map as 16-bit PNG with the manifest's scale"),
    ] = "overlay"
    max_regions: Annotated[
        int, Field(ge=0, le=10_000, description="regions in the row of a flagged image, those with the highest peaks")
    ] = MAX_REGIONS
    close_ups: Annotated[
        bool,
        Field(
            description="with style overlay: every region of a picture that is larger than its overlay (1024 px) also "
            "gets a close-up, a window of up to 512 px at full size"
        ),
    ] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSpec:
    """`kind: score`: scores an archive with an artifact and writes a results directory."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["score"]
    source: SourceSpec
    artifact: Annotated[str, Field(description="the fitted detector")]
    sink: SinkSpec
    storage: Annotated[StorageOptions, Field(description="storage for everything that has none of its own")] = field(
        default_factory=StorageOptions
    )
    flag: Flag = field(default_factory=FlagSpec)
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass")] = BATCH_SIZE
    chunk_images: Annotated[int, Field(ge=1, description="images that a worker scores at a time, at most")] = 64
    chunk_bytes: Annotated[int, Field(ge=1, description="encoded bytes after which a chunk is closed")] = 128 * MiB
    max_bad_fraction: Annotated[
        float, Field(ge=0, le=1, description="more bad rows or shards than this share: exit 3")
    ] = 0.05
    engine: Annotated[
        Literal["batch", "serve"],
        Field(description="batch: actors of this job; serve: the running replicas of `raydetect serve` on the cluster"),
    ] = "batch"
    resources: ResourceSpec = field(default_factory=ResourceSpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReflagSpec:
    """The settings that `raydetect reflag` changes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    flag: Flag
