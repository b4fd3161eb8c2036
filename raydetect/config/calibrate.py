"""`kind: calibrate`: recalibrates an artifact on new held-out normal images, without refitting."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config.shared import BATCH_SIZE, ResourceSpec, SourceSpec, StorageOptions
from raydetect.config.validation import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateSpec:
    """`kind: calibrate`: recalibrates an artifact on new held-out normal images, without refitting."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["calibrate"]
    source: SourceSpec
    artifact: Annotated[str, Field(description="the fitted detector, or a fleet")]
    output: Annotated[str, Field(description="where to write the recalibrated artifact; the same URI replaces it")]
    replace: Annotated[bool, Field(description="whether another artifact at output is replaced")] = False
    storage: Annotated[StorageOptions, Field(description="storage for everything that has none of its own")] = field(
        default_factory=StorageOptions
    )
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass")] = BATCH_SIZE
    max_bad_fraction: Annotated[
        float, Field(ge=0, le=1, description="more bad images than this share: exit 3, no artifact")
    ] = 0.05
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    def __post_init__(self) -> None:
        if self.resources.num_workers != 1 or self.resources.bank_shards != 1:
            raise ValueError("calibrate runs in one process; remove resources.num_workers and bank_shards")
