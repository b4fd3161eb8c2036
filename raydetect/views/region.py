"""Where to look in a picture: a mask or polygons, in coordinates relative to the picture, so that any size fits."""

import base64
import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from raydetect.config import ViewSpec
from raydetect.config.validation import validate
from raydetect.errors import SpecError

MAX_SIDE_PX = 8192  # of a mask
CACHED_PX = 1024  # longest side of a sampled region that is kept, as that of an input
Polygon = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a picture that is looked at.

    Attributes:
        polygons: corners (x, y) from 0 to 1; empty if there is a mask.
        png: bilevel PNG of the mask; empty if there are polygons.
    """

    polygons: tuple[Polygon, ...] = ()
    png: bytes = b""

    @classmethod
    def of_record(cls, entry: Mapping[str, Any] | None) -> "Region | None":
        """Restores the entry of an artifact's record.

        Raises:
            SpecError: it is damaged.
        """
        if entry is None:
            return None
        if not isinstance(entry, Mapping) or list(entry) not in (["polygons"], ["png"]):
            raise SpecError("preprocess.view.region: has neither polygons nor a mask, or something else")
        if "polygons" in entry:
            polygons = validate(ViewSpec, {"region": entry["polygons"]}, "preprocess.view").region
            if not isinstance(polygons, tuple):
                raise SpecError("preprocess.view.region: polygons are no list of corners")
            return cls(polygons=polygons)
        try:
            png = base64.b64decode(entry["png"], validate=True)
            _pixels(png)
        except Exception as error:
            raise SpecError(f"preprocess.view.region: its mask is damaged ({type(error).__name__})") from None
        return cls(png=png)

    def recorded(self) -> dict[str, Any]:
        """The entry for an artifact's record."""
        if self.polygons:
            return {"polygons": [list(map(list, corners)) for corners in self.polygons]}
        return {"png": base64.b64encode(self.png).decode()}

    @property
    def digest(self) -> str:
        """Short name of its content."""
        return hashlib.sha256(self.png or repr(self.polygons).encode()).hexdigest()[:12]

    def looked(
        self, box: tuple[float, float, float, float], size: tuple[int, int], picture: tuple[int, int]
    ) -> np.ndarray:
        """Returns which pixels have their centre in the region, bool (H, W).

        Args:
            box: (left, upper, right, lower) in px of the picture.
            size: (height, width) that the box is sampled at.
            picture: (width, height) in px of the upright picture.
        """
        return (_looked_input if max(size) <= CACHED_PX else _looked)(self, box, size, picture)


def _looked(
    region: Region, box: tuple[float, float, float, float], size: tuple[int, int], picture: tuple[int, int]
) -> np.ndarray:
    left, upper, right, lower = box[0] / picture[0], box[1] / picture[1], box[2] / picture[0], box[3] / picture[1]
    height, width = size
    if region.polygons:
        looked_HW = np.zeros(size, bool)
        for corners in region.polygons:
            x, y = np.array(corners, np.float64).T
            looked_HW |= _inside((x - left) / (right - left) * width, (y - upper) / (lower - upper) * height, size)
    else:
        mask_HW = _pixels(region.png)
        rows = _sampled(upper, lower, height, mask_HW.shape[0])
        columns = _sampled(left, right, width, mask_HW.shape[1])
        looked_HW = mask_HW[rows[:, None], columns]
    looked_HW.flags.writeable = False  # may be shared by a cache
    return looked_HW


def _inside(x_P: np.ndarray, y_P: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels of (height, width) `size` whose centre lies in a polygon with corners in px, by the even-odd rule."""
    height, width = size
    crossed = np.zeros((height, width + 1), np.int32)  # edges that cross a row between the centres before and here
    for x0, y0, x1, y1 in zip(x_P, y_P, np.roll(x_P, -1), np.roll(y_P, -1), strict=True):
        first, last = (math.ceil(min(max(side - 0.5, 0), height)) for side in (min(y0, y1), max(y0, y1)))
        if first < last:
            rows = np.arange(first, last)
            across = x0 + (rows + 0.5 - y0) / (y1 - y0) * (x1 - x0)
            crossed[rows, np.ceil(np.clip(across - 0.5, 0, width)).astype(np.int64)] += 1
    odd_HW: np.ndarray = crossed[:, :width].cumsum(axis=1) % 2 == 1
    return odd_HW


_looked_input = lru_cache(maxsize=64)(_looked)


def _sampled(start: float, stop: float, count: int, length: int) -> np.ndarray:
    """Index of the mask's pixel at the centre of each of `count` pixels between two relative coordinates."""
    centres = start + (np.arange(count) + 0.5) / count * (stop - start)
    return np.clip((centres * length).astype(np.int64), 0, length - 1)


@lru_cache(maxsize=16)
def _pixels(png: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(png), formats=("PNG",))
    if max(picture.size) > MAX_SIDE_PX or picture.mode != "1":
        raise ValueError(f"a mask of {picture.size} px in mode {picture.mode}")
    return np.asarray(picture, dtype=bool)
