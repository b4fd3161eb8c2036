"""A raster whose windows are read when they are cut; the whole is never in memory."""

import math
import threading
from typing import Any

import numpy as np
from PIL import Image

from raydetect.errors import MemberError
from raydetect.images.orientation import SIDEWAYS, apply_orientation
from raydetect.images.rasters.kinds import Kind
from raydetect.images.rasters.library import read_window
from raydetect.images.resize import FROM_THE_END, FROM_THE_RIGHT, upright_size
from raydetect.views.view import Box, Place
from raydetect.views.windows import UprightPicture

BAND_PIXELS = 1 << 20  # px read at a time where a whole raster is walked through


class RasterPicture:
    """An upright raster, an `Upright` of `views/windows.py`. Threads may cut at the same time; reading is in turn.

    Attributes:
        kind: how values become levels.
        size: (width, height) in px of the file's image after orientation.
        orientation: that is applied; 1 = as stored.
    """

    def __init__(
        self,
        dataset: Any,
        kind: Kind,
        orientation: int,
        notes: tuple[str, ...],
        max_pixels: int,
        stored: tuple[int, int],
    ) -> None:
        """Wraps an opened raster.

        Args:
            dataset: of rasterio; an overview of the file's image, or itself.
            kind: how values become levels.
            orientation: to apply, 1 to 8.
            notes: see `Pixels.notes`.
            max_pixels: of a window and of a block of the file.
            stored: (width, height) in px of the file's image.

        Raises:
            MemberError: too_many_pixels: one of its blocks is too large.
        """
        self.kind, self.orientation, self.size = kind, orientation, upright_size(stored, orientation)
        self._dataset, self._notes, self._max_pixels = dataset, notes, max_pixels
        self._here = (int(dataset.width), int(dataset.height))
        self._lock = threading.Lock()
        self._seen = self._empty = 0
        height, width = dataset.block_shapes[0]
        self.block_pixels = height * width
        if self.block_pixels > max_pixels:
            raise MemberError(
                "too_many_pixels",
                f"it is stored in blocks of {width} x {height} px, each more than source.max_pixels = {max_pixels:,}. "
                "Store it in tiles of at most 1024 x 1024 px, or raise the limit.",
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Pixels.notes`; with the share of px without data of what was read so far."""
        if not self._empty:
            return self._notes
        return (*self._notes, f"nodata: {max(0.01, 100 * self._empty / self._seen):.2f} %")

    def upright(self) -> "RasterPicture":
        """The picture itself, which is turned as it is read."""
        return self

    def cut(self, box: Box, size: tuple[int, int]) -> Image.Image:
        """See `Upright`: the pixels of `UprightPicture.cut`, from the part of the raster that the filter needs.

        Raises:
            MemberError: corrupt, too_many_pixels.
        """
        place = self._needed(box, size)
        if _area(place) > self._max_pixels:
            raise MemberError(
                "too_many_pixels",
                f"a window of {place[2] - place[0]} x {place[3] - place[1]} px is more than source.max_pixels = "
                f"{self._max_pixels:,}. Set view.tile to read it in windows, or raise the limit.",
            )
        return self._cut(box, size, place)

    def pixels_of(self, box: Box, size: tuple[int, int]) -> int:
        """Number of px that are held while a box is cut."""
        return _area(self._needed(box, size))

    def _cut(self, box: Box, size: tuple[int, int], place: Place) -> Image.Image:
        # Pillow keeps boxes as 32-bit floats; they are rounded before they are moved, so that it sees the same ones
        left, upper, right, lower = (float(np.float32(side)) for side in self._scaled(box))
        picture = self.read(place)
        inner = (left - place[0], upper - place[1], right - place[0], lower - place[1])
        return UprightPicture(picture, picture.size, (0, 0, *picture.size)).cut(inner, size)

    def _needed(self, box: Box, size: tuple[int, int]) -> Place:
        """The px that a box resized to (width, height) `size` is computed from."""
        width, height = upright_size(self._here, self.orientation)
        left, upper, right, lower = self._scaled(box)
        beyond_x, beyond_y = (max(1.0, side) + 1 for side in ((right - left) / size[0], (lower - upper) / size[1]))
        return (
            max(0, math.floor(left - beyond_x)),
            max(0, math.floor(upper - beyond_y)),
            min(width, math.ceil(right + beyond_x)),
            min(height, math.ceil(lower + beyond_y)),
        )

    def read(self, place: Place) -> Image.Image:
        """Returns a part of the upright picture, in mode L or RGB.

        Args:
            place: (left, upper, right, lower) in px of what is opened, upright.

        Raises:
            MemberError: corrupt.
        """
        levels, empty = self.kind.levels(self._values(place))
        with self._lock:
            self._seen, self._empty = self._seen + _area(place), self._empty + empty
        return apply_orientation(Image.fromarray(levels), self.orientation)

    def mask_levels(self, place: Place) -> np.ndarray:
        """Returns the levels of a part as those of a mask (`masks.py`), upright, uint8 or uint16 (H, W).

        Raises:
            MemberError: corrupt.
        """
        levels_HW = self.kind.mask_levels(self._values(place))
        return np.asarray(apply_orientation(Image.fromarray(levels_HW), self.orientation))

    def turn(self, orientation: int) -> None:
        """Sets another orientation."""
        stored = upright_size(self.size, self.orientation)
        self.orientation, self.size = orientation, upright_size(stored, orientation)

    def shrunk(self, size: tuple[int, int]) -> Image.Image:
        """Returns the whole in RGB, resized to (width, height) `size` in strips of bounded memory.

        Raises:
            MemberError: corrupt.
        """
        across, down = self.size[0] / size[0], self.size[1] / size[1]
        rows = max(1, int(BAND_PIXELS / (self._here[0] * self._here[1] / size[1])))
        whole = Image.new("RGB", size)
        for top in range(0, size[1], rows):
            end = min(top + rows, size[1])
            box, here = (0.0, top * down, size[0] * across, end * down), (size[0], end - top)
            strip = self._cut(box, here, self._needed(box, here))
            whole.paste(strip.convert("RGB"), (0, top))
        return whole

    def _values(self, place: Place) -> np.ndarray:
        with self._lock:
            values_CHW: np.ndarray = read_window(self._dataset, self.kind.bands, self._stored(place))
        return values_CHW

    def _scaled(self, box: Box) -> Box:
        """A box of the picture in px of what is opened, which may be an overview."""
        width, height = upright_size(self._here, self.orientation)
        if (width, height) == self.size:
            return box
        across, down = width / self.size[0], height / self.size[1]
        return (box[0] * across, box[1] * down, min(width, box[2] * across), min(height, box[3] * down))

    def _stored(self, place: Place) -> Place:
        """A box of the upright picture as (left, upper, right, lower) of the stored one."""
        left, upper, right, lower = place
        width, height = upright_size(self._here, self.orientation)
        sideways = self.orientation in SIDEWAYS
        if self.orientation in FROM_THE_RIGHT:
            left, right = width - right, width - left
        if self.orientation in FROM_THE_END:
            upper, lower = height - lower, height - upper
        return (upper, left, lower, right) if sideways else (left, upper, right, lower)


def _area(place: Place) -> int:
    return (place[2] - place[0]) * (place[3] - place[1])
