"""The job file's words: frozen, strict dataclasses with a doc line and a check under every field."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config import STRICT, apply_overrides, digest, nearest, to_plain, validate
from raydetect.errors import SpecError

MiB = 1 << 20
Preset = Literal["paper", "smoke"]
ENSEMBLE = "ensemble"
FIT_CHUNK_IMAGES, FIT_CHUNK_BYTES = 64, 128 * MiB  # how a fit cuts its archive; it does not change the artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """How to reach object storage. Empty means the usual AWS environment (variables, profile, role)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    endpoint_url: Annotated[str | None, Field(description="S3 endpoint, e.g. http://127.0.0.1:9000")] = None
    key: Annotated[str | None, Field(description="access key id")] = None
    secret: Annotated[str | None, Field(description="secret access key")] = None
    token: Annotated[str | None, Field(description="session token")] = None
    profile: Annotated[str | None, Field(description="profile of the AWS configuration files")] = None
    region: Annotated[str | None, Field(description="region name")] = None
    anon: Annotated[bool, Field(description="anonymous requests")] = False

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
    max_pixels: Annotated[int, Field(gt=0, description="larger images are refused from their header")] = 178_956_970
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
class MemberSpec:
    """One algorithm, with its parameters (`raydetect detectors NAME` lists them)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: Annotated[str, Field(description="a name of `raydetect detectors`")]
    preset: Annotated[
        Preset, Field(description="paper: the published defaults; smoke: small and quick, for tests, never for results")
    ] = "paper"
    params: Annotated[dict[str, Any], Field(description="parameters that differ from the defaults")] = field(
        default_factory=dict
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSpec:
    """Which algorithm, with which parameters; or an ensemble of several, in one artifact."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: Annotated[str, Field(description="a name of `raydetect detectors`; left out for an ensemble")] = ENSEMBLE
    preset: Annotated[Preset, Field(description="paper or smoke, as for a member of an ensemble")] = "paper"
    params: Annotated[dict[str, Any], Field(description="parameters that differ from the defaults")] = field(
        default_factory=dict
    )
    ensemble: Annotated[
        tuple[MemberSpec, ...],
        Field(description="instead of name: detectors whose scores are averaged on a common scale, of one image_size"),
    ] = ()
    weights: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None,
        Field(description="of the mean over the ensemble; only their ratios matter; none = equal"),
    ] = None

    def __post_init__(self) -> None:
        if bool(self.ensemble) != (self.name == ENSEMBLE):
            raise ValueError("state either a name or an ensemble of detectors, and not both")
        if self.ensemble and (self.params or self.preset != "paper"):
            raise ValueError("params and preset belong to the members of an ensemble, so state them there")
        if self.weights is not None and len(self.weights) != len(self.ensemble):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.ensemble)} members of an ensemble; state one each"
            )

    @property
    def members(self) -> tuple[MemberSpec, ...]:
        """The detectors of the ensemble, or the only one."""
        return self.ensemble or (MemberSpec(name=self.name, preset=self.preset, params=self.params),)

    @property
    def title(self) -> str:
        """`patchcore`, or `ensemble of patchcore, stfpm`."""
        return f"{ENSEMBLE} of {', '.join(m.name for m in self.ensemble)}" if self.ensemble else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """Normal images that the detector does not see while fitting; thresholds come from these alone."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    holdout_ratio: Annotated[
        float, Field(gt=0, lt=1, description="share of the source held out, chosen by hash of seed and key")
    ] = 0.1
    source: Annotated[SourceSpec | None, Field(description="a separate archive of normal images instead")] = None


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
class SinkSpec:
    """Where results go, and which images get a heatmap."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    uri: Annotated[str, Field(description="results directory")]
    storage: Annotated[StorageOptions | None, Field(description="storage of the results; none = the job's own")] = None
    heatmaps: Annotated[Literal["none", "flagged", "top_k", "all"], Field(description="which images get a heatmap")] = (
        "flagged"
    )
    top_k: Annotated[int, Field(ge=1, description="with top_k: heatmaps per chunk; they include the run's top_k")] = 8
    style: Annotated[
        Literal["overlay", "map"],
        Field(description="a picture for people, or the map as 16-bit PNG on the manifest's scale"),
    ] = "overlay"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagSpec:
    """When an image is flagged: exactly one of the two."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    alpha: Annotated[float | None, Field(gt=0, lt=1, description="flag when the conformal p-value is <= alpha")] = None
    threshold: Annotated[float | None, Field(description="flag when the image score is >= threshold")] = None

    def __post_init__(self) -> None:
        if (self.alpha is None) == (self.threshold is None):
            raise ValueError("state either alpha or threshold, and not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSpec:
    """`kind: fit`: images to an artifact."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["fit"]
    source: SourceSpec
    detector: DetectorSpec
    artifact: Annotated[str, Field(description="where the artifact is written")]
    storage: Annotated[StorageOptions, Field(description="storage of everything that names none")] = field(
        default_factory=StorageOptions
    )
    seed: Annotated[int, Field(ge=0, description="seeds every random choice")] = 0
    per_category: Annotated[
        bool,
        Field(
            description="fit a fleet: one detector for each {category} of the pattern, side by side on the workers, "
            "in one artifact"
        ),
    ] = False
    extend: Annotated[
        str | None,
        Field(description="an artifact whose memory bank takes in the images of the source; none = fit anew"),
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass of collect")] = 16
    max_bank_bytes: Annotated[
        int, Field(ge=1, description="memory of each worker for collected rows; more lies on its disk")
    ] = 4096 * MiB
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="of training; bfloat16 is torch autocast")
    ] = "float32"
    checkpoint_epochs: Annotated[
        int, Field(ge=1, description="epochs between kept states of a training; a killed fit goes on from the last")
    ] = 10
    max_failures: Annotated[int, Field(ge=0, description="lost workers or nodes after which the fit is given up")] = 3
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    max_bad_fraction: Annotated[
        float, Field(ge=0, le=1, description="more bad images than this share: exit 3, no artifact")
    ] = 0.05
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    def __post_init__(self) -> None:
        if self.per_category and self.extend is not None:
            raise ValueError("extend takes one artifact, so extend the categories of a fleet one by one")
        if self.detector.ensemble and self.extend is not None:
            raise ValueError("extend adds to one memory bank, so fit an ensemble anew on all images")
        if self.resources.bank_shards != 1:
            raise ValueError("resources.bank_shards cuts the bank for scoring; leave it out of a fit")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSpec:
    """`kind: score`: an archive and an artifact to a results directory."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["score"]
    source: SourceSpec
    artifact: Annotated[str, Field(description="the fitted detector")]
    sink: SinkSpec
    storage: Annotated[StorageOptions, Field(description="storage of everything that names none")] = field(
        default_factory=StorageOptions
    )
    flag: FlagSpec = field(default_factory=lambda: FlagSpec(alpha=0.01))
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass")] = 16
    chunk_images: Annotated[int, Field(ge=1, description="images per Parquet part, at most")] = 64
    chunk_bytes: Annotated[int, Field(ge=1, description="encoded bytes after which a chunk is closed")] = 128 * MiB
    max_bad_fraction: Annotated[
        float, Field(ge=0, le=1, description="more bad rows or shards than this share: exit 3")
    ] = 0.05
    resources: ResourceSpec = field(default_factory=ResourceSpec)


FREE_RESOURCES = ("num_workers", "detectors_in_memory", "bank_shards")  # they do not change rows
JobSpec = FitSpec | ScoreSpec
KINDS: dict[str, type[FitSpec] | type[ScoreSpec]] = {"fit": FitSpec, "score": ScoreSpec}


def parse_job(values: dict[str, Any], where: str, overrides: tuple[str, ...] = ()) -> JobSpec:
    """A job from the plain values of its file.

    Args:
        values: what the YAML file held.
        where: the file's name, for messages.
        overrides: `a.b=c` texts of `--set`.

    Raises:
        SpecError: every mistake, one line each.
    """
    values = apply_overrides(values, overrides)
    kind = values.get("kind")
    if kind not in KINDS:
        said = "kind is missing" if kind is None else f"kind {kind!r} is unknown"
        raise SpecError(f"{where}: {said}.{nearest(str(kind), list(KINDS))}")
    return validate(KINDS[kind], values, where)


def source_storage(spec: JobSpec, source: SourceSpec) -> StorageOptions:
    """The storage that a source of this job uses."""
    return source.storage or spec.storage


def sink_storage(spec: ScoreSpec) -> StorageOptions:
    """The storage that the results of this job use."""
    return spec.sink.storage or spec.storage


def public_spec(spec: JobSpec) -> dict[str, Any]:
    """The spec with all defaults and without credentials: what run.json and the artifact hold."""
    public: dict[str, Any] = _redact(to_plain(spec))
    return public


def result_digest(spec: JobSpec) -> str:
    """sha256 over what decides the rows: the public spec less storage and what workers may have more or less of.

    Threads per worker stay in: floating-point sums may depend on them.
    """
    return digest(result_words(public_spec(spec)))


def result_words(public: dict[str, Any]) -> dict[str, Any]:
    """The part of a public spec that decides the rows."""
    words = {k: _without_storage(v) for k, v in public.items() if k not in ("storage", "max_bad_fraction")}
    for name in ("max_failures", "max_bank_bytes", "checkpoint_epochs"):
        words.pop(name, None)
    words["resources"] = {k: v for k, v in words["resources"].items() if k not in FREE_RESOURCES}
    return words


def with_workers(spec: ScoreSpec, num_workers: int) -> ScoreSpec:
    """The same job on another number of workers."""
    return replace(spec, resources=replace(spec.resources, num_workers=num_workers))


def _without_storage(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "storage"} if isinstance(value, dict) else value


def _redact(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: {i: j for i, j in v.items() if i not in ("key", "secret", "token")}
            if k == "storage" and isinstance(v, dict)
            else _redact(v)
            for k, v in value.items()
        }
    return value
