"""`kind: fit`: images to an artifact."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config.shared import MiB, ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.validation import STRICT

Preset = Literal["paper", "smoke"]
ENSEMBLE = "ensemble"
FIT_CHUNK_IMAGES, FIT_CHUNK_BYTES = 64, 128 * MiB  # how a fit cuts its archive; it does not change the artifact


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
