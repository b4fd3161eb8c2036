"""Decodes images to uint8 RGB pixels at the detector's input size, with a fixed rule for every pixel format.

Grey is repeated to RGB, palettes are looked up, alpha is dropped (colours as stored), and CMYK is converted with
Pillow's formula without colour profiles. Grey of 16 bits is divided by 65535 / 255, of 12 bits by 4095 / 255, and
rounded: fixed scales, so equal raw values stay equal in all images. White is 255, also in TIFFs where white is zero.
A 16-bit grey PNG with an sBIT chunk follows the standard (the upper bits are significant) unless its values show that
the lower bits are used; then it is scaled by those. Of 16-bit colour, Pillow keeps the upper byte. Floats and integers
of more than 16 bits have no fixed scale: `unsupported_mode`.

Warnings of libjpeg are errors (`jpeg.py` lists detectable damage): a JPEG with a damaged scan is `corrupt`; a complete
one without end marker is fine. EXIF orientation is applied exactly once for every format, unless the source says
`ignore`; then pixels are returned as stored. Any exception of a decoder becomes the status of that image only.

TIFF and JPEG 2000 are read window by window for views with tiles, and by the view's bands and range (`rasters/`), which
apply to the values of other formats after they are decoded (`rasters/in_memory.py`).

Facts are noted without making an image bad: `exif_ignored` (damaged EXIF, so orientation is not applied),
`pages_not_read: N` (only the first of several pages or frames is read) and, with `view.align`, `aligned: X, Y` (px by
which its part lies right of and below the reference's) or `not_aligned`.

The view of the artifact (`views/view.py`) says which parts of an image become inputs; they are resized with Pillow's
antialiased bilinear filter. Large JPEGs are decoded at a reduced DCT scale first if the artifact says so
(`preprocess.py`).

Memory: a process decodes at most max(`source.max_pixels`, 2^26) pixels at a time (`memory_budget.py`); further threads
wait. Peak bytes per pixel including the decoder's memory: bilevel and grey 2, 16-bit grey 4 (PPM 6), palette, colour
and LA 5, RGBA and CMYK 8, a TIFF in one strip 2 more, a rotated image 4 more, progressive JPEG 12, AVIF 12 (more than 8
bits: 16), WebP 16. A TIFF that is read window by window holds its windows, not the picture. A reduced JPEG in one scan
counts with its reduced pixels and 32 rows; a progressive one in full, as its decoder holds all frequencies.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from raydetect.config import STRETCH, ViewSpec
from raydetect.errors import MemberError
from raydetect.images.bit_depth import SIXTEEN_BIT
from raydetect.images.opening import DecodeRules, Loaded, loaded_image, short
from raydetect.images.orientation import SIDEWAYS
from raydetect.images.preprocess import Preprocess
from raydetect.images.rasters.in_memory import of_view
from raydetect.images.rasters.opening import raster_for_showing, raster_for_windows
from raydetect.images.rasters.picture import RasterPicture
from raydetect.records import OK, Member
from raydetect.views.align import NOT_ALIGNED, note_of
from raydetect.views.view import Layout, Place, Window
from raydetect.views.windows import Input, Upright, UprightPicture, grey_of, input_of

A = TypeVar("A")
B = TypeVar("B")
WINDOWS_AHEAD = 8  # windows of a picture that are cut before they are needed
GROUP = 4  # images in a task: small images are decoded faster than threads take turns
TINY_BYTES = 4096  # of encoded images, on average


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded member, or the reason why it could not be decoded.

    Attributes:
        inputs: the inputs that show it, row by row; empty if not ok, or if `decode_stream` yielded them before.
        width: width of the file's image in px after orientation; None if the header could not be read.
        height: likewise.
        brightness: mean luminance in [0, 1] at the size of its inputs, the mean over them; None if not ok.
        sharpness: standard deviation of that luminance's Laplacian divided by the mean luminance; the mean over its
            inputs; None if not ok.
        status: "ok" or one of records.BAD_STATUSES.
        error: one sentence if not ok.
        notes: facts to report that do not make the image bad: "exif_ignored", "pages_not_read: 3".
        orientation: the EXIF orientation that was applied; 1 = as stored.
        sha256: sha256 of the encoded bytes in hex; "" if they could not be read.
        levels: levels of 256 between the darkest and the brightest px of 16-bit grey; None for others.
    """

    inputs: tuple[Input, ...] = ()
    width: int | None = None
    height: int | None = None
    brightness: float | None = None
    sharpness: float | None = None
    status: str = OK
    error: str = ""
    notes: tuple[str, ...] = ()
    orientation: int = 1
    sha256: str = ""
    levels: int | None = None

    def facts(self) -> dict[str, Any]:
        """Returns the columns of a row that describe the image itself."""
        fields = {name: getattr(self, name) for name in ("width", "height", "brightness", "sharpness", "sha256")}
        return {**fields, "note": "; ".join(note.replace("; ", ", ") for note in self.notes)}

    @property
    def only_input(self) -> np.ndarray | None:
        """The only input, uint8 RGB (H, W, 3); None if there is none."""
        return self.inputs[0].image_HWC if len(self.inputs) == 1 else None

    @property
    def stored_size(self) -> tuple[int | None, int | None]:
        """(width, height) in px as stored, before orientation."""
        return (self.height, self.width) if self.orientation in SIDEWAYS else (self.width, self.height)


def decode_image(
    data: bytes, rules: DecodeRules, longest_px: int | None = None, spec: ViewSpec | None = None
) -> Image.Image:
    """Decodes an image to RGB at its own size, or shrunk to at most `longest_px` per side; JPEGs always in full.

    Large TIFFs are shrunk strip by strip, from an overview if they have one (`rasters/opening.py`).

    Args:
        data: the file.
        rules: decoding rules of its source.
        longest_px: of each side of the result; None = as stored.
        spec: the view of the artifact, which may choose bands; None = unknown.

    Raises:
        MemberError: empty, too_many_pixels, not_an_image, unsupported_mode or corrupt.
    """
    return decode_and_cut(data, rules, longest_px, (), spec)[0]


def decode_and_cut(
    data: bytes, rules: DecodeRules, longest_px: int | None, places: Sequence[Place], spec: ViewSpec | None = None
) -> tuple[Image.Image, list[Image.Image]]:
    """Decodes an image as `decode_image` does, and cuts parts from it at its stored size, in RGB.

    Parts of large TIFFs and of JPEG 2000 are read on their own; other pictures are decoded once for all.

    Args:
        data: the file.
        rules: decoding rules of its source.
        longest_px: of each side of the whole; None = as stored.
        places: (left, upper, right, lower) of the parts in px of the upright picture.
        spec: the view of the artifact, which may choose bands; None = unknown.

    Raises:
        MemberError: see `decode_image`.
    """
    try:
        raster = raster_for_showing(data, rules, spec) if longest_px is not None or spec is not None else None
        if raster is not None:
            return raster.shown(longest_px), raster.cut(places)
        with loaded_image(data, rules) as loaded:
            picture = of_view(loaded, data, spec or STRETCH).rgb()
            parts = [picture.crop(place) for place in places]
            if longest_px is not None:
                picture.thumbnail((longest_px, longest_px))
            return picture, parts
    except MemberError:
        raise
    except Exception as error:
        raise MemberError("corrupt", f"its pixels cannot be converted ({short(error)}).") from None


def decode_member(member: Member, rules: DecodeRules, preprocess: Preprocess) -> Pixels:
    """Decodes a member to the inputs of a detector; every failure becomes a status."""
    *inputs, pixels = decode_windows(member, rules, preprocess)
    assert isinstance(pixels, Pixels)
    return replace(pixels, inputs=tuple(item for item in inputs if isinstance(item, Input))) if inputs else pixels


def decode_windows(
    member: Member, rules: DecodeRules, preprocess: Preprocess, pool: Executor | None = None
) -> Iterator[Input | Pixels]:
    """Decodes a member: yields its inputs one by one, then its `Pixels` without them; every failure becomes a status.

    Inputs that were yielded before a failure must be discarded.

    Args:
        member: the encoded image.
        rules: decoding rules of its source.
        preprocess: rules of the detector.
        pool: threads that cut the windows of a picture with many; None = this one.
    """
    if member.status != OK:
        yield Pixels(status=member.status, error=member.error, notes=member.notes)
        return
    sha256, facts = hashlib.sha256(member.data).hexdigest(), _Facts()
    try:
        yield from _inputs(member.data, rules, preprocess, facts, pool)
        brightness, sharpness = facts.means()
    except MemberError as error:
        yield Pixels(status=error.status, error=f"{member.key}: {error}", notes=member.notes, sha256=sha256)
    except Exception as error:  # one image must never end a job, whatever a library raises
        message = f"{member.key}: its pixels cannot be converted ({short(error)})."
        yield Pixels(status="corrupt", error=message, notes=member.notes, sha256=sha256)
    else:
        yield Pixels(
            (),
            *facts.size,
            brightness,
            sharpness,
            notes=(*member.notes, *facts.notes),
            orientation=facts.orientation,
            sha256=sha256,
            levels=facts.levels,
        )


@dataclass(slots=True)
class _Facts:
    """What is learnt about an image while its inputs are made."""

    size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    orientation: int = 1
    levels: int | None = None
    measures: list[tuple[float, float]] = field(default_factory=list)

    def means(self) -> tuple[float, float]:
        """Mean brightness and sharpness of the inputs."""
        brightness, sharpness = (sum(values) / len(self.measures) for values in zip(*self.measures, strict=True))
        return brightness, sharpness


def _inputs(
    data: bytes, rules: DecodeRules, preprocess: Preprocess, facts: _Facts, pool: Executor | None
) -> Iterator[Input]:
    with _opened(data, rules, preprocess, pool) as (loaded, pool):
        facts.size, facts.notes, facts.orientation = loaded.size, loaded.notes, loaded.orientation
        upright = loaded.upright()
        layout, aligned = _aligned(upright, loaded.size, preprocess)
        if isinstance(upright, UprightPicture) and isinstance(loaded, Loaded) and loaded.picture.mode in SIXTEEN_BIT:
            low, high = np.array(upright.picture.getextrema(), np.int64)
            facts.levels = int(high - low)
        if layout.is_empty:
            raise MemberError(
                "unsupported_mode", "no px of it lies in view.region at the size of the input. Enlarge the region."
            )

        def cut(window: Window) -> tuple[Input, tuple[float, float]]:
            shown, grey_HW = input_of(upright, layout, window, preprocess.image_size)
            return shown, brightness_and_sharpness(grey_HW)

        for shown, measured in _in_order(cut, layout.windows, pool):
            facts.measures.append(measured)
            yield shown
        facts.notes = (*loaded.notes, *aligned)


def _aligned(upright: Upright, size: tuple[int, int], preprocess: Preprocess) -> tuple[Layout, tuple[str, ...]]:
    """The windows of a picture, which follow its part, and the note that says so."""
    alignment, layout = preprocess.view.alignment, preprocess.layout(size)
    if alignment is None:
        return layout, ()
    shift = None
    if alignment.fits(size):
        shift = alignment.shift_of(grey_of(upright, size, alignment.size), size)
    moved = layout if shift is None else layout.moved(shift)
    return moved, (NOT_ALIGNED if shift != moved.shift else note_of(shift),)


@contextmanager
def _opened(
    data: bytes, rules: DecodeRules, preprocess: Preprocess, pool: Executor | None
) -> Iterator[tuple[Loaded | RasterPicture, Executor | None]]:
    """Opens an image for the windows of a view; yields it and the threads that may cut them, within the budget."""
    raster = raster_for_windows(data, rules, preprocess.view.spec)
    if raster is None:
        with loaded_image(data, rules, preprocess) as loaded:
            yield of_view(loaded, data, preprocess.view.spec), pool
        return
    with raster.for_windows(preprocess, 1 if pool is None else WINDOWS_AHEAD + 1) as (picture, fits):
        yield picture, pool if fits else None


def _in_order(work: Callable[[A], B], items: Sequence[A], pool: Executor | None) -> Iterator[B]:
    """Maps items in order on a pool, a few ahead."""
    if pool is None or len(items) == 1:
        yield from map(work, items)
        return
    running: deque[Future[B]] = deque()
    try:
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > WINDOWS_AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:  # nothing may read from the picture when it is closed
        wait([future for future in running if not future.cancel()])


def brightness_and_sharpness(grey_HW: np.ndarray) -> tuple[float, float]:
    """Returns (mean luminance in [0, 1], standard deviation of the four-neighbour Laplacian divided by that mean).

    The division makes sharpness depend on the lens and not on the light; it is 0 for a black image. All sums are
    integers below 2^53, so results are identical to the bit on every machine. Border pixels have no Laplacian.

    Args:
        grey_HW: uint8 luminance.
    """
    wide_HW = grey_HW.astype(np.float64)
    brightness = float(wide_HW.sum()) / (255.0 * grey_HW.size)
    edges_HW = -4 * wide_HW[1:-1, 1:-1]
    for part_HW in (wide_HW[1:-1, :-2], wide_HW[1:-1, 2:], wide_HW[:-2, 1:-1], wide_HW[2:, 1:-1]):
        edges_HW += part_HW
    count = edges_HW.size
    if not count or not brightness:
        return brightness, 0.0
    edges = edges_HW.reshape(-1)
    total, squares = int(edges.sum()), int(edges.dot(edges))
    return brightness, math.sqrt(max(0, count * squares - total * total)) / (255.0 * count * brightness)


class DecodePool(ThreadPoolExecutor):
    """Threads that decode images, a few images at a time.

    Tiny images are decoded by one thread, however many there are: reading a header and calling a library take longer
    than the pixels, and two threads that take the interpreter's lock from each other at every call are slower than one.
    JPEGs of 64, 96, 112, 192 and 256 px, of 1.9, 3.1, 3.7, 8.7 and 14 KB, are decoded by two threads 0.7, 0.9, 1.0, 1.4
    and 1.8 times as fast as by one.
    """

    def __init__(self, threads: int) -> None:
        """Creates the pool; its threads start when they are needed.

        Args:
            threads: images decoded at a time, at least 1.
        """
        super().__init__(threads, thread_name_prefix="decode")
        self._for_tiny = ThreadPoolExecutor(1, thread_name_prefix="decode-tiny")

    def map_members(self, decode: Callable[[Member], Iterable[A]], members: Sequence[Member]) -> Iterator[A]:
        """Decodes all members and yields what each gives, in order."""

        def decoded(group: Sequence[Member]) -> list[A]:
            return [item for member in group for item in decode(member)]

        are_tiny = sum(len(member.data) for member in members) < TINY_BYTES * len(members)
        groups = [members[i : i + GROUP] for i in range(0, len(members), GROUP)]
        return chain.from_iterable((self._for_tiny if are_tiny else self).map(decoded, groups))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor.shutdown`."""
        self._for_tiny.shutdown(wait, cancel_futures=cancel_futures)
        super().shutdown(wait, cancel_futures=cancel_futures)


def decode_stream(
    members: Sequence[Member], rules: DecodeRules, preprocess: Preprocess, pool: DecodePool
) -> Iterator[Input | Pixels]:
    """Yields of every member in order its inputs, then its `Pixels` without them.

    Members with one window are decoded on the pool, all of them at once and a few per task. Those with tiles may be
    large: they are decoded one after the other in this thread, and their windows are cut on the pool.
    """
    if preprocess.view.has_tiles:
        for member in members:
            yield from decode_windows(member, rules, preprocess, pool)
        return

    yield from pool.map_members(partial(decode_windows, rules=rules, preprocess=preprocess), members)
