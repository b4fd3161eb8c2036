"""How an encoded image becomes the input of one detector: its size, and the rule for the DCT scale of JPEGs.

A JPEG stores blocks of 8 x 8 px as frequencies, so a decoder can leave out the high ones and give 1/2, 1/4 or 1/8 of
the size at a fraction of the time. By the rule `at_least_2x` it does so as far as both sides keep at least twice the px
of the input, to which the image is then resized; pixels differ from those of a full decode by a fraction of a level on
average. By `full` it never does. The rule belongs to the artifact: a fit and everything that scores with it decode
alike. Artifacts that do not state a rule were fitted by an earlier version, on JPEGs decoded in full.

The scale follows from the header alone: the stored size, turned by EXIF orientation where the source applies it.
Widths, heights, masks and overlays stay in stored px.
"""

import math
from dataclasses import dataclass
from typing import Any

from raydetect.config import AT_LEAST_2X, STRETCH, JpegScale
from raydetect.images.orientation import SIDEWAYS
from raydetect.views.align import NOT_MOVED, Shift
from raydetect.views.view import Layout, View

REDUCTIONS = (8, 4, 2)  # the powers of two, largest first
LEAST = 2  # px of a reduced JPEG for each px of the input, at least
STRETCHED = View(STRETCH)


@dataclass(frozen=True, slots=True)
class Preprocess:
    """What an artifact says about decoding.

    Attributes:
        image_size: (height, width) in px of the detector's input.
        jpeg_scale: "at_least_2x" or "full".
        view: which parts of a picture become inputs.
    """

    image_size: tuple[int, int]
    jpeg_scale: JpegScale = "full"
    view: View = STRETCHED

    def recorded(self) -> dict[str, Any]:
        """Returns the entry `preprocess` of an artifact's record; the size is in its `params`."""
        view = self.view.recorded()
        return {"jpeg_scale": self.jpeg_scale, **({"view": view} if view else {})}

    def layout(self, size: tuple[int, int], shift: Shift = NOT_MOVED) -> Layout:
        """Returns the windows of an upright picture of (width, height) px whose part is shifted by (x, y) px."""
        return self.view.layout(size, self.image_size).moved(shift)

    def reduction(self, stored_size: tuple[int, int], orientation: int) -> int:
        """Returns 1, 2, 4 or 8: by how much both sides of a JPEG are divided when it is decoded.

        Args:
            stored_size: (width, height) in px as stored.
            orientation: the EXIF orientation that will be applied, 1 to 8; 5 to 8 swap the sides.
        """
        if self.jpeg_scale != AT_LEAST_2X:
            return 1
        sideways = orientation in SIDEWAYS
        shown = self.view.needed(stored_size[::-1] if sideways else stored_size, self.image_size)
        needed = [LEAST * side for side in (shown[::-1] if sideways else shown)]
        fitting = (r for r in REDUCTIONS if all(a >= b for a, b in zip(reduced(stored_size, r), needed, strict=True)))
        return next(fitting, 1)


def reduced(size: tuple[int, int], reduction: int) -> tuple[int, int]:
    """Returns (width, height) in px of a JPEG decoded at 1 / `reduction`: rounded up, as libjpeg does."""
    return math.ceil(size[0] / reduction), math.ceil(size[1] / reduction)
