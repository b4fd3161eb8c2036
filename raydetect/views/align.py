"""Finds by how much the part in a picture is shifted against a reference, by phase correlation.

Both pictures are shrunk to at most `LONGEST_PX`, made grey and faded out to the edges (Hann). Of their spectra only the
phases are compared, so that light and contrast do not matter, and high frequencies count less (Gaussian), so that the
correlation of a shifted picture is a bell at its shift. The place of its top between pixels follows from a parabola
through the logarithms around it, which is exact for a bell. The parts that both show are then compared again, since
the fading stands still while the part moves.
"""

import base64
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from raydetect.errors import SpecError

LONGEST_PX = 256  # of a reference
LEAST_PX = 16  # of its sides
BLUR_PX = 1.0  # standard deviation of the bell
# A top means nothing below these: unrelated pictures reach 0.2 of the reference's own top, of 32 px 7 deviations.
WEAK, WEAK_DEVIATIONS = 0.25, 8.0
RESIDUE_PX = 1.5  # that a second look may change
FLOOR = 1e-3  # share of the mean amplitude below which a frequency counts less
DECIMALS = 2  # of a shift in px of the picture
ALIGNED, NOT_ALIGNED = "aligned", "not_aligned"
NOTE = re.compile(ALIGNED + r": (-?\d{1,7}\.\d\d), (-?\d{1,7}\.\d\d)")  # as `note_of` writes it
NOT_MOVED = (0.0, 0.0)

Shift = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Alignment:
    """What pictures are aligned to.

    Attributes:
        png: the reference, a grey PNG.
        most: largest shift along a side, as a share of it.
    """

    png: bytes
    most: float

    @classmethod
    def of_record(cls, entry: Mapping[str, Any] | None) -> "Alignment | None":
        """Restores the entry of an artifact's record.

        Raises:
            SpecError: it is damaged.
        """
        if entry is None:
            return None
        if not isinstance(entry, Mapping) or sorted(entry) != ["max", "png"]:
            raise SpecError("preprocess.view.align: has no max or png, or something else")
        most = entry["max"]
        if not isinstance(most, int | float) or isinstance(most, bool) or not 0 < most <= 0.25:
            raise SpecError("preprocess.view.align.max: is no share from 0 to 0.25")
        try:
            png = base64.b64decode(entry["png"], validate=True)
            _spectrum(png)
        except Exception as error:
            raise SpecError(f"preprocess.view.align.png: the reference is damaged ({type(error).__name__})") from None
        return cls(png, float(most))

    def recorded(self) -> dict[str, Any]:
        """The entry for an artifact's record."""
        return {"max": self.most, "png": base64.b64encode(self.png).decode()}

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the reference in px."""
        height, width = _levels(self.png).shape
        return width, height

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether a picture of (width, height) px has the reference's ratio of sides."""
        return shrunk(size, max(self.size)) == self.size

    def shift_of(self, grey_HW: np.ndarray, size: tuple[int, int]) -> Shift | None:
        """Returns the (x, y) in px of the picture by which its part lies right of and below the reference's.

        None if it cannot be told, or is larger than `most` along a side.

        Args:
            grey_HW: uint8 luminance of the picture at the reference's size.
            size: (width, height) in px of the upright picture.
        """
        found = _found(grey_HW, self.png)
        if found is None or any(abs(by) > self.most * side for by, side in zip(found, self.size, strict=True)):
            return None
        across, down = (by * whole / side for by, whole, side in zip(found, size, self.size, strict=True))
        return round(across, DECIMALS) + 0.0, round(down, DECIMALS) + 0.0


def reference_png(levels_HW: np.ndarray) -> bytes:
    """Returns the grey PNG of a reference.

    Raises:
        ValueError: it is too small or too flat to align anything to.
    """
    if min(levels_HW.shape) < LEAST_PX:
        raise ValueError(f"is shrunk to {levels_HW.shape[1]} x {levels_HW.shape[0]} px; it needs {LEAST_PX} per side")
    buffer = io.BytesIO()
    Image.fromarray(levels_HW).save(buffer, "PNG", optimize=True)
    if _found(levels_HW, buffer.getvalue()) is None:
        raise ValueError("shows nothing by which a shift could be told")
    return buffer.getvalue()


def shrunk(size: tuple[int, int], longest_px: int = LONGEST_PX) -> tuple[int, int]:
    """(width, height) of a picture whose longest side is at most `longest_px`."""
    scale = min(1.0, longest_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def note_of(shift: Shift) -> str:
    """The note of a row whose picture was aligned."""
    return f"{ALIGNED}: {shift[0]:.{DECIMALS}f}, {shift[1]:.{DECIMALS}f}"


def shift_in(note: str) -> Shift:
    """Returns the shift that the note of a row says; none if it says none."""
    for text in note.split("; "):
        match = NOTE.fullmatch(text)
        if match is not None:
            return float(match[1]), float(match[2])
    return NOT_MOVED


def _found(grey_HW: np.ndarray, png: bytes) -> Shift | None:
    """The shift against a reference in its px; None if the top of the correlation hardly stands out."""
    reference_HW, spectrum = _levels(png), _spectrum(png)
    correlation_HW = _correlation(_faded_spectrum(grey_HW), spectrum, grey_HW.shape)
    top = float(correlation_HW.max())
    if top <= max(WEAK * _own_top(png), WEAK_DEVIATIONS * float(correlation_HW.std()), 0.0):
        return None
    across, down = _top(correlation_HW)
    right, below = round(across), round(down)
    both = [_shared(grey_HW, below, right), _shared(reference_HW, -below, -right)]
    if min(both[0].shape) < LEAST_PX:
        return across, down
    spectra = [_faded_spectrum(levels_HW) for levels_HW in both]
    rest_x, rest_y = _top(_correlation(spectra[0], spectra[1], both[0].shape))
    if max(abs(right + rest_x - across), abs(below + rest_y - down)) > RESIDUE_PX:
        return across, down
    return right + rest_x, below + rest_y


def _shared(levels_HW: np.ndarray, below: int, right: int) -> np.ndarray:
    """The part of a picture shifted by whole px that the other shows too."""
    height, width = levels_HW.shape
    return levels_HW[max(below, 0) : height + min(below, 0), max(right, 0) : width + min(right, 0)]


def _correlation(spectrum: np.ndarray, reference: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The correlation of phases at every shift, float64 (H, W); shifts wrap around."""
    both = spectrum * np.conj(reference)
    amplitude = np.abs(both)
    floor = FLOOR * float(amplitude.mean())
    if floor == 0:
        return np.zeros(shape)
    correlation_HW: np.ndarray = np.fft.irfft2(both / (amplitude + floor) * _bell(shape), shape)
    return correlation_HW


def _top(correlation_HW: np.ndarray) -> Shift:
    """The (x, y) of the highest place between pixels, around 0."""
    height, width = correlation_HW.shape
    row, column = divmod(int(correlation_HW.argmax()), width)
    down = row + _between(*(float(correlation_HW[(row + i) % height, column]) for i in (-1, 0, 1)))
    across = column + _between(*(float(correlation_HW[row, (column + i) % width]) for i in (-1, 0, 1)))
    return _around_zero(across, width), _around_zero(down, height)


def _between(before: float, top: float, after: float) -> float:
    """Where a bell through three neighbours is highest, from -0.5 to 0.5 px from the middle one."""
    if top <= 0:
        return 0.0
    low, middle, high = (math.log(max(value, 1e-6 * top)) for value in (before, top, after))
    bend = low - 2 * middle + high
    return 0.0 if bend == 0 else min(max(0.5 * (low - high) / bend, -0.5), 0.5)


def _around_zero(place: float, length: int) -> float:
    return place - length if place > length / 2 else place


def _faded_spectrum(grey_HW: np.ndarray) -> np.ndarray:
    height, width = grey_HW.shape
    fade_HW = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[1:-1]
    levels_HW = grey_HW.astype(np.float64)
    mean = float((levels_HW * fade_HW).sum() / fade_HW.sum())
    return np.fft.rfft2((levels_HW - mean) * fade_HW)


@lru_cache(maxsize=16)
def _spectrum(png: bytes) -> np.ndarray:
    return _faded_spectrum(_levels(png))


@lru_cache(maxsize=16)
def _own_top(png: bytes) -> float:
    spectrum = _spectrum(png)
    return float(_correlation(spectrum, spectrum, _levels(png).shape).max())


@lru_cache(maxsize=16)
def _levels(png: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(png), formats=("PNG",))
    if picture.mode != "L" or max(picture.size) > LONGEST_PX or min(picture.size) < LEAST_PX:
        raise ValueError(f"a reference of {picture.size} px in mode {picture.mode}")
    levels_HW = np.array(picture)
    levels_HW.flags.writeable = False  # shared by the cache
    return levels_HW


@lru_cache(maxsize=64)
def _bell(shape: tuple[int, ...]) -> np.ndarray:
    """Weights of the frequencies whose correlation is a bell of `BLUR_PX`."""
    rows, columns = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    weights: np.ndarray = np.exp(-2 * (np.pi * BLUR_PX) ** 2 * (rows**2 + columns**2))
    return weights
