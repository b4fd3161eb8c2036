"""The values that travel between the rooms: shards, members, chunks, rows, parts and receipts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OK = "ok"
# Paths in a results directory that chunks are written to, as a regular expression.
PART_FILE = r"(?:scores/shard=\d{5,}/part-\d{4,}\.parquet|heatmaps/\d{5,}-\d{4,}\.zip)"
BAD_STATUSES = frozenset(
    {
        "bad_shard",  # the container broke here; what follows in it is unknown
        "unsafe_name",  # absolute, `..`, or otherwise unusable member name
        "duplicate_key",  # a second member of the same name in one shard
        "empty",  # zero bytes
        "too_many_bytes",  # encoded image larger than source.max_image_bytes
        "too_many_pixels",  # header says more pixels than source.max_pixels
        "not_an_image",  # no decoder knows these bytes
        "corrupt",  # a decoder knows them and fails
        "unsupported_mode",  # decoded, but to pixels without a stated conversion (float TIFF)
        "unknown_category",  # the fleet has no detector for the image's category, or the image has none
        "not_finite",  # the detector returned NaN or infinity
        "unreadable",  # an object that the storage does not give: archived, not there, or not for this key
    }
)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Files that are no rows, for one reason: how many, and the names of the first."""

    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of scheduling, as listed on the driver without reading data.

    Attributes:
        index: position in the sorted listing; names files of the results directory.
        uri: the container (`s3://b/day.tar`), or the folder for loose images.
        format: "tar", "zip", "parquet" or "prefix".
        size_bytes: bytes this shard covers.
        fingerprint: changes when the bytes change (etag, or size and mtime).
        span: byte range [start, stop) of the container that this shard covers; None = all of it.
            A member belongs to the span in which its data (zip: header; parquet: row group) starts.
        listing: packed member names of a prefix shard, else empty.
        left_out: files beside the shards that the listing left out, by reason; on the first shard alone.
        index_uri: of the index by which a tar is read in parts, else "".
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
        """Key of the row that stands for the shard itself when it cannot be read."""
        return f"{self.uri}#" if self.span is None else f"{self.uri}#@{self.span[0]}"


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a shard: its encoded bytes, or the reason why there are none.

    Attributes:
        key: `<shard uri>#<member>`; stable, never a position.
        image_uri: fsspec URL that opens the encoded image as it is.
        data: encoded bytes; empty when `status` is not "ok".
        status: "ok" or one of BAD_STATUSES.
        error: one sentence when not ok, else "".
        label: 0 normal, 1 anomalous, None unknown.
        category: object category, None unknown.
        defect: defect type, None unknown.
        mask_uri: fsspec URL of the ground-truth mask, None when there is none.
        meta: the sidecar's JSON text, or "".
        raw_label: the value that `label` was read from, such as "good", or "" when there was none.
        notes: what was passed over in reading it, such as "label_not_read: maybe".
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

    The last chunk of a shard holds what was left out of the whole shard.
    """

    shard: int
    number: int
    last: bool
    members: tuple[Member, ...]
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`00012-0003`: names every file that this chunk writes."""
        return f"{self.shard:05d}-{self.number:04d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the results. Holds no time and no host name, so that a resumed run is equal row for row.

    `image_score` is raw (never clamped or normalised), None unless `status` is "ok"; so are the columns after it
    up to `heatmap_uri`. `p_value` is None when the artifact has no calibration; `threshold` and `flagged` are None
    too when flags are left to the whole archive (`flag.fdr`). `brightness` and `sharpness` describe the picture
    itself, so that a change of camera or light is told from a change of parts. `note` tells what does not make an image
    bad: notes such as "exif_ignored" and "pages_not_read: 3", joined by "; ". `sha256` is that of the encoded bytes
    that were scored, hex; "" where they could not be read.
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

    @property
    def note_kinds(self) -> list[str]:
        """What `note` tells, without numbers."""
        return [text.partition(":")[0] for text in self.note.split("; ") if text]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one image outside of an archive: its row, and its heatmap as PNG bytes when it has one."""

    row: Row
    heatmap: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one chunk left in the results directory; paths are relative to it.

    `p_counts` tells how many rows have which p-value, when flags are left to the whole archive; `notes` how many rows
    have a note of which kind, and `left_out` which files of the shard are no rows. `bytes` and `heatmap_bytes` are the
    sizes of the two files, 0 where an older raydetect wrote them.
    """

    chunk: str
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
    clipped_pixels: int = 0
    p_counts: Mapping[float, int] = field(default_factory=dict)
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The ledger record of a shard. Writing it commits the shard.

    Attributes:
        uri: of the shard, as are `fingerprint` and `span`.
        run: digest of what decides the rows of the job, less the archive; "" where an older raydetect wrote it, which
            did not write `span` either.
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
    """What a fit made.

    Attributes:
        uri: the artifact's folder.
        digest: its digest.
        facts: counts, weights, seconds and peak memory per phase, as stored in the artifact.
    """

    uri: str
    digest: str
    facts: Mapping[str, Any]
