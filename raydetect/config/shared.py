"""Words that several kinds of job files share: storage, source, resources, what is flagged."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, SecretStr

from raydetect.config.validation import STRICT
from raydetect.redaction import redacted_uri

MiB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """How to reach object storage. Empty means the usual AWS environment (variables, profile, role).

    Keys are of a type that shows none: Ray keeps what its jobs are given for its dashboard.
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
            if isinstance(getattr(self, name), str):  # as Python code may give it
                object.__setattr__(self, name, SecretStr(getattr(self, name)))
        if self.endpoint_url is not None and redacted_uri(self.endpoint_url) != self.endpoint_url:
            raise ValueError("endpoint_url holds a user or a query; write http://HOST:PORT, and keys as key and secret")

    def public(self) -> dict[str, Any]:
        """What may be written to disk or printed: no key, secret or token."""
        return {
            "endpoint_url": self.endpoint_url,
            "profile": self.profile,
            "region": self.region,
            "anon": self.anon,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """The images: where they are, how they are packed, which of them count, what to do with bad ones."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    uri: Annotated[str | tuple[str, ...], Field(description="a file, a folder, a glob, or a list of them")]
    format: Annotated[
        Literal["auto", "tar", "zip", "parquet", "prefix"],
        Field(description="how images are packed; auto decides by file name, folder by folder"),
    ] = "auto"
    storage: Annotated[StorageOptions | None, Field(description="storage of this source; none = the job's own")] = None
    pattern: Annotated[
        str | None,
        Field(
            description="path of a member, e.g. {category}/test/{defect}/{name}.png; members that do not "
            "match are left out; {category}, {defect}, {label} and {split} fill columns"
        ),
    ] = None
    mask_pattern: Annotated[
        str | None,
        Field(description="path of an anomalous member's mask in the same archive, by the same fields"),
    ] = None
    normal_names: Annotated[tuple[str, ...], Field(description="values of {defect} that mean label 0")] = (
        "good",
        "normal",
        "ok",
    )
    image_column: Annotated[
        str | None, Field(description="Parquet column with images; none = the only fitting one")
    ] = None
    exif_orientation: Annotated[
        Literal["apply", "ignore"], Field(description="turn images as their EXIF tag says, or not")
    ] = "apply"
    max_pixels: Annotated[
        int,
        Field(
            gt=0,
            description="larger images are refused from their header; a process decodes at most so many pixels at a "
            "time, or 67,108,864 if that is more, in at most 16 bytes each",
        ),
    ] = 178_956_970
    max_image_bytes: Annotated[int, Field(gt=0, description="larger encoded images are refused unread")] = 512 * MiB
    split_bytes: Annotated[
        int, Field(gt=0, description="containers larger than this are split where random access allows")
    ] = 1024 * MiB
    shard_images: Annotated[int, Field(gt=0, description="loose images per shard of a prefix source")] = 1024
    on_bad_shard: Annotated[
        Literal["fail", "record"],
        Field(description="an unreadable shard stops the job, or becomes a row with a status"),
    ] = "record"
    on_bad_member: Annotated[
        Literal["fail", "row"],
        Field(description="an unreadable image stops the job, or becomes a row with a status"),
    ] = "row"

    def uris(self) -> tuple[str, ...]:
        """The URIs as a tuple, however they were written."""
        return (self.uri,) if isinstance(self.uri, str) else self.uri


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSpec:
    """What each worker gets. Stated, never probed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    num_workers: Annotated[int, Field(ge=1, description="workers side by side")] = 1
    cpus_per_worker: Annotated[int, Field(ge=1, description="CPU slots and torch threads of each")] = 1
    gpus_per_worker: Annotated[float, Field(ge=0, description="GPU share of each; 0 = CPU")] = 0
    detectors_in_memory: Annotated[
        int, Field(ge=1, description="detectors of a fleet that each keeps loaded; the least recently used one goes")
    ] = 8
    bank_shards: Annotated[
        int,
        Field(
            ge=1,
            description="pieces that the memory bank is cut into when it is larger than one device, for scoring; more "
            "than 1: one extra actor each, with the CPU slots and GPU share of a worker",
        ),
    ] = 1

    @property
    def num_actors(self) -> int:
        """Workers, and holders of pieces of the bank."""
        return self.num_workers + (self.bank_shards if self.bank_shards > 1 else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagSpec:
    """When an image is flagged: exactly one of the three."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    alpha: Annotated[float | None, Field(gt=0, lt=1, description="flag when the conformal p-value is <= alpha")] = None
    threshold: Annotated[float | None, Field(description="flag when the image score is >= threshold")] = None
    fdr: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="of the images flagged in the whole archive, at most this share is expected to be normal "
            "(Benjamini-Hochberg); decided when the run is finished, and told by the manifest",
        ),
    ] = None

    def __post_init__(self) -> None:
        if sum(word is not None for word in (self.alpha, self.threshold, self.fdr)) != 1:
            raise ValueError("state one of alpha, threshold and fdr, and not more")

    @property
    def smallest_p(self) -> tuple[str, float] | None:
        """(word, p-value that the calibration must be able to give); None where p-values do not decide."""
        level = self.alpha if self.fdr is None else self.fdr
        return None if level is None else ("flag.alpha" if self.fdr is None else "flag.fdr", level)
