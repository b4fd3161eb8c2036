"""`kind: evaluate`: labelled images and detectors, or results that are there already, to a leaderboard."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config.fit import DetectorSpec
from raydetect.config.shared import ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.validation import STRICT

Layout = Literal["mvtec_ad", "mvtec_ad2", "visa", "btad", "manifest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSpec:
    """A labelled data set of loose images, in a layout that its authors chose."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    uri: Annotated[str, Field(description="folder of the data set")]
    layout: Annotated[
        Layout,
        Field(description="how it is laid out; visa reads its split CSV, manifest a manifest.csv in the folder"),
    ]
    split_csv: Annotated[str, Field(description="of visa: the CSV file in the folder")] = "split_csv/1cls.csv"
    categories: Annotated[tuple[str, ...], Field(description="only these; none = all")] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveSpec:
    """A labelled archive of any format: what to fit on and what to judge, by the patterns of sources."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    train: SourceSpec
    test: SourceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSpec:
    """`kind: evaluate`: labelled images and detectors, or results that are there already, to a leaderboard."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["evaluate"]
    output: Annotated[str, Field(description="folder of cells and leaderboard; started again, it goes on there")]
    data: Annotated[LabelledSpec | None, Field(description="a labelled data set of loose images")] = None
    archive: Annotated[ArchiveSpec | None, Field(description="a labelled archive instead")] = None
    results: Annotated[
        tuple[str, ...],
        Field(description="results directories of labelled archives instead; they hold image scores, no maps"),
    ] = ()
    detectors: Annotated[tuple[DetectorSpec, ...], Field(description="to fit and judge; each is one line")] = ()
    grid: Annotated[
        Mapping[str, tuple[Any, ...]],
        Field(description="values of parameters by name; every detector is fitted with every combination"),
    ] = field(default_factory=dict)
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(min_length=1, description="each cell is fitted with each; the leaderboard has mean and std over them"),
    ] = (0,)
    replicates: Annotated[int, Field(ge=0, description="draws of the bootstrap intervals; 0 = none")] = 200
    holdout_ratio: Annotated[float, Field(gt=0, lt=1, description="as in a fit, so that fits are those of jobs")] = 0.1
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass")] = 16
    storage: Annotated[StorageOptions, Field(description="storage of everything that names none")] = field(
        default_factory=StorageOptions
    )
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    def __post_init__(self) -> None:
        if sum((self.data is not None, self.archive is not None, bool(self.results))) != 1:
            raise ValueError("state one of data, archive and results, and not more")
        if bool(self.results) == bool(self.detectors):
            raise ValueError("detectors are needed with data and archive, and are there already in results")
        if self.results and (self.grid or self.seeds != (0,)):
            raise ValueError("grid and seeds are of detectors that are fitted; leave them out with results")
        if self.grid and any(detector.ensemble for detector in self.detectors):
            raise ValueError("grid sets parameters of single detectors; list ensembles in a job of their own")
        if self.resources.bank_shards != 1:
            raise ValueError("resources.bank_shards cuts the bank of a scoring job; leave it out here")
