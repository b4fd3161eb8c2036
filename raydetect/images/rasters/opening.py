"""Decides which pictures are read window by window, and opens them.

- JPEG 2000, and TIFF for a view with `bands` or `range`: always; for other formats see `in_memory.py`.
- TIFF for a view with tiles: if its pixels are those of the in-memory path, or if it is too large for that path.
- TIFF that is only shown (overlays, reports): if it has more than `SHOWN_PIXELS`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from raydetect.config import STRETCH, ViewSpec
from raydetect.errors import MemberError
from raydetect.images import tiff
from raydetect.images.memory_budget import PIXEL_BUDGET
from raydetect.images.opening import EXIF_IGNORED, PAGES_NOT_READ, DecodeRules, too_many
from raydetect.images.orientation import TURNS, orientation_in_xmp
from raydetect.images.preprocess import Preprocess
from raydetect.images.rasters.kinds import Kind, is_exact, kind_in_memory, kind_of
from raydetect.images.rasters.library import is_installed, is_jpeg2000, missing, opened_dataset
from raydetect.images.rasters.picture import BAND_PIXELS, RasterPicture
from raydetect.views.view import Place

SHOWN_PIXELS = 1 << 24
OVERVIEW = 2  # px of an overview for each px shown, at least


@dataclass(frozen=True, slots=True)
class Raster:
    """A picture that is read window by window.

    Attributes:
        data: the file.
        rules: decoding rules of its source.
        spec: the view that looks at it.
        page: directory of a TIFF; None = JPEG 2000.
        kind: how values become levels; None = decided by the view when it is opened.
    """

    data: bytes
    rules: DecodeRules
    spec: ViewSpec
    page: tiff.TiffDirectory | None
    kind: Kind | None

    @contextmanager
    def opened(self, level: int | None = None) -> Iterator[RasterPicture]:
        """Opens it, or one of its overviews. Whoever reads from it reserves the memory budget.

        Raises:
            MemberError: corrupt, too_many_pixels, unsupported_mode.
        """
        with opened_dataset(self.data) as dataset:
            stored = (int(dataset.width), int(dataset.height))
            orientation, notes = self._orientation(dataset)
            inverted = self.page is not None and self.page.values.get(tiff.PHOTOMETRIC) == (0,)
            kind = self.kind or kind_of(dataset, self.spec, inverted)
            if self.page is not None and kind.nodata is None and tiff.holes(self.data):
                raise MemberError("corrupt", "parts of it are not stored, and no nodata value says so. Write it again.")
            if level is None:
                yield RasterPicture(dataset, kind, orientation, notes, self.rules.max_pixels, stored)
                return
        with opened_dataset(self.data, level) as dataset:
            yield RasterPicture(dataset, kind, orientation, notes, self.rules.max_pixels, stored)

    @contextmanager
    def for_windows(self, preprocess: Preprocess, at_once: int) -> Iterator[tuple[RasterPicture, bool]]:
        """Opens it for the windows of a view; holds its reservation of the memory budget until the block ends.

        Args:
            preprocess: rules of the detector.
            at_once: windows that are cut at the same time, at most.

        Yields the picture, and whether so many fit; else they must be cut one by one.

        Raises:
            MemberError: see `opened`; also if a window is too large.
        """
        with self.opened() as picture:
            view, windows = preprocess.view, preprocess.layout(picture.size).windows
            shown = [(window.box, _size(window.place)) for window in windows]
            if view.alignment is not None:
                shown.append(((0.0, 0.0, float(picture.size[0]), float(picture.size[1])), view.alignment.size))
            largest = max((picture.pixels_of(box, size) for box, size in shown), default=0)
            fits = at_once * largest + picture.block_pixels <= self.rules.max_pixels
            held = (at_once if fits else 1) * largest + picture.block_pixels
            with PIXEL_BUDGET.reserve(held, self.rules.max_pixels):
                yield picture, fits

    def shown(self, longest_px: int | None) -> Image.Image:
        """Returns it upright in RGB, no longer than `longest_px`, from its smallest overview that is large enough.

        Raises:
            MemberError: corrupt, too_many_pixels, unsupported_mode.
        """
        with opened_dataset(self.data) as dataset:
            sides = (int(dataset.width), int(dataset.height))
            overviews = dataset.overviews(1)
        share = 1.0 if longest_px is None else min(1.0, longest_px / max(sides))
        fitting = [i for i, by in enumerate(overviews) if 1 / by >= OVERVIEW * share]
        if share == 1 and math.prod(sides) > self.rules.max_pixels:
            raise too_many("{} x {} px is".format(*sides), self.rules.max_pixels)
        if fitting:
            try:
                return self._shrunk(share, fitting[-1])
            except MemberError as error:
                if error.status != "corrupt":
                    raise  # else only the overview may be damaged
        return self._shrunk(share, None)

    def cut(self, places: Sequence[Place]) -> list[Image.Image]:
        """Returns parts of the upright picture at its stored size in RGB, read one by one.

        Args:
            places: (left, upper, right, lower) in px.

        Raises:
            MemberError: corrupt, too_many_pixels, unsupported_mode.
        """
        if not places:
            return []
        largest = max((right - left) * (lower - upper) for left, upper, right, lower in places)
        with self.opened() as picture, PIXEL_BUDGET.reserve(largest + picture.block_pixels, self.rules.max_pixels):
            return [picture.read(place).convert("RGB") for place in places]

    def _shrunk(self, share: float, level: int | None) -> Image.Image:
        with self.opened(level) as picture:
            width, height = picture.size
            size = (max(1, round(width * share)), max(1, round(height * share)))
            with PIXEL_BUDGET.reserve(2 * BAND_PIXELS + picture.block_pixels, self.rules.max_pixels):
                return picture.shrunk(size)

    def _orientation(self, dataset: Any) -> tuple[int, tuple[str, ...]]:
        """(orientation to apply, notes)."""
        if self.page is None:
            return 1, ()
        unread = tiff.pages(self.data) - 1
        notes = (f"{PAGES_NOT_READ}: {unread}",) if unread > 0 else ()
        if not self.rules.apply_exif:
            return 1, notes
        if tiff.ORIENTATION not in self.page.value_offsets:
            value = orientation_in_xmp("".join(dataset.tags(ns="xml:XMP").values()))
            return (value if value in TURNS else 1), notes
        value = self.page.first(tiff.ORIENTATION, 0)
        return (value if value in TURNS else 1), notes if value else (EXIF_IGNORED, *notes)


def raster_for_windows(data: bytes, rules: DecodeRules, spec: ViewSpec) -> Raster | None:
    """Returns the picture if the windows of a view are read from it one by one; None = decode it in memory.

    Raises:
        MemberError: unsupported_mode (rasterio is missing), too_many_pixels.
    """
    found = _always(data, rules, spec)
    if found is not None or spec.tile is None:
        return found
    return _like_in_memory(data, rules, spec, lambda page, px: is_exact(page) or px > rules.max_pixels)


def raster_for_showing(data: bytes, rules: DecodeRules, spec: ViewSpec | None) -> Raster | None:
    """Returns the picture if it is shrunk without decoding all of it at once; None = decode it in memory.

    Args:
        data: the file.
        rules: decoding rules of its source.
        spec: the view of the artifact; None = unknown.

    Raises:
        MemberError: see `raster_for_windows`.
    """
    spec = replace(spec or STRETCH, tile=None, scale=None)
    found = _always(data, rules, spec)
    if found is not None:
        return found
    return _like_in_memory(data, rules, spec, lambda _, px: px > min(SHOWN_PIXELS, rules.max_pixels))


def _always(data: bytes, rules: DecodeRules, spec: ViewSpec) -> Raster | None:
    jpeg2000, page = is_jpeg2000(data), None
    if not jpeg2000:
        page = tiff.first_page(data) if spec.reads_bands and tiff.is_tiff(data) else None
        if page is None:
            return None
    if not is_installed():
        raise missing("JPEG 2000" if jpeg2000 else "a view with bands or range")
    return Raster(data, rules, spec, page, None)


def _like_in_memory(
    data: bytes, rules: DecodeRules, spec: ViewSpec, wanted: Callable[[tiff.TiffDirectory, int], bool]
) -> Raster | None:
    page = tiff.first_page(data) if tiff.is_tiff(data) else None
    kind = None if page is None else kind_in_memory(data, page)
    if page is None or kind is None:
        return None
    width, height = page.first(tiff.WIDTH, 0), page.first(tiff.HEIGHT, 0)
    if not wanted(page, width * height):
        return None
    if is_installed():
        return Raster(data, rules, spec, page, kind)
    if width * height <= rules.max_pixels:
        return None
    what = f"{width} x {height} px is more than source.max_pixels = {rules.max_pixels:,}, and reading it by windows"
    raise MemberError("too_many_pixels", str(missing(what)))


def _size(place: Place) -> tuple[int, int]:
    """(width, height) of a place in an input."""
    return place[2] - place[0], place[3] - place[1]
