"""Cuts the windows of a view from a decoded picture: the inputs of a detector."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from raydetect.config import STRETCH
from raydetect.views.view import FILL, Box, Layout, View, Window


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a detector.

    Attributes:
        layout: the windows of its picture.
        window: the window that it shows.
        image_HWC: uint8 RGB at the detector's input size.
        looked_HW: its pixels that are looked at, bool (H, W); None = all.
    """

    layout: Layout
    window: Window
    image_HWC: np.ndarray
    looked_HW: np.ndarray | None = None

    @classmethod
    def of(cls, image_HWC: np.ndarray) -> "Input":
        """The only input of an image that has the input's size already."""
        size = (image_HWC.shape[0], image_HWC.shape[1])
        layout = View(STRETCH).layout(size[::-1], size)
        return cls(layout, layout.windows[0], image_HWC)


class Upright(Protocol):
    """An upright picture that windows are cut from."""

    def cut(self, box: Box, size: tuple[int, int]) -> Image.Image:
        """Returns a box of the picture, resized to (width, height) `size`, as RGB or L.

        Raises:
            MemberError: its pixels cannot be read.
        """


@dataclass(frozen=True, slots=True)
class UprightPicture:
    """An upright picture in memory.

    Attributes:
        picture: in mode L, RGB or RGBX; smaller than `size` if a JPEG was decoded at a reduced scale.
        size: (width, height) in px of the file's image after orientation.
        covered: (left, upper, right, lower) in px of `picture` that the image covers.
    """

    picture: Image.Image
    size: tuple[int, int]
    covered: Box

    def cut(self, box: Box, size: tuple[int, int]) -> Image.Image:
        """See `Upright`: antialiased bilinear, with px beyond the box where the filter needs them."""
        here = box if self.covered == (0, 0, *self.size) else self._scaled(box)
        if here == (0, 0, *self.picture.size):
            return self.picture if size == self.picture.size else self.picture.resize(size, Image.Resampling.BILINEAR)
        whole = tuple(round(side) for side in here)
        if whole == here and (whole[2] - whole[0], whole[3] - whole[1]) == size:
            return self.picture.crop(whole)  # type: ignore[arg-type]
        return self.picture.resize(size, Image.Resampling.BILINEAR, here)

    def _scaled(self, box: Box) -> Box:
        left, upper, right, lower = self.covered
        across, down = (right - left) / self.size[0], (lower - upper) / self.size[1]
        return (left + box[0] * across, upper + box[1] * down, left + box[2] * across, upper + box[3] * down)


def grey_of(upright: Upright, size: tuple[int, int], shown: tuple[int, int]) -> np.ndarray:
    """Returns the luminance of a whole upright picture of (width, height) `size` at `shown` px, uint8 (H, W).

    Raises:
        MemberError: the pixels cannot be read.
    """
    whole = upright.cut((0.0, 0.0, float(size[0]), float(size[1])), shown)
    return np.asarray((whole if whole.mode in ("L", "RGB") else whole.convert("RGB")).convert("L"))


def input_of(upright: Upright, layout: Layout, window: Window, image_size: tuple[int, int]) -> tuple[Input, np.ndarray]:
    """Returns the input that shows a window, and its luminance without the fill, uint8 (H, W).

    Raises:
        MemberError: the pixels cannot be read.
    """
    left, upper, right, lower = window.place
    shown = upright.cut(window.box, (right - left, lower - upper))
    shown = shown if shown.mode == "RGB" else shown.convert("RGB")
    image_HWC = np.asarray(shown, dtype=np.uint8)
    looked_HW = layout.looked_input(window, image_size)
    if looked_HW is not None:
        filled_HWC = np.full((*image_size, 3), FILL, np.uint8)
        filled_HWC[upper:lower, left:right] = image_HWC
        filled_HWC[~looked_HW] = FILL
        image_HWC = filled_HWC
    return Input(layout, window, image_HWC, looked_HW), np.asarray(shown.convert("L"))
