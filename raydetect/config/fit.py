"""`kind: fit`: fits a detector on images and writes an artifact."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config.geometry.paper_views import view_of_presets
from raydetect.config.shared import BATCH_SIZE, MiB, ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.validation import STRICT
from raydetect.config.view import STRETCH, ViewSpec

Preset = Literal["standard", "paper", "smoke"]
STANDARD: Preset = "standard"
JpegScale = Literal["at_least_2x", "full"]
Precision = Literal["float32", "bfloat16"]
CalibrationMethod = Literal["cross", "holdout"]
PerCategory = bool | Literal["calibration"]
AT_LEAST_2X: JpegScale = "at_least_2x"
ENSEMBLE = "ensemble"
HOLDOUT_RATIO = 0.1
FEW_IMAGES = 990  # of fewer, a tenth are too few for a p-value of 0.01
FIT_CHUNK_IMAGES, FIT_CHUNK_BYTES = 64, 128 * MiB  # chunk size of a fit; does not affect the artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSpec:
    """One algorithm, with its parameters (`raydetect detectors NAME` lists them)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: Annotated[str, Field(description="a name of `raydetect detectors`")]
    preset: Annotated[
        Preset,
        Field(
            description="standard: the published parameters, on the whole picture; paper: also the resize, crop and "
            "input size of the paper; smoke: small and fast, for tests only"
        ),
    ] = STANDARD
    params: Annotated[dict[str, Any], Field(description="parameters that differ from the defaults")] = field(
        default_factory=dict
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSpec:
    """An algorithm with its parameters, or an ensemble of several in one artifact."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: Annotated[str, Field(description="a name of `raydetect detectors`; omit for an ensemble")] = ENSEMBLE
    preset: Annotated[Preset, Field(description="standard, paper or smoke, as for ensemble members")] = STANDARD
    params: Annotated[dict[str, Any], Field(description="parameters that differ from the defaults")] = field(
        default_factory=dict
    )
    ensemble: Annotated[
        tuple[MemberSpec, ...],
        Field(description="instead of name: detectors with equal image_size; averages their scores on a common scale"),
    ] = ()
    weights: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None,
        Field(description="weights of the ensemble's mean; only their ratios matter; none = equal"),
    ] = None

    def __post_init__(self) -> None:
        if bool(self.ensemble) != (self.name == ENSEMBLE):
            raise ValueError("set either name or ensemble, not both")
        if self.ensemble and (self.params or self.preset != STANDARD):
            raise ValueError("params and preset belong to the members of an ensemble; set them there")
        if self.weights is not None and len(self.weights) != len(self.ensemble):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.ensemble)} members of an ensemble; set one each"
            )

    @property
    def members(self) -> tuple[MemberSpec, ...]:
        """The detectors of the ensemble, or the only one."""
        return self.ensemble or (MemberSpec(name=self.name, preset=self.preset, params=self.params),)

    def at_precision(self, precision: Precision) -> "DetectorSpec":
        """The spec with the parameter `precision` set for every detector.

        Raises:
            ValueError: the parameters of a detector state another one.
        """
        for member in self.members:
            stated = member.params.get("precision", precision)
            if stated != precision:
                raise ValueError(
                    f"precision {precision} contradicts precision {stated} in the params of {member.name}; remove one"
                )
        if not self.ensemble:
            return replace(self, params={**self.params, "precision": precision})
        members = [replace(member, params={**member.params, "precision": precision}) for member in self.ensemble]
        return replace(self, ensemble=tuple(members))

    @property
    def title(self) -> str:
        """`patchcore`, or `ensemble of patchcore, stfpm`."""
        return f"{ENSEMBLE} of {', '.join(m.name for m in self.ensemble)}" if self.ensemble else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """How thresholds are set: by scores of normal images that the scoring detector was not fitted on."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    method: Annotated[
        CalibrationMethod | None,
        Field(
            description="cross: several fits, each without some of the normal images, which it scores, and then the "
            "fit on all; for a detector that collects features and trains nothing. holdout: some normal images are "
            f"only scored. none = cross for such detectors and fewer than {FEW_IMAGES} normal images, else holdout"
        ),
    ] = None
    folds: Annotated[int, Field(ge=2, le=100, description="fits of cross besides the last")] = 5
    holdout_ratio: Annotated[
        float | None,
        Field(gt=0, lt=1, description="share of the source held out, chosen by hash of seed and key; none = 0.1"),
    ] = None
    source: Annotated[SourceSpec | None, Field(description="separate archive of normal images instead")] = None

    def __post_init__(self) -> None:
        if self.method == "cross" and self.holdout_ratio is not None:
            raise ValueError("method: cross holds no image out; remove holdout_ratio, or set method: holdout")
        if self.method is not None and self.source is not None:
            raise ValueError("source has the images to calibrate on; remove method")
        if self.method == "holdout" and self.folds != 5:
            raise ValueError("folds applies to method: cross; remove it, or set method: cross")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSpec:
    """How images become the input of the detector; the artifact records it, and whatever scores with it follows."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    jpeg_scale: Annotated[
        JpegScale | None,
        Field(
            description="at_least_2x: JPEGs are decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of their size whose "
            "sides have at least twice the px of the input's, which is several times as fast for large ones; full: at "
            "their own size. none = at_least_2x, or with extend the rule of its artifact"
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSpec:
    """`kind: fit`: fits a detector on images and writes an artifact."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["fit"]
    source: SourceSpec
    detector: DetectorSpec
    artifact: Annotated[str, Field(description="where the artifact is written")]
    replace: Annotated[bool, Field(description="whether an artifact that is there already is replaced")] = False
    storage: Annotated[StorageOptions, Field(description="storage for everything that has none of its own")] = field(
        default_factory=StorageOptions
    )
    seed: Annotated[int, Field(ge=0, description="seeds every random choice")] = 0
    per_category: Annotated[
        PerCategory,
        Field(
            description="true: fit a fleet, one detector per {category} of the pattern, in parallel on the workers, in "
            "one artifact; calibration: fit one detector on the images of all categories and calibrate it for each, in "
            "a fleet that stores and loads it once"
        ),
    ] = False
    extend: Annotated[
        str | None,
        Field(
            description="artifact to whose memory bank the images of the source are added; a detector that trained on "
            "auxiliary images keeps its training and compares with those of the source instead; none = a new fit"
        ),
    ] = None
    auxiliary: Annotated[
        SourceSpec | None,
        Field(
            description="images that train a detector which learns from others than those it will score: of other "
            "categories, with {category} in pattern, or of another data set, with masks of its defects; "
            "`raydetect detectors NAME` says which"
        ),
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass when collecting features")] = (
        BATCH_SIZE
    )
    max_bank_bytes: Annotated[
        int, Field(ge=1, description="memory per worker for collected rows; the rest spills to disk")
    ] = 4096 * MiB
    precision: Annotated[
        Precision | None,
        Field(
            description="sets the parameter precision of every detector of the job: of its networks, in the fit and "
            "in all scoring with the artifact; none = as their params say"
        ),
    ] = None
    checkpoint_epochs: Annotated[
        int, Field(ge=1, description="epochs between training checkpoints; a killed fit resumes from the last")
    ] = 10
    max_failures: Annotated[
        int, Field(ge=0, description="lost workers or nodes that a fit tolerates before it fails")
    ] = 3
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    view: Annotated[
        ViewSpec, Field(description="which parts of a picture the detector looks at, and at which size")
    ] = STRETCH
    max_bad_fraction: Annotated[
        float, Field(ge=0, le=1, description="more bad images than this share: exit 3, no artifact")
    ] = 0.05
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    def __post_init__(self) -> None:
        if self.auxiliary is not None and self.extend is not None:
            raise ValueError("extend keeps what the artifact learnt from auxiliary images; remove auxiliary")
        if self.auxiliary is not None and self.per_category:
            raise ValueError(
                "auxiliary trains a detector for one category; remove per_category, and fit the others with extend"
            )
        if self.per_category is True and self.extend is not None:
            raise ValueError("extend takes one artifact; extend the categories of a fleet one by one")
        if self.per_category == "calibration":
            self._refuse_with_calibration_alone()
        if self.detector.ensemble and self.extend is not None:
            raise ValueError("extend adds to one memory bank; refit an ensemble on all images")
        if self.resources.bank_shards != 1:
            raise ValueError("resources.bank_shards applies to scoring jobs only; remove it")
        object.__setattr__(self, "view", view_of_presets(self.detector.members, self.view))
        if self.view.has_files_of_category and self.per_category is not True:
            raise ValueError(
                "view.region has a mask for each {category}, or view.align_to a picture, but the job fits one "
                "detector, which has one view; set per_category: true, or name one file for all"
            )
        if self.precision is not None:
            object.__setattr__(self, "detector", self.detector.at_precision(self.precision))

    def _refuse_with_calibration_alone(self) -> None:
        if self.extend is not None:
            raise ValueError(
                "extend takes the bank of one artifact with one calibration; fit again on all images for "
                "per_category: calibration"
            )
        if self.detector.ensemble:
            raise ValueError(
                "an ensemble sets the scale of its members by images held out of all categories, so per_category: "
                "calibration takes one detector; set detector.name, or per_category: true"
            )
