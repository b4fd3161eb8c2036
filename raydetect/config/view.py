"""`view`: which parts of a picture a detector looks at, and at which size."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from raydetect.config.geometry.polygons import checked_region
from raydetect.config.validation import STRICT

CATEGORY = "{category}"
Resize = Literal["stretch", "pad", "short_side"]
Align = Literal["none", "phase"]
ALIGN_MAX = 0.1
OVERLAP_PX, OVERLAP_SHARE = 64, 4  # of neighbouring tiles, unless stated: at most, and the part of the shorter side
Pixels = Annotated[int, Field(ge=8, le=16_384)]
Band = Annotated[int, Field(ge=1, le=65_535)]
Polygon = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSpec:
    """Windows of the picture, each an input of the network."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    size: Annotated[
        tuple[Pixels, Pixels] | None,
        Field(description="(height, width) in px of the scaled picture; none = image_size of the detector"),
    ] = None
    overlap: Annotated[
        int | None,
        Field(
            ge=0,
            description="px that neighbouring tiles share, at least; none = a quarter of a tile's shorter side, at "
            f"most {OVERLAP_PX}",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.size is not None and self.overlap_of(self.size) > min(self.size) // 2:
            raise ValueError(f"overlap {self.overlap} is more than half of a tile of {self.size} px; lower it")

    def overlap_of(self, size: tuple[int, int]) -> int:
        """The px that neighbouring tiles of (height, width) `size` share, at least."""
        return min(OVERLAP_PX, min(size) // OVERLAP_SHARE) if self.overlap is None else self.overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """Which parts of a picture a detector looks at, and at which size; the artifact records it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    resize: Annotated[
        Resize,
        Field(
            description="stretch: to the size of the input, whatever the ratio of the sides; pad: keep the ratio and "
            "ignore the rest of the input; short_side: keep the ratio, cover the input and leave out both ends"
        ),
    ] = "stretch"
    size: Annotated[
        tuple[Pixels, Pixels] | None,
        Field(description="(height, width) in px to resize to before crop; none = image_size of the detector"),
    ] = None
    crop: Annotated[
        tuple[Pixels, Pixels] | None,
        Field(description="(height, width) in px of the centre that is used after resizing; must be image_size"),
    ] = None
    scale: Annotated[
        float | None,
        Field(gt=0, le=8, description="with tile: factor by which the stored picture is resized first; none = 1"),
    ] = None
    tile: Annotated[TileSpec | None, Field(description="look at the picture in overlapping windows")] = None
    bands: Annotated[
        tuple[Band, ...] | None,
        Field(
            description="one or three bands, from 1, shown as grey or as red, green and blue; "
            "none = all, if there are one or three besides alpha"
        ),
    ] = None
    range: Annotated[
        tuple[float, float] | None,
        Field(
            description="stored values that become 0 and 255; those between are mapped linearly and rounded, those "
            "beyond are clipped; none = the fixed scale of 8 and 16 bits"
        ),
    ] = None
    region: Annotated[
        str | tuple[Polygon, ...] | None,
        Field(
            description="where to look: URI of a mask ({category} is replaced where each category has its own "
            "detector), or polygons of (x, y) from 0 to 1; the rest of the picture is neither learnt nor scored nor "
            "drawn"
        ),
        BeforeValidator(checked_region),
    ] = None
    align: Annotated[
        Align,
        Field(
            description="phase: what is looked at follows a part that is shifted a little against the picture "
            "align_to, found by phase correlation"
        ),
    ] = "none"
    align_to: Annotated[
        str | None,
        Field(
            description="with align: URI of a picture with the part in its usual place ({category} is replaced where "
            "each category has its own detector)"
        ),
    ] = None
    align_max: Annotated[
        float, Field(gt=0, le=0.25, description="with align: largest shift along a side, as a share of it")
    ] = ALIGN_MAX

    def __post_init__(self) -> None:
        self._check_align()
        if (self.size is None) != (self.crop is None):
            raise ValueError("size and crop belong together: a picture is resized to size, and its centre is used")
        if self.crop is not None and self.size is not None:
            if self.crop[0] > self.size[0] or self.crop[1] > self.size[1]:
                raise ValueError(f"crop {self.crop} is larger than size {self.size}")
            if self.resize == "pad":
                raise ValueError("resize: pad keeps the whole picture, and crop cuts it; set one of them")
        if self.tile is not None and (self.resize != "stretch" or self.size is not None):
            raise ValueError("tile looks at the picture at its own size times scale; remove resize, size and crop")
        if self.scale is not None and self.tile is None:
            raise ValueError("scale applies to tiles only; add tile, or set the detector's image_size")
        if self.bands is not None and len(self.bands) not in (1, 3):
            raise ValueError(f"bands {list(self.bands)}: name one band for grey, or three for red, green and blue")
        if self.range is not None and not (math.isfinite(sum(self.range)) and self.range[0] < self.range[1]):
            raise ValueError(f"range {list(self.range)}: the first value becomes 0 and must be less than the second")

    def _check_align(self) -> None:
        if self.align == "none" and (self.align_to is not None or self.align_max != ALIGN_MAX):
            raise ValueError("align_to and align_max apply to align: phase only; add it, or remove them")
        if self.align == "phase" and self.align_to is None:
            raise ValueError(
                "align: phase needs align_to, the URI of a picture with the part in its usual place; images are "
                "decoded before all of them are known, so none can be chosen"
            )
        if self.align == "phase" and self.tile is not None:
            raise ValueError("align moves a picture with one input, and tile cuts several; remove one of them")

    @property
    def has_files_of_category(self) -> bool:
        """Whether each category has a mask or a picture to align to of its own."""
        return any(isinstance(uri, str) and CATEGORY in uri for uri in (self.region, self.align_to))

    @property
    def without_files_of_category(self) -> "ViewSpec":
        """The view of images without a category."""
        region = None if isinstance(self.region, str) and CATEGORY in self.region else self.region
        if self.align_to is None or CATEGORY not in self.align_to:
            return replace(self, region=region)
        return replace(self, region=region, align="none", align_to=None, align_max=ALIGN_MAX)

    def of_category(self, category: str) -> "ViewSpec":
        """The view of one category."""
        region = self.region.replace(CATEGORY, category) if isinstance(self.region, str) else self.region
        align_to = None if self.align_to is None else self.align_to.replace(CATEGORY, category)
        return replace(self, region=region, align_to=align_to)

    @property
    def settings(self) -> "ViewSpec":
        """The view without the files that it names, which an artifact keeps by their content."""
        return replace(self, region=None, align="none", align_to=None, align_max=ALIGN_MAX)

    @property
    def reads_bands(self) -> bool:
        """Whether pictures are read by the view's own rule of bands and values."""
        return self.bands is not None or self.range is not None

    def recorded(self) -> dict[str, Any]:
        """The settings that differ from the defaults, without region and align, as plain values."""
        tile = self.tile
        whole = {
            "resize": self.resize,
            "size": _listed(self.size),
            "crop": _listed(self.crop),
            "scale": self.scale,
            "tile": None if tile is None else {"size": _listed(tile.size), "overlap": tile.overlap},
            "bands": _listed(self.bands),
            "range": _listed(self.range),
        }
        return {name: value for name, value in whole.items() if value not in (None, "stretch")}


def _listed(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)


STRETCH = ViewSpec()
