"""A view: which parts of a picture become inputs of a detector, and where their anomaly maps belong.

A picture of any size has one or several windows. A window is a box of the upright picture, resized to a place of an
input; the rest of the input is filled with one colour (`FILL`, the mean of ImageNet), which the detector sees and which
is not looked at. The maps of the windows are put together on a canvas, which covers a box of the picture.

With an alignment, box and region follow the part by its shift. What of the box then lies outside of the picture is
fill, as with padding; the canvas and its box end there, at whole px of the input.

Every pixel of the scaled picture is decided by one window: of the tiles that overlap there, the one in which it lies
farthest from an edge, which is the first or second half of each overlap. There is no mean of two tiles, so a map has
the values that the detector gave. The image score of a picture in tiles is the highest of its tiles' scores, since a
defect in one tile makes the picture anomalous; with a single tile it is the detector's own score.

Beyond a region, inputs have the same fill in the fit and in scoring, so that nothing there can be learnt or change a
score, and the map is NaN. With a region or padding, a detector whose image score is the highest of its map or patches
gets the highest pixel that is looked at as image score, and its memory bank has no patch that lies wholly outside
(`Detector.scores_by_map`, `Detector.patch_grids`); other detectors score the filled input.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from raydetect.config import ViewSpec
from raydetect.config.validation import validate
from raydetect.errors import SpecError
from raydetect.views.align import NOT_MOVED, Alignment, Shift
from raydetect.views.region import Region

FILL = (124, 116, 104)
MAX_CANVAS_PX = 4096  # longest side of a canvas; the map of a larger picture keeps the highest of each block of px
KEPT_LAYOUTS = 16  # of different picture sizes
DECIMALS = 9  # of px, beyond which places are equal: a quotient of sizes is seldom exact

Box = tuple[float, float, float, float]
Place = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a picture that becomes one input.

    Attributes:
        row: of the tile, from 0; 0 without tiles.
        column: likewise.
        box: (left, upper, right, lower) in px of the upright picture as stored.
        place: (left, upper, right, lower) in px of the input; the rest of the input is fill.
        cell: (left, upper, right, lower) in px of the scaled picture that this window decides.
        origin: (left, upper) in px of the scaled picture where its map begins.
        size: (width, height) in px of its map on the scaled picture.
    """

    row: int
    column: int
    box: Box
    place: Place
    cell: Place
    origin: tuple[int, int]
    size: tuple[int, int]

    def on_canvas(self, reduction: int) -> tuple[slice, slice]:
        """(rows, columns) of the canvas that its cell touches."""
        left, upper, right, lower = self.cell
        return slice(upper // reduction, -(-lower // reduction)), slice(left // reduction, -(-right // reduction))


@dataclass(frozen=True)
class Layout:
    """The windows of a picture of one size.

    Attributes:
        windows: in row-major order, without those that lie wholly outside of the region.
        canvas: (height, width) in px of the map of the picture.
        box: (left, upper, right, lower) of the canvas in px of the upright picture.
        reduction: px of the scaled picture for each px of the canvas, along each side.
        region: where to look; None = everywhere.
        picture: (width, height) in px of the upright picture.
        ignores: whether pixels of inputs are ignored, by a region, padding or a shift; image scores then come from
            maps.
        shift: (x, y) in px of the picture by which windows and region follow the part.
    """

    windows: tuple[Window, ...]
    canvas: tuple[int, int]
    box: Box
    reduction: int
    region: Region | None
    picture: tuple[int, int]
    ignores: bool = False
    shift: Shift = NOT_MOVED

    @cached_property
    def looked(self) -> np.ndarray | None:
        """Pixels of the canvas that are looked at; None = all."""
        if self.region is None:
            return None
        shown_HW = np.zeros(self.canvas, bool)
        for window in self.windows:
            shown_HW[window.on_canvas(self.reduction)] = True
        looked_HW: np.ndarray = shown_HW & self._in_region(self.region, self.box, self.canvas)
        return looked_HW

    @cached_property
    def window_at(self) -> dict[tuple[int, int], Window]:
        """The windows by (row, column)."""
        return {(window.row, window.column): window for window in self.windows}

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the picture is looked at."""
        return not self.windows or (self.looked is not None and not self.looked.any())

    @cached_property
    def cuts(self) -> tuple[np.ndarray, np.ndarray]:
        """First px of the picture in each column and each row of the canvas, and one after the last; int64.

        A px of the picture lies where its centre does, so a column or row of a fine canvas may have none.
        """
        across, down = self._pitch
        columns = _cuts(self.box[0], across, self.canvas[1], self.picture[0])
        return columns, _cuts(self.box[1], down, self.canvas[0], self.picture[1])

    def shown(self, column: int, row: int) -> tuple[int, int]:
        """The (x, y) of the px of the picture at the centre of a px of the canvas."""
        across, down = self._pitch
        x, y = round(self.box[0] + (column + 0.5) * across, DECIMALS), round(self.box[1] + (row + 0.5) * down, DECIMALS)
        return min(int(x), self.picture[0] - 1), min(int(y), self.picture[1] - 1)

    def beneath(self, x: int, y: int) -> tuple[slice, slice]:
        """Rows and columns of the canvas that a px of the picture touches; at least one of each."""
        across, down = self._pitch
        columns = _touched(x - self.box[0], across, self.canvas[1])
        return _touched(y - self.box[1], down, self.canvas[0]), columns

    def box_on(self, size: tuple[int, int]) -> Place:
        """The box of the canvas on the picture shrunk to (width, height) `size`, in whole px of it."""
        across, down = size[0] / self.picture[0], size[1] / self.picture[1]
        left, upper, right, lower = self.box
        return whole_box((left * across, upper * down, right * across, lower * down), size)

    @property
    def _pitch(self) -> tuple[float, float]:
        """Width and height of a px of the canvas in px of the picture; a reduced canvas may end beyond the picture."""
        (left, upper, right, lower), (width, height) = self.windows[0].box, self.windows[0].size
        return (right - left) / width * self.reduction, (lower - upper) / height * self.reduction

    def looked_input(self, window: Window, image_size: tuple[int, int]) -> np.ndarray | None:
        """Pixels of an input, bool (H, W), that show the picture and lie in the region; None = all."""
        left, upper, right, lower = window.place
        if self.region is None and (left, upper, right, lower) == (0, 0, *image_size[::-1]):
            return None
        looked_HW = np.zeros(image_size, bool)
        inside = (lower - upper, right - left)
        looked_HW[upper:lower, left:right] = (
            True if self.region is None else self._in_region(self.region, window.box, inside)
        )
        return looked_HW

    def moved(self, shift: Shift) -> "Layout":
        """Returns the layout for a picture whose part is shifted by (x, y) px; itself if nothing would be left.

        Only for layouts with one window.
        """
        if shift == NOT_MOVED:
            return self
        (window,) = self.windows
        across, down = (
            _inside(window.box[i] + shift[i], window.box[i + 2] + shift[i], window.size[i], self.picture[i])
            for i in (0, 1)
        )
        if across is None or down is None:
            return self
        (left, right, first_x, last_x), (upper, lower, first_y, last_y) = across, down
        x, y = window.place[:2]
        width, height = last_x - first_x, last_y - first_y
        shown = replace(
            window,
            box=(left, upper, right, lower),
            place=(x + first_x, y + first_y, x + last_x, y + last_y),
            cell=(0, 0, width, height),
            size=(width, height),
        )
        return replace(self, windows=(shown,), canvas=(height, width), box=shown.box, shift=shift)

    def _in_region(self, region: Region, box: Box, size: tuple[int, int]) -> np.ndarray:
        (x, y), (left, upper, right, lower) = self.shift, box
        return region.looked((left - x, upper - y, right - x, lower - y), size, self.picture)


@dataclass(frozen=True, slots=True)
class View:
    """The view of an artifact.

    Attributes:
        spec: its settings.
        region: where to look; None = everywhere.
        alignment: what pictures are aligned to; None = nothing.
    """

    spec: ViewSpec
    region: Region | None = None
    alignment: Alignment | None = None
    _layouts: dict[tuple[int, ...], Layout] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def ignores(self) -> bool:
        """Whether parts of inputs are ignored, in the fit and in scoring."""
        return self.region is not None or self.alignment is not None or self.spec.resize == "pad"

    @property
    def has_tiles(self) -> bool:
        """Whether a picture may have several windows."""
        return self.spec.tile is not None

    def recorded(self) -> dict[str, Any]:
        """The entry for an artifact's record; empty if every picture is stretched to the input."""
        region = {} if self.region is None else {"region": self.region.recorded()}
        align = {} if self.alignment is None else {"align": self.alignment.recorded()}
        return {**self.spec.recorded(), **region, **align}

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> "View":
        """Restores the entry of an artifact's record.

        Raises:
            SpecError: it is damaged.
        """
        settings = {name: value for name, value in entry.items() if name not in ("region", "align")}
        spec, alignment = validate(ViewSpec, settings, "preprocess.view"), Alignment.of_record(entry.get("align"))
        if spec != spec.settings or (alignment is not None and spec.tile is not None):
            raise SpecError("preprocess.view: names a file, or aligns tiles, which no fit does")
        return cls(spec, Region.of_record(entry.get("region")), alignment)

    def layout(self, size: tuple[int, int], image_size: tuple[int, int]) -> Layout:
        """Returns the windows of an upright picture of (width, height) px for inputs of (height, width) px."""
        key = (*size, *image_size)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= KEPT_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = _layout(self, size, image_size)
        return layout

    def needed(self, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[float, float]:
        """Returns the (width, height) in px at which the whole upright picture is shown to the detector."""
        if self.spec.tile is not None:
            height, width = self.spec.tile.size or image_size
            scale = self.spec.scale or 1.0
            return size[0] * scale * image_size[1] / width, size[1] * scale * image_size[0] / height
        window = self.layout(size, image_size).windows[0]
        left, upper, right, lower = window.place
        across = size[0] * (right - left) / (window.box[2] - window.box[0])  # in this order exact for whole pictures
        down = size[1] * (lower - upper) / (window.box[3] - window.box[1])
        if self.alignment is None:
            return across, down
        return max(across, self.alignment.size[0]), max(down, self.alignment.size[1])


def _inside(start: float, stop: float, count: int, length: int) -> tuple[float, float, int, int] | None:
    """(start, stop, first, last + 1) of those of `count` equal parts of an interval that lie within 0..length.

    None if there is none.
    """
    pitch = (stop - start) / count
    first = max(0, math.ceil(round(-start / pitch, DECIMALS)))
    last = min(count, math.floor(round((length - start) / pitch, DECIMALS)))
    if first >= last:
        return None
    return max(0.0, start + first * pitch), min(float(length), start + last * pitch), first, last


def whole_box(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rounds a box to px of a picture of (width, height) `size`; it keeps at least one px along each side."""
    left, upper = (min(round(start), side - 1) for start, side in zip(box[:2], size, strict=True))
    right, lower = (max(round(box[2]), left + 1), max(round(box[3]), upper + 1))
    return left, upper, right, lower


def _cuts(start: float, pitch: float, count: int, length: int) -> np.ndarray:
    """First px with its centre at or after each of `count + 1` equally spaced places; int64 in 0..length."""
    edges = start + np.arange(count + 1) * pitch
    first: np.ndarray = np.clip(np.ceil(np.round(edges - 0.5, DECIMALS)), 0, length).astype(np.int64)
    return first


def _touched(start: float, pitch: float, count: int) -> slice:
    """Indices of the places of width `pitch` that an interval of length 1 touches."""
    first = min(max(math.floor(start / pitch), 0), count - 1)
    return slice(first, max(first + 1, min(math.ceil((start + 1) / pitch), count)))


def _layout(view: View, size: tuple[int, int], image_size: tuple[int, int]) -> Layout:
    if view.spec.tile is not None:
        return _tiled(view, size, image_size)
    box, place = _resized(view.spec, size, image_size)
    width, height = place[2] - place[0], place[3] - place[1]
    window = Window(0, 0, box, place, (0, 0, width, height), (0, 0), (width, height))
    return Layout((window,), (height, width), box, 1, view.region, size, view.ignores)


def _resized(spec: ViewSpec, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[Box, Place]:
    """The box of a picture that is resized to the only input, and its place there."""
    width, height = size
    whole, full = (0.0, 0.0, float(width), float(height)), (0, 0, image_size[1], image_size[0])
    if spec.resize == "pad":
        scale = min(image_size[1] / width, image_size[0] / height)
        inside = (max(1, round(width * scale)), max(1, round(height * scale)))
        left, upper = (image_size[1] - inside[0]) // 2, (image_size[0] - inside[1]) // 2
        return whole, (left, upper, left + inside[0], upper + inside[1])
    if spec.resize == "stretch" and spec.size is None:
        return whole, full
    target = spec.size or image_size
    across, down = target[1] / width, target[0] / height
    if spec.resize == "short_side":
        across = down = max(across, down)
    first_x, last_x = _middle(width, image_size[1] / across)
    first_y, last_y = _middle(height, image_size[0] / down)
    return (first_x, first_y, last_x, last_y), full


def _middle(length: int, shown: float) -> tuple[float, float]:
    """Start and stop of the middle part of a side."""
    start = max(0.0, (length - shown) / 2)
    return start, length - start


def _tiled(view: View, size: tuple[int, int], image_size: tuple[int, int]) -> Layout:
    assert view.spec.tile is not None
    scale = view.spec.scale or 1.0
    tile = view.spec.tile.size or image_size
    scaled = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    reduction = math.ceil(max(scaled) / MAX_CANVAS_PX)
    overlap = view.spec.tile.overlap_of(tile)
    columns = _axis(scaled[0], tile[1], overlap)
    rows = _axis(scaled[1], tile[0], overlap)
    across, down = size[0] / scaled[0], size[1] / scaled[1]
    windows = []
    for row, (upper, lower, first_y, last_y) in enumerate(rows):
        for column, (left, right, first_x, last_x) in enumerate(columns):
            box = (left * across, upper * down, right * across, lower * down)
            width, height = right - left, lower - upper
            inside = (_resized_side(width, tile[1], image_size[1]), _resized_side(height, tile[0], image_size[0]))
            if view.region is None or view.region.looked(box, inside[::-1], size).any():
                cell = (first_x, first_y, last_x, last_y)
                windows.append(Window(row, column, box, (0, 0, *inside), cell, (left, upper), (width, height)))
    canvas = (math.ceil(scaled[1] / reduction), math.ceil(scaled[0] / reduction))
    return Layout(
        tuple(windows), canvas, (0.0, 0.0, float(size[0]), float(size[1])), reduction, view.region, size, view.ignores
    )


def _resized_side(length: int, tile: int, image_side: int) -> int:
    return max(1, round(length * image_side / tile))


def _axis(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """(start, stop, first px that it decides, last px + 1) of every tile along one side of the scaled picture.

    The last tile ends with the picture and shares more px with the one before.
    """
    starts = [0] if length <= tile else [*range(0, length - tile, tile - overlap), length - tile]
    stops = [min(start + tile, length) for start in starts]
    cuts = [(start + stop) // 2 for start, stop in zip(starts[1:], stops[:-1], strict=True)]
    ends = [0, *cuts, length]
    return list(zip(starts, stops, ends[:-1], ends[1:], strict=True))
