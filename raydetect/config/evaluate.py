"""`kind: evaluate`: a leaderboard of detectors on labelled images, or of existing results."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config.fit import DetectorSpec, PreprocessSpec
from raydetect.config.geometry.paper_views import view_of_presets
from raydetect.config.shared import BATCH_SIZE, ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.validation import STRICT
from raydetect.config.view import STRETCH, ViewSpec

Layout = Literal["mvtec_ad", "mvtec_ad2", "visa", "btad", "manifest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSpec:
    """A labelled data set of loose images in its published layout."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    uri: Annotated[str, Field(description="folder of the data set")]
    layout: Annotated[
        Layout,
        Field(description="folder layout; visa reads its split CSV, manifest reads manifest.csv in the folder"),
    ]
    split_csv: Annotated[str, Field(description="visa only: the split CSV file in the folder")] = "split_csv/1cls.csv"
    categories: Annotated[tuple[str, ...], Field(description="categories to evaluate; none = all")] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveSpec:
    """A labelled archive of any format; the patterns of its sources define labels."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    train: SourceSpec
    test: SourceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSpec:
    """`kind: evaluate`: a leaderboard of detectors on labelled images, or of existing results."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["evaluate"]
    output: Annotated[str, Field(description="folder of cells and leaderboard; an interrupted job resumes there")]
    data: Annotated[LabelledSpec | None, Field(description="a labelled data set of loose images")] = None
    archive: Annotated[ArchiveSpec | None, Field(description="a labelled archive instead")] = None
    results: Annotated[
        tuple[str, ...],
        Field(description="results directories of labelled archives instead; these have image scores but no maps"),
    ] = ()
    detectors: Annotated[
        tuple[DetectorSpec, ...], Field(description="detectors to fit and evaluate; one line of the leaderboard each")
    ] = ()
    per_category: Annotated[
        bool,
        Field(
            description="fit every detector for each category of data; false = one detector for the images of all of "
            "them, as for UniAD. Figures are of each category and their mean at either"
        ),
    ] = True
    auxiliary: Annotated[
        SourceSpec | None,
        Field(
            description="images that train detectors which learn from others than those they score, as in a fit job; "
            "none = for a detector that learns from other categories, the normal training images of all categories of "
            "data but the evaluated one"
        ),
    ] = None
    grid: Annotated[
        Mapping[str, tuple[Any, ...]],
        Field(description="parameter values by name; every detector is fitted with every combination"),
    ] = field(default_factory=dict)
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(min_length=1, description="seeds for each cell; the leaderboard has mean and std over them"),
    ] = (0,)
    replicates: Annotated[int, Field(ge=0, description="bootstrap replicates for intervals; 0 = none")] = 200
    holdout_ratio: Annotated[
        float, Field(gt=0, lt=1, description="as in a fit job, so that detectors are the same")
    ] = 0.1
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    view: Annotated[
        ViewSpec, Field(description="which parts of a picture every detector looks at, and at which size")
    ] = STRETCH
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass")] = BATCH_SIZE
    storage: Annotated[StorageOptions, Field(description="storage for everything that has none of its own")] = field(
        default_factory=StorageOptions
    )
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    def __post_init__(self) -> None:
        if sum((self.data is not None, self.archive is not None, bool(self.results))) != 1:
            raise ValueError("set exactly one of data, archive and results")
        if bool(self.results) == bool(self.detectors):
            raise ValueError("set detectors with data or archive, and not with results")
        self._check_categories()
        if self.results and (self.grid or self.seeds != (0,)):
            raise ValueError("grid and seeds apply to detectors that are fitted; remove them with results")
        if self.results and self.auxiliary is not None:
            raise ValueError("auxiliary applies to detectors that are fitted; remove it with results")
        if self.grid and any(detector.ensemble for detector in self.detectors):
            raise ValueError("grid sets parameters of single detectors; list ensembles in a job of their own")
        if self.results and self.view != STRETCH:
            raise ValueError("view applies to detectors that are fitted; remove it with results")
        for detector in self.detectors:
            view_of_presets(detector.members, self.view)
        if self.resources.bank_shards != 1:
            raise ValueError("resources.bank_shards applies to scoring jobs only; remove it")

    def _check_categories(self) -> None:
        if self.data is None and not self.per_category:
            raise ValueError("per_category applies to data; an archive always fits one detector for all its images")
        if self.view.has_files_of_category and (self.data is None or not self.per_category):
            raise ValueError(
                "view.region has a mask for each {category}, or view.align_to a picture, but one detector is fitted "
                "for all categories; name one"
            )
