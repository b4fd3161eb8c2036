"""Required entries of `run.json` and `manifest.json`; further entries are allowed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything that determines the rows."""

    spec: Mapping[str, Any]
    artifact: str = ""
    archive: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`run.json`."""

    format_version: int
    result: Result
    num_shards: Count
    num_bytes: Count = 0
    spec: Mapping[str, Any] = field(default_factory=dict)
    heatmap_scale: Mapping[str, Any] = field(default_factory=dict)
    region_threshold: Mapping[str, Any] = field(default_factory=dict)
    view: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByCategory:
    """Thresholds on image scores by category; None if no row of the category is flagged."""

    categories: Mapping[str, Number | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FdrDecision:
    """The entry `fdr` of the manifest."""

    level: Number
    tested: Count
    flagged: Count
    p_threshold: Number | None
    expected_false: Number
    false_share: Number
    needed_held_out: Count | None
    threshold: Number | ByCategory | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json`."""

    format_version: int
    shards: Count
    rows: Count
    bad_rows: Count
    flagged: Count
    heatmaps: Count
    statuses: Mapping[str, Count]
    fdr: FdrDecision | None = None
