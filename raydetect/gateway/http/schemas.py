"""What requests and answers look like; the OpenAPI document is made of these."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raydetect.config import Heatmaps

OnlineHeatmaps = Literal["none", "flagged", "all"]


class Strict(BaseModel):
    """A body whose unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class ImageByUri(Strict):
    """An image that the server reads itself."""

    uri: Annotated[str, Field(min_length=1, max_length=2000, description="below a prefix of `allow.sources`")]
    category: Annotated[str | None, Field(max_length=200, description="which detector of a fleet scores it")] = None


class ScoreRequest(Strict):
    """Images by URI. Uploads are sent as multipart/form-data instead, in parts named `images`."""

    images: Annotated[list[ImageByUri], Field(min_length=1)]
    heatmaps: Annotated[OnlineHeatmaps, Field(description="which images get a heatmap")] = "none"
    store_heatmaps: Annotated[bool, Field(description="write heatmaps to the server's folder, answer with URIs")] = (
        False
    )


class Score(BaseModel):
    """What is known of one image. `image_score` and what follows it are null unless `status` is `ok`."""

    name: Annotated[str, Field(description="file name or URI as it was sent")]
    status: Annotated[str, Field(description="ok, or why there is no score")]
    error: Annotated[str, Field(description="one sentence when not ok, else empty")]
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
    heatmap_png: Annotated[str | None, Field(description="the overlay as base64 of a PNG, when it was asked for")]
    heatmap_uri: Annotated[str | None, Field(description="where the overlay is stored, when that was asked for")]
    note: Annotated[str, Field(description="what does not make an image bad: exif_ignored, pages_not_read: 3")] = ""


class ScoreAnswer(BaseModel):
    """One entry for each image, in the order of the request."""

    detector: str
    artifact: Annotated[str, Field(description="sha256 of the artifact, or of the fleet's index")]
    results: list[Score]


class DetectorAnswer(BaseModel):
    """A served detector."""

    name: str
    algorithm: str
    artifact: Annotated[str, Field(description="sha256 of the version that scores now")]
    image_size: Annotated[list[int], Field(description="(height, width) in px that images are resized to")]
    threshold: Annotated[float | None, Field(description="scores from here on are flagged; null for a fleet")]
    alpha: float | None
    held_out: Annotated[int, Field(description="held-out normal images behind thresholds; the smallest of a fleet")]
    categories: Annotated[list[str], Field(description="of a fleet, else empty")]
    weights: Annotated[str, Field(description="what the backbone was loaded from")]


class Detectors(BaseModel):
    """All served detectors."""

    detectors: list[DetectorAnswer]


class NewArtifact(Strict):
    """A new version of a served detector."""

    artifact: Annotated[str, Field(min_length=1, max_length=2000, description="below a prefix of `allow.artifacts`")]


class RunSource(Strict):
    """Images of an archive; the words are those of `source` in job files, storage is the server's own."""

    uri: Annotated[str | list[str], Field(description="below a prefix of `allow.sources`; a file, a folder, a glob")]
    format: Literal["auto", "tar", "zip", "parquet", "prefix"] = "auto"
    pattern: str | None = None
    mask_pattern: str | None = None
    image_column: str | None = None
    exif_orientation: Literal["apply", "ignore"] = "apply"
    on_bad_shard: Literal["fail", "record"] = "record"


class RunSink(Strict):
    """Where results go; the words are those of `sink` in job files."""

    uri: Annotated[str, Field(min_length=1, max_length=2000, description="below a prefix of `allow.sinks`")]
    heatmaps: Heatmaps = "flagged"
    top_k: Annotated[int, Field(ge=1)] = 8
    style: Literal["overlay", "map"] = "overlay"


class RunRequest(Strict):
    """An archive to score. The same request again goes on where the run stopped."""

    detector: str
    source: RunSource
    sink: RunSink
    chunk_images: Annotated[int, Field(ge=1, le=4096)] = 64
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05


class RunAnswer(BaseModel):
    """How far an archive run is, from its ledger alone."""

    id: str
    uri: Annotated[str, Field(description="the results directory")]
    state: Annotated[
        Literal["running", "finished", "failed", "cancelled", "stopped"],
        Field(description="stopped: not finished, and not running here; the same request again goes on"),
    ]
    error: Annotated[str, Field(description="why it failed, else empty")] = ""
    shards_done: int
    shards: int
    images: int
    bad_images: int
    flagged: int
    statuses: Annotated[dict[str, int], Field(description="images by status: ok, or why there is no score")]


class Runs(BaseModel):
    """Runs that this server was asked for since it started."""

    runs: list[RunAnswer]


class Problem(BaseModel):
    """Why a request was not done, in one sentence."""

    detail: str


class NoneScored(Problem):
    """Every image of a request is bad."""

    detector: str
    artifact: str
    results: list[Score]
