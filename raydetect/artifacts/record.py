"""`artifact.json`: the record of a fitted detector, readable without torch.

An artifact is a folder with this record and one safetensors file. The tensors are written first, under a name derived
from their sha256; the record, written last, names them and is the commit, after which the tensors of a replaced
artifact are removed. So a killed fit leaves no partial artifact, and the previous one whole.

A fleet (`fleet.py`) has a record of the same name that lists one artifact for each category. Its members may share the
tensors of one detector, which lie beside its record.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field

from raydetect import __version__
from raydetect.config import JpegScale
from raydetect.config.validation import STRICT, validate
from raydetect.errors import ArtifactError, MissingError, SpecError
from raydetect.images.preprocess import Preprocess
from raydetect.storage import Storage, join_uri
from raydetect.views.view import View

FORMAT_VERSION = 2  # 2: `preprocess` states how images are decoded, which readers of format 1 would not know
WITH_VIEW = 3  # 3: `preprocess` has a view; others stay at 2, so that earlier versions can read them
SHARED = 4  # 4: `tensors` may be those of the fleet, in its folder; others stay at 2 and 3
# Fleets start at 2, so that readers of format 1 ask for an update instead of reporting a damaged record.
FORMATS = {"detector": SHARED, "fleet": 2}
RECORD = "artifact.json"
MAX_SIDE_PX = 16_384
MAX_REASON = 200
MAX_FLOAT32 = 3.4028234663852886e38  # scores and maps are float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Scores of held-out normal images, which were not used for fitting.

    Attributes:
        scores: image scores in ascending order.
        map_low: smallest anomaly map value of these images.
        map_high: largest anomaly map value of these images.
        map_peaks: highest anomaly map value of each of these images, in ascending order; empty if the detector does not
            localise, None in artifacts of older versions.
    """

    scores: tuple[float, ...]
    map_low: float
    map_high: float
    map_peaks: tuple[float, ...] | None = None

    def map_scale(self) -> tuple[float, float]:
        """Returns (low, high) of the fixed heatmap scale: ten times the range of normal images, from its low end."""
        width = max(self.map_high - self.map_low, 1e-6)
        return self.map_low, self.map_low + 10.0 * width


def _ascending(scores: tuple[float, ...]) -> tuple[float, ...]:
    if any(second < first for first, second in pairwise(scores)):
        raise ValueError("is not in ascending order")
    return scores


Finite = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(strict=True, gt=0, lt=1 << 63)]
Side = Annotated[int, Field(strict=True, gt=0, le=MAX_SIDE_PX)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationShape:
    """Validated form of `Calibration`."""

    scores: Annotated[tuple[Finite, ...], AfterValidator(_ascending), Field(min_length=1)]
    map_low: Finite
    map_high: Finite
    map_peaks: Annotated[tuple[Finite, ...], AfterValidator(_ascending)] | None = None

    def __post_init__(self) -> None:
        """Refuses an inverted range."""
        if self.map_high < self.map_low:
            raise ValueError(f"map_high = {self.map_high} is below map_low = {self.map_low}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamsShape:
    """Parameters common to all detectors; each detector validates its own."""

    image_size: tuple[Side, Side]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessShape:
    """Rules of decoding. Unknown ones are refused: images decoded otherwise than for the fit get other scores."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    jpeg_scale: JpegScale = "full"
    view: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a view that cannot be restored."""
        try:
            View.of_record(self.view)
        except SpecError as error:
            raise ValueError(str(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorsShape:
    """Entry of the safetensors file; `shared` if it lies in the folder of the fleet, for all its categories."""

    file: Name
    sha256: Sha256
    bytes: Positive
    shared: Annotated[bool, Field(strict=True)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BankShape:
    """Entry of the memory bank: name and shape of its tensor."""

    tensor: Name
    rows: Positive
    dims: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShape:
    """Source of the images used for fitting."""

    uri: str | tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecShape:
    """Spec of the fit job."""

    source: SourceShape = field(default_factory=SourceShape)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordShape:
    """Required entries of the record of one detector; further entries are allowed."""

    detector: Name
    params: ParamsShape
    seed: Count
    tensors: TensorsShape
    calibration: CalibrationShape
    preprocess: PreprocessShape = field(default_factory=PreprocessShape)  # artifacts of format 1 have none
    bank: BankShape | None = None
    images: Mapping[str, Count] = field(default_factory=dict)
    images_per_second: Annotated[Finite, Field(ge=0)] = 0.0
    tiles_per_second: Annotated[Finite, Field(ge=0)] = 0.0
    spec: SpecShape = field(default_factory=SpecShape)
    weights: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    lineage: tuple[Mapping[str, Any], ...] = ()
    members: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Refuses a calibration with missing scores or peaks."""
        count, recorded = len(self.calibration.scores), self.images.get("held_out")
        if recorded not in (None, count):
            raise ValueError(f"images.held_out is {recorded}, but calibration.scores has {count}")
        peaks = self.calibration.map_peaks
        if peaks and len(peaks) != count:
            raise ValueError(f"calibration.map_peaks has {len(peaks)} values, but calibration.scores has {count}")


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """The parsed record.

    Attributes:
        uri: the artifact's folder.
        digest: sha256 of the record's bytes; it covers the tensors, whose sha256 the record contains.
        body: the parsed record.
    """

    uri: str
    digest: str
    body: Mapping[str, Any]

    @property
    def calibration(self) -> Calibration:
        """The stored calibration."""
        stored = self.body["calibration"]
        peaks = stored.get("map_peaks")
        return Calibration(
            scores=tuple(stored["scores"]),
            map_low=stored["map_low"],
            map_high=stored["map_high"],
            map_peaks=None if peaks is None else tuple(peaks),
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in px to which images are resized."""
        height, width = self.body["params"]["image_size"]
        return height, width

    @property
    def preprocess(self) -> Preprocess:
        """How images are decoded for the detector; without an entry (format 1), JPEGs are decoded in full."""
        entry = self.body.get("preprocess", {})
        view = View.of_record(entry.get("view", {}))
        return Preprocess(self.image_size, entry.get("jpeg_scale", "full"), view)

    def require_bank(self, pieces: int) -> tuple[int, int]:
        """Returns (rows, dims) of a memory bank that will be split into pieces.

        Raises:
            SpecError: the detector has no bank that can be split, or the bank has fewer rows than pieces.
        """
        bank = self.body.get("bank")
        if bank is None:
            raise SpecError(
                f"resources.bank_shards = {pieces}: the {self.body['detector']} of {self.uri} has no memory bank that "
                "can be split. Set it to 1."
            )
        if pieces > bank["rows"]:
            raise SpecError(
                f"resources.bank_shards = {pieces}: the bank of {self.uri} has {bank['rows']} rows. Set it lower."
            )
        return bank["rows"], bank["dims"]


def write_record(uri: str, storage: Storage, body: Mapping[str, Any]) -> str:
    """Commits an artifact by writing its record; returns its digest.

    Raises:
        StorageError: the record cannot be written.
    """
    version = WITH_VIEW if body.get("preprocess", {}).get("view") else FORMAT_VERSION
    if body["tensors"].get("shared"):
        version = SHARED
    elif body.get("format_version") != SHARED:  # a member of a fleet that is saved by itself has tensors of its own
        version = body.get("format_version", version)
    return write_json(uri, storage, {**body, "format_version": version})


def write_json(uri: str, storage: Storage, body: Mapping[str, Any]) -> str:
    """Writes a record of any kind; returns its digest.

    Raises:
        StorageError: the record cannot be written.
    """
    text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode()
    storage.write(join_uri(uri, RECORD), text)
    return hashlib.sha256(text).hexdigest()


def read_body(uri: str, storage: Storage) -> tuple[str, dict[str, Any]]:
    """Reads a record of any kind; returns (digest, content).

    Raises:
        ArtifactError: the record is missing, damaged, of an unknown kind or of a newer format.
        StorageError: the storage failed.
    """
    record_uri = join_uri(uri, RECORD)
    try:
        text = storage.read(record_uri)
    except MissingError as error:
        raise ArtifactError(f"no artifact: {error} Run `raydetect fit` first or correct `artifact`.") from None
    try:
        body = json.loads(text)
        version, kind = body["format_version"], kind_of(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArtifactError(f"{record_uri}: not an artifact record. Fit again.") from None
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{record_uri}: not an artifact record (format_version is {version!r:.40}). Fit again.")
    if kind not in FORMATS:
        kinds = " or ".join(FORMATS)
        raise ArtifactError(
            f"{record_uri}: is of kind {kind!r}, raydetect {__version__} reads {kinds}. Update raydetect or correct "
            "`artifact`."
        )
    if version > FORMATS[kind]:
        raise ArtifactError(
            f"{record_uri}: has format {version}, raydetect {__version__} reads up to {FORMATS[kind]}. "
            "Update raydetect."
        )
    return hashlib.sha256(text).hexdigest(), body


def kind_of(body: Mapping[str, Any]) -> str:
    """Returns the kind of a record; "detector" by default."""
    return str(body.get("kind", "detector"))


def read_record(uri: str, storage: Storage) -> ArtifactRecord:
    """Reads the record of one detector without its tensors.

    Raises:
        ArtifactError: the record is missing, damaged, of a newer format or a fleet.
    """
    digest, body = read_body(uri, storage)
    return parse_record(uri, digest, body)


def parse_record(uri: str, digest: str, body: Mapping[str, Any]) -> ArtifactRecord:
    """Validates the content of a record of one detector.

    Raises:
        ArtifactError: the record is damaged or a fleet.
    """
    if kind_of(body) == "fleet":
        record_uri = join_uri(uri, RECORD)
        raise ArtifactError(
            f"{record_uri}: is a fleet, but one detector is needed here. Name the artifact of one category."
        )
    checked(uri, body, RecordShape)
    return ArtifactRecord(uri, digest, body)


def checked(uri: str, body: Mapping[str, Any], shape: type) -> None:
    """Validates a record against a shape.

    Raises:
        ArtifactError: the record does not match; the message says where.
    """
    record_uri = join_uri(uri, RECORD)
    try:
        validate(shape, body, record_uri)
    except SpecError as error:
        first, *more = str(error).removeprefix(f"{record_uri}: ").rstrip(".").split("\n")
        others = f", and {len(more):,} more" if more else ""
        raise ArtifactError(f"{record_uri}: is damaged or foreign ({first[:MAX_REASON]}{others}). Fit again.") from None
