"""Settings shared by several kinds of jobs: storage, source, resources and flag rules."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SecretStr

from raydetect.config.validation import STRICT
from raydetect.redaction import redacted_uri

MiB = 1 << 20
BATCH_SIZE = 16  # images in one forward pass; scores depend on it in the last digits
USUAL_LEVEL = 0.01  # share of normal images that a job without a rule flags
NO_FLAG = "none"  # `flag: none` in job files


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """Options of object storage. If empty, the usual AWS environment applies (variables, profile, role).

    Keys are `SecretStr`, since Ray shows the arguments of its jobs on the dashboard.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    endpoint_url: Annotated[str | None, Field(description="S3 endpoint, e.g. http://127.0.0.1:9000")] = None
    key: Annotated[SecretStr | None, Field(description="access key id")] = None
    secret: Annotated[SecretStr | None, Field(description="secret access key")] = None
    token: Annotated[SecretStr | None, Field(description="session token")] = None
    profile: Annotated[str | None, Field(description="profile of the AWS configuration files")] = None
    region: Annotated[str | None, Field(description="region name")] = None
    anon: Annotated[bool, Field(description="anonymous requests")] = False

    def __post_init__(self) -> None:
        for name in ("key", "secret", "token"):
            if isinstance(getattr(self, name), str):  # passed by Python code
                object.__setattr__(self, name, SecretStr(getattr(self, name)))
        if self.endpoint_url is not None and redacted_uri(self.endpoint_url) != self.endpoint_url:
            raise ValueError("endpoint_url contains a user or query; write http://HOST:PORT, and set key and secret")

    def public(self) -> dict[str, Any]:
        """The options without key, secret and token, which may be written and printed."""
        return {
            "endpoint_url": self.endpoint_url,
            "profile": self.profile,
            "region": self.region,
            "anon": self.anon,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """The images: location, format, selection, and handling of bad ones."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    uri: Annotated[str | tuple[str, ...], Field(description="a file, folder or glob, or a list of them")]
    format: Annotated[
        Literal["auto", "tar", "zip", "parquet", "prefix"],
        Field(description="archive format; auto detects it from file names, per folder"),
    ] = "auto"
    storage: Annotated[StorageOptions | None, Field(description="storage of this source; none = the job's storage")] = (
        None
    )
    pattern: Annotated[
        str | None,
        Field(
            description="path of a member, e.g. {category}/test/{defect}/{name}.png; members that do not "
            "match are left out; {category}, {defect}, {label} and {split} fill columns"
        ),
    ] = None
    mask_pattern: Annotated[
        str | None,
        Field(description="path of an anomalous member's mask in the same archive, with the same fields"),
    ] = None
    normal_names: Annotated[tuple[str, ...], Field(description="values of {defect} that mean label 0")] = (
        "good",
        "normal",
        "ok",
    )
    image_column: Annotated[
        str | None, Field(description="Parquet column with images; none = the only one that qualifies")
    ] = None
    exif_orientation: Annotated[
        Literal["apply", "ignore"], Field(description="whether to rotate images by their EXIF tag")
    ] = "apply"
    max_pixels: Annotated[
        int,
        Field(
            gt=0,
            description="limit per image; larger ones are refused by their header. A process decodes at most so many "
            "pixels at a time, or 67,108,864 if that is more, in at most 16 bytes each",
        ),
    ] = 178_956_970
    max_image_bytes: Annotated[
        int, Field(gt=0, description="limit per encoded image; larger ones are refused unread")
    ] = 512 * MiB
    split_bytes: Annotated[
        int, Field(gt=0, description="containers larger than this are split if they allow random access")
    ] = 1024 * MiB
    shard_images: Annotated[int, Field(gt=0, description="loose images per shard of a prefix source")] = 1024
    on_bad_shard: Annotated[
        Literal["fail", "record"],
        Field(description="an unreadable shard fails the job, or is recorded as a row with a status"),
    ] = "record"
    on_bad_member: Annotated[
        Literal["fail", "row"],
        Field(description="an unreadable image fails the job, or becomes a row with a status"),
    ] = "row"

    def uris(self) -> tuple[str, ...]:
        """The URIs as a tuple."""
        return (self.uri,) if isinstance(self.uri, str) else self.uri


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSpec:
    """Resources of each worker; never detected automatically."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    num_workers: Annotated[int, Field(ge=1, description="number of parallel workers")] = 1
    cpus_per_worker: Annotated[int, Field(ge=1, description="CPU slots and torch threads per worker")] = 1
    gpus_per_worker: Annotated[float, Field(ge=0, description="GPU share per worker; 0 = CPU")] = 0
    detectors_in_memory: Annotated[
        int,
        Field(ge=1, description="detectors of a fleet that each worker keeps loaded; evicts the least recently used"),
    ] = 8
    bank_shards: Annotated[
        int,
        Field(
            ge=1,
            description="parts of a memory bank that is too large for one device, for scoring; if more than 1, each "
            "has an actor of its own with the CPU slots and GPU share of a worker",
        ),
    ] = 1

    @property
    def num_actors(self) -> int:
        """Number of workers plus actors that hold parts of the bank."""
        return self.num_workers + (self.bank_shards if self.bank_shards > 1 else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagSpec:
    """When an image is flagged; set one field at most.

    With none of them, an image is flagged when its p-value is at most 0.01, or the smallest level that its detector
    allows. `flag: none` decides nothing: rows have scores and p-values, and `flagged` is null.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    alpha: Annotated[float | None, Field(gt=0, lt=1, description="flag when the conformal p-value is <= alpha")] = None
    threshold: Annotated[float | None, Field(description="flag when the image score is >= threshold")] = None
    fdr: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="expected share of normal images among all flagged images of the archive, at most "
            "(Benjamini-Hochberg); decided when the run finishes, and stored in the manifest",
        ),
    ] = None
    nothing: Annotated[bool, Field(description="decide nothing; the long form of `flag: none`")] = False

    def __post_init__(self) -> None:
        stated = sum(value is not None for value in (self.alpha, self.threshold, self.fdr))
        if stated > 1:
            raise ValueError("set only one of alpha, threshold and fdr")
        if stated and self.nothing:
            raise ValueError("nothing: true decides nothing, so leave out alpha, threshold and fdr")

    @property
    def is_usual(self) -> bool:
        """Whether the job states no rule."""
        return self.alpha is None and self.threshold is None and self.fdr is None and not self.nothing

    @property
    def text(self) -> str:
        """The rule as a job file states it: `flag.alpha = 0.05`, `flag: none`, `the default flag rule`."""
        if self.nothing:
            return f"flag: {NO_FLAG}"
        stated = {"alpha": self.alpha, "threshold": self.threshold, "fdr": self.fdr}
        return next(
            (f"flag.{name} = {value:g}" for name, value in stated.items() if value is not None), "the default flag rule"
        )

    def smallest_p(self, calibrated: int) -> tuple[str, float] | None:
        """The smallest p-value that a calibration must allow, and the setting that asks for it.

        Args:
            calibrated: number of images that the detector was calibrated on.

        Returns:
            (setting, p-value); None if flags do not depend on p-values.
        """
        if self.is_usual:
            return "flag", max(USUAL_LEVEL, 1.0 / (calibrated + 1))
        level = self.alpha if self.fdr is None else self.fdr
        return None if level is None else ("flag.alpha" if self.fdr is None else "flag.fdr", level)


def _flag_of_text(value: Any) -> Any:
    return {"nothing": True} if value == NO_FLAG else value


Flag = Annotated[
    FlagSpec, BeforeValidator(_flag_of_text), Field(description="when an image is flagged; none = nothing is decided")
]
