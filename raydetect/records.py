"""The values passed between packages: shards, members, chunks, rows, parts and receipts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OK = "ok"
# Regular expression for the paths of Parquet files and heatmap zips in a results directory, also of older versions.
PART_FILE = (
    r"(?:scores/shard=\d{5,}/part-\d{4,}\.parquet"
    r"|heatmaps/(?:shard=\d{5,}/(?:part|chunk)-\d{4,}|\d{5,}-\d{4,})\.zip)"
)
JOB_FILE = "job.yaml"  # in results and artifacts of jobs that were started without a file
BAD_STATUSES = frozenset(
    {
        "bad_shard",  # the container is broken here; the rest of it is unknown
        "unsafe_name",  # absolute, `..`, or otherwise unusable member name
        "duplicate_key",  # a second member with the same name in one shard
        "empty",  # zero bytes
        "too_many_bytes",  # encoded image larger than source.max_image_bytes
        "too_many_pixels",  # more pixels than source.max_pixels, according to the header
        "not_an_image",  # no decoder recognises the bytes
        "corrupt",  # a decoder recognises them but fails
        "unsupported_mode",  # decoded to pixels without a defined conversion (float TIFF)
        "unknown_category",  # the fleet has no detector for the image's category, or the image has none
        "not_finite",  # the detector returned NaN or infinity
        "unreadable",  # an object that the storage does not return: archived, missing, or not accessible
    }
)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Files without a row for one reason: their number and the first names."""

    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of scheduling, as listed on the driver without reading data.

    Attributes:
        index: position in the sorted listing; used in file names of the results directory.
        uri: the container (`s3://b/day.tar`), or the folder for loose images.
        format: "tar", "zip", "parquet" or "prefix".
        size_bytes: bytes that this shard covers.
        fingerprint: changes when the bytes change (etag, or size and mtime).
        span: byte range [start, stop) of the container that this shard covers; None = all of it.
            A member belongs to the span in which its data (zip: header; parquet: row group) starts.
        listing: packed member names of a prefix shard, else empty.
        left_out: files that the listing left out, by reason; on the first shard only.
        index_uri: index for reading parts of a tar, else "".
    """

    index: int
    uri: str
    format: str
    size_bytes: int
    fingerprint: str
    span: tuple[int, int] | None = None
    listing: bytes = b""
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    index_uri: str = ""

    @property
    def name(self) -> str:
        """Five-digit name used in paths: `00012`."""
        return f"{self.index:05d}"

    @property
    def key(self) -> str:
        """Key of the row for the shard itself if it cannot be read."""
        return f"{self.uri}#" if self.span is None else f"{self.uri}#@{self.span[0]}"


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a shard: its encoded bytes, or why they are missing.

    Attributes:
        key: `<shard uri>#<member>`; stable, never an index.
        image_uri: fsspec URL of the encoded image.
        data: encoded bytes; empty if `status` is not "ok".
        status: "ok" or one of BAD_STATUSES.
        error: one sentence if not ok, else "".
        label: 0 normal, 1 anomalous, None unknown.
        category: object category, None unknown.
        defect: defect type, None unknown.
        mask_uri: fsspec URL of the ground-truth mask, or None.
        meta: the sidecar's JSON text, or "".
        raw_label: the value that `label` was read from, such as "good", or "".
        notes: remarks on reading it, such as "label_not_read: maybe".
    """

    key: str
    image_uri: str
    data: bytes = b""
    status: str = OK
    error: str = ""
    label: int | None = None
    category: str | None = None
    defect: str | None = None
    mask_uri: str | None = None
    meta: str = ""
    raw_label: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """At most `chunk_images` consecutive members of one shard: a pure function of the archive.

    The last chunk of a shard has the `left_out` of the whole shard.
    """

    shard: int
    number: int
    last: bool
    members: tuple[Member, ...]
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`00012-0003`: used in the names of all files that this chunk writes."""
        return f"{self.shard:05d}-{self.number:04d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnomalousRegion:
    """Touching pixels of an image whose anomaly is above that of normal images, in px of the upright stored image.

    Attributes:
        x: first column.
        y: first row.
        width: of the box.
        height: of the box.
        area_px: pixels of the region itself.
        peak_score: highest anomaly map value, raw as `image_score`.
        peak_x: column of that value.
        peak_y: row of that value.
    """

    x: int
    y: int
    width: int
    height: int
    area_px: int
    peak_score: float
    peak_x: int
    peak_y: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the results. Contains no time and no host name, so that a resumed run gives identical rows.

    `image_score` is raw (never clamped or normalised) and None unless `status` is "ok", as are the columns after it
    up to `heatmap_uri`. `p_value` is None if the artifact has no calibration; `threshold` and `flagged` are also None
    if flags depend on the whole archive (`flag.fdr`). `brightness` and `sharpness` describe the image itself, to
    distinguish a change of camera or light from a change of parts. `note` has remarks on an image that is not bad, such
    as "exif_ignored" and "pages_not_read: 3", joined by "; ". `sha256` is the hex digest of the encoded bytes that were
    scored; "" if they could not be read. `regions` says where an image that is flagged, or with `flag.fdr` may be, is
    anomalous, highest peak first, and `regions_left_out` how many more there are; both are None for other images, and
    if the artifact or the job allows none. `close_up_uris` has the close-ups of the first regions, in their order; None
    if there are none.
    """

    key: str
    image_uri: str
    chunk: str
    status: str
    error: str = ""
    width: int | None = None
    height: int | None = None
    brightness: float | None = None
    sharpness: float | None = None
    image_score: float | None = None
    p_value: float | None = None
    threshold: float | None = None
    flagged: bool | None = None
    heatmap_uri: str | None = None
    artifact: str = ""
    label: int | None = None
    category: str | None = None
    defect: str | None = None
    mask_uri: str | None = None
    meta: str = ""
    note: str = ""
    sha256: str = ""
    regions: tuple[AnomalousRegion, ...] | None = None
    regions_left_out: int | None = None
    close_up_uris: tuple[str, ...] | None = None


def note_kinds(note: str) -> list[str]:
    """The kinds of remarks in the column `note`, without their values."""
    return [text.partition(":")[0] for text in note.split("; ") if text]


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a single image: its row, and its heatmap as PNG bytes or None."""

    row: Row
    heatmap: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatmapZip:
    """A zip of heatmaps and close-ups in the results directory.

    Attributes:
        path: path in the results directory.
        sha256: of the file in hex; "" if an older raydetect wrote it.
        bytes: size of the file; 0 if an older raydetect wrote it.
        pictures: number of PNGs in it.
    """

    path: str
    sha256: str = ""
    bytes: int = 0
    pictures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A Parquet file of a shard with the pictures of its rows; paths are relative to the results directory.

    `p_counts` counts rows by p-value, if flags depend on the whole archive; `notes` counts rows by kind of note, and
    `left_out` has the files of the shard without a row. Older versions wrote one part and at most one zip for each
    chunk, with `heatmap_path`, `heatmap_sha256` and `heatmap_bytes`; sizes are 0 if a still older one wrote it.
    """

    shard: int
    number: int
    last: bool
    path: str
    sha256: str
    rows: int
    statuses: Mapping[str, int]
    flagged: int = 0
    labelled: int = 0
    heatmaps: int = 0
    heatmap_path: str = ""
    heatmap_sha256: str = ""
    bytes: int = 0
    heatmap_bytes: int = 0
    zips: tuple[HeatmapZip, ...] = ()
    clipped_pixels: int = 0
    regions: int = 0
    regions_left_out: int = 0
    close_ups: int = 0
    p_counts: Mapping[float, int] = field(default_factory=dict)
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    host: str = ""

    @property
    def heatmap_zips(self) -> tuple[HeatmapZip, ...]:
        """The zips, whichever version wrote them."""
        if not self.heatmap_path:
            return self.zips
        old = HeatmapZip(
            path=self.heatmap_path, sha256=self.heatmap_sha256, bytes=self.heatmap_bytes, pictures=self.heatmaps
        )
        return (*self.zips, old)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The ledger record of a shard. Writing it commits the shard.

    Attributes:
        uri: URI of the shard; `fingerprint` and `span` are the shard's too.
        run: digest of the job's settings that determine rows, without the archive; "" if an older raydetect wrote it,
            which did not write `span` either.
    """

    shard: int
    uri: str
    fingerprint: str
    span: tuple[int, int] | None = None
    run: str = ""
    rows: int
    statuses: Mapping[str, int]
    parts: tuple[Part, ...]
    error: str = ""
    committed_unix: float = 0.0
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def bad_rows(self) -> int:
        """Rows without a score."""
        return self.rows - self.statuses.get(OK, 0)


@dataclass(frozen=True, slots=True)
class FitReport:
    """The result of a fit.

    Attributes:
        uri: the artifact's folder.
        digest: the artifact's digest.
        facts: counts, weights, seconds and peak memory per phase, as stored in the artifact.
    """

    uri: str
    digest: str
    facts: Mapping[str, Any]
