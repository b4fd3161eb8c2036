"""Request and response bodies; the OpenAPI document is generated from these."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raydetect.config import MAX_REGIONS, Heatmaps

MAX_URIS = 1000  # of one archive run
Uri = Annotated[str, Field(min_length=1, max_length=2000)]
Template = Annotated[str, Field(max_length=500)]
OnlineHeatmaps = Literal["none", "flagged", "all"]


class Strict(BaseModel):
    """A body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class ImageByUri(Strict):
    """An image that the server reads."""

    uri: Annotated[str, Field(min_length=1, max_length=2000, description="below a prefix of `allow.sources`")]
    category: Annotated[str | None, Field(max_length=200, description="which detector of a fleet scores it")] = None


class ScoreRequest(Strict):
    """Images by URI. Uploads use multipart/form-data instead, with parts named `images`."""

    images: Annotated[list[ImageByUri], Field(min_length=1, fail_fast=True)]
    heatmaps: Annotated[OnlineHeatmaps, Field(description="which images get a heatmap")] = "none"
    store_heatmaps: Annotated[bool, Field(description="write heatmaps to the server's folder and return URIs")] = False


class FoundRegion(BaseModel):
    """Where an image is anomalous, in px of the upright image."""

    x: Annotated[int, Field(description="first column of the box")]
    y: Annotated[int, Field(description="first row of the box")]
    width: int
    height: int
    area_px: Annotated[int, Field(description="pixels of the region itself")]
    peak_score: Annotated[float, Field(description="highest value of the anomaly map")]
    peak_x: int
    peak_y: int


class Score(BaseModel):
    """The result of one image. `image_score`, `p_value`, `threshold` and `flagged` are null unless `status` is `ok`."""

    name: Annotated[str, Field(description="file name or URI as sent")]
    status: Annotated[str, Field(description="ok, or why there is no score")]
    error: Annotated[str, Field(description="one sentence if not ok, else empty")]
    width: int | None
    height: int | None
    image_score: Annotated[float | None, Field(description="raw, higher = more anomalous")]
    p_value: Annotated[
        float | None, Field(description="share of held-out normal images that score at least as high (plus one)")
    ]
    threshold: Annotated[float | None, Field(description="scores from here on are flagged")]
    flagged: bool | None
    artifact: Annotated[str, Field(description="sha256 of the artifact version that scored")]
    category: str | None
    heatmap_png: Annotated[str | None, Field(description="base64 PNG of the overlay, if requested")]
    heatmap_uri: Annotated[str | None, Field(description="where the overlay is stored, if requested")]
    note: Annotated[
        str, Field(description="remarks on an image that is still scored: exif_ignored, pages_not_read: 3")
    ] = ""
    regions: Annotated[
        list[FoundRegion] | None,
        Field(
            description="where a flagged image is anomalous, highest peak first; null if the artifact has no peaks. "
            "Only runs store close-ups"
        ),
    ] = None
    regions_left_out: Annotated[int | None, Field(description="regions beyond the first 20")] = None


class ScoreAnswer(BaseModel):
    """One entry per image, in the order of the request."""

    detector: str
    artifact: Annotated[str, Field(description="sha256 of the artifact, or of the fleet's index")]
    results: list[Score]


class DetectorAnswer(BaseModel):
    """A served detector."""

    name: str
    algorithm: str
    artifact: Annotated[str, Field(description="sha256 of the version being served")]
    image_size: Annotated[list[int], Field(description="(height, width) in px that images are resized to")]
    threshold: Annotated[float | None, Field(description="scores from here on are flagged; null for a fleet")]
    alpha: float | None
    held_out: Annotated[int, Field(description="held-out normal images behind the threshold; the fewest in a fleet")]
    categories: Annotated[list[str], Field(description="categories of a fleet, else empty")]
    weights: Annotated[str, Field(description="source of the backbone weights")]


class Detectors(BaseModel):
    """All served detectors."""

    detectors: list[DetectorAnswer]


class NewArtifact(Strict):
    """A new version of a served detector."""

    artifact: Annotated[str, Field(min_length=1, max_length=2000, description="below a prefix of `allow.artifacts`")]


class RunSource(Strict):
    """Images of an archive; the keys of `source` in job files, with the server's own storage options."""

    uri: Annotated[
        Uri | Annotated[list[Uri], Field(min_length=1, max_length=MAX_URIS, fail_fast=True)],
        Field(description="below a prefix of `allow.sources`; a file, folder or glob"),
    ]
    format: Literal["auto", "tar", "zip", "parquet", "prefix"] = "auto"
    pattern: Template | None = None
    mask_pattern: Template | None = None
    image_column: Template | None = None
    exif_orientation: Literal["apply", "ignore"] = "apply"
    on_bad_shard: Literal["fail", "record"] = "record"


class RunSink(Strict):
    """Where results go; the keys of `sink` in job files."""

    uri: Annotated[str, Field(min_length=1, max_length=2000, description="below a prefix of `allow.sinks`")]
    heatmaps: Heatmaps = "flagged"
    top_k: Annotated[int, Field(ge=1)] = 8
    style: Literal["overlay", "map"] = "overlay"
    max_regions: Annotated[int, Field(ge=0, le=10_000)] = MAX_REGIONS
    close_ups: Annotated[bool, Field(description="full-size windows around the regions of large pictures")] = True


class RunRequest(Strict):
    """An archive to score. The same request resumes a run that stopped."""

    detector: Annotated[str, Field(max_length=200)]
    source: RunSource
    sink: RunSink
    chunk_images: Annotated[int, Field(ge=1, le=4096)] = 64
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05


class RunAnswer(BaseModel):
    """The progress of an archive run, from its ledger alone."""

    id: str
    uri: Annotated[str, Field(description="the results directory")]
    state: Annotated[
        Literal["running", "finished", "failed", "cancelled", "stopped"],
        Field(description="stopped: not finished and not running here; send the same request to resume"),
    ]
    error: Annotated[str, Field(description="why it failed, else empty")] = ""
    shards_done: int
    shards: int
    images: int
    bad_images: int
    flagged: int
    statuses: Annotated[dict[str, int], Field(description="images by status: ok, or why there is no score")]


class Runs(BaseModel):
    """Runs requested since this server started."""

    runs: list[RunAnswer]


class Problem(BaseModel):
    """Why a request failed, in one sentence."""

    detail: str


class NoneScored(Problem):
    """No image of a request could be scored."""

    detector: str
    artifact: str
    results: list[Score]
