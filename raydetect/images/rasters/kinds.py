"""How the raw values of a raster become 8-bit levels, by the same rules as in memory or by those of the view.

Without `view.bands` and `view.range` a TIFF is read by windows only if its pixel format is in the table here, for which
pixels equal those that Pillow decodes. Others are decoded in memory and obey `source.max_pixels`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydetect.config import ViewSpec
from raydetect.errors import MemberError
from raydetect.images import tiff
from raydetect.images.bit_depth import scale_table
from raydetect.views.view import FILL

GREY_FILL = 117  # luminance of FILL
JPEG, PALETTE, YCBCR = 7, 3, 6  # of TIFF's compression and photometric interpretation
GREY_SAMPLES = {(1, ()), (2, (0,)), (2, (2,))}  # (samples, ExtraSamples) without premultiplied alpha
COLOUR_SAMPLES = {(3, ()), (4, (0,)), (4, (2,)), (4, ())}
ALPHA = "alpha"
COMPRESSIONS = {1, 2, 3, 4, 5, JPEG, 8, 32773, 32946, 50000}  # of TIFF, which both libraries decode


@dataclass(frozen=True)
class Kind:
    """Which bands of a raster are read, and how their values become 8-bit levels.

    Attributes:
        bands: one or three, from 1.
        bits: significant bits of a value.
        inverted: whether white is zero.
        palette_P3: colours by value; None = values are levels.
        upper_byte: whether 16-bit values keep their upper byte, as Pillow does in colour.
        range: values that become 0 and 255; None = the fixed scale of `bits`.
        nodata: value of px without data, with a view's bands or range; None = there is none.
    """

    bands: tuple[int, ...]
    bits: int = 8
    inverted: bool = False
    palette_P3: np.ndarray | None = field(default=None, repr=False)
    upper_byte: bool = False
    range: tuple[float, float] | None = None
    nodata: float | None = None

    def levels(self, values_CHW: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns levels, uint8 (H, W) or (H, W, 3), and the number of px without data, which have the fill.

        Args:
            values_CHW: raw values of `bands`.
        """
        if self.palette_P3 is not None:
            return self.palette_P3[values_CHW[0]], 0
        if self._are_levels:
            return (np.ascontiguousarray(np.moveaxis(values_CHW, 0, -1)) if len(self.bands) == 3 else values_CHW[0]), 0
        levels_CHW = np.empty(values_CHW.shape, np.uint8)
        empty_HW = np.zeros(values_CHW.shape[1:], bool)
        for values_HW, levels_HW in zip(values_CHW, levels_CHW, strict=True):
            empty_HW |= self._empty(values_HW)
            levels_HW[:] = self._in_range(values_HW) if self.range is not None else self._fixed(values_HW)
        empty = int(empty_HW.sum())
        if empty:
            levels_CHW[:, empty_HW] = np.array(FILL if len(self.bands) == 3 else (GREY_FILL,), np.uint8)[:, None]
        return (np.ascontiguousarray(np.moveaxis(levels_CHW, 0, -1)) if len(self.bands) == 3 else levels_CHW[0]), empty

    @property
    def full_scale(self) -> int:
        """The highest level of a mask."""
        return (1 << self.bits) - 1 if self.bits > 8 and not self.upper_byte else 255

    def mask_levels(self, values_CHW: np.ndarray) -> np.ndarray:
        """Returns the levels of a mask, (H, W): indices of a palette, 16-bit grey as it is, or the largest channel."""
        if self.palette_P3 is not None:
            return values_CHW[0]
        if self.full_scale > 255:
            return self.full_scale - values_CHW[0] if self.inverted else values_CHW[0]
        channels = (self._fixed(values_HW) for values_HW in values_CHW)
        return functools.reduce(np.maximum, channels)

    @property
    def _are_levels(self) -> bool:
        """Whether values are levels as they are, so that they need no copy."""
        return (self.bits, self.inverted, self.range, self.nodata) == (8, False, None, None)

    def _empty(self, values_HW: np.ndarray) -> np.ndarray | bool:
        """Where there are no data."""
        absent: np.ndarray | bool = np.isnan(values_HW) if values_HW.dtype.kind == "f" else False
        return absent if self.nodata is None else absent | (values_HW == self.nodata)

    def _fixed(self, values_HW: np.ndarray) -> np.ndarray:
        if self.bits == 8:
            return ~values_HW if self.inverted else values_HW
        if self.upper_byte:
            return (values_HW >> 8).astype(np.uint8)
        return np.take(scale_table(self.bits, self.inverted), values_HW)

    def _in_range(self, values_HW: np.ndarray) -> np.ndarray:
        looked_up = self._tables.get(values_HW.dtype.itemsize) if values_HW.dtype.kind == "u" else None
        return self._ranged(values_HW) if looked_up is None else np.take(looked_up, values_HW)

    @functools.cached_property
    def _tables(self) -> dict[int, np.ndarray]:
        """The level of each value of one and of two bytes, which is quicker to look up than to compute."""
        return {size: self._ranged(np.arange(1 << 8 * size)) for size in (1, 2)}

    def _ranged(self, values_HW: np.ndarray) -> np.ndarray:
        """Maps `range` to 0..255, clips and rounds half up; values that are not finite are as the nearest end."""
        assert self.range is not None
        low, high = self.range
        scaled_HW = np.clip((values_HW.astype(np.float64) - low) * 255 / (high - low), 0, 255)
        scaled_HW = np.floor(np.nan_to_num(scaled_HW, nan=0.0) + 0.5)
        levels_HW: np.ndarray = scaled_HW.astype(np.uint8)
        return ~levels_HW if self.inverted else levels_HW


def kind_in_memory(data: bytes, page: tiff.TiffDirectory) -> Kind | None:
    """Returns how a TIFF is read by windows with the pixels that Pillow decodes; None if it cannot be."""
    colour, samples = page.first(tiff.PHOTOMETRIC, -1), page.first(tiff.SAMPLES, 1)
    bits, extra = page.values.get(tiff.BITS, (1,)), page.values.get(tiff.EXTRA_SAMPLES, ())
    if len(set(bits)) != 1 or page.first(tiff.SAMPLE_FORMAT, 1) != 1 or page.first(tiff.FILL_ORDER, 1) != 1:
        return None
    if page.first(tiff.COMPRESSION, 1) not in COMPRESSIONS:
        return None
    if colour in (0, 1) and (samples, extra) in GREY_SAMPLES and bits[0] in (1, 8, 16):
        return Kind((1,), bits[0], inverted=colour == 0) if samples == 1 or bits[0] == 8 else None
    if colour == 2 and (samples, extra) in COLOUR_SAMPLES and bits[0] in (8, 16):
        return Kind((1, 2, 3), bits[0], upper_byte=bits[0] == 16)
    if colour == YCBCR and page.first(tiff.COMPRESSION, 1) == JPEG and samples == 3 and bits[0] == 8:
        return Kind((1, 2, 3))
    if colour == PALETTE and samples == 1 and bits[0] == 8:
        palette_P3 = tiff.colours(data)
        return Kind((1,), palette_P3=palette_P3) if palette_P3 is not None and len(palette_P3) == 256 else None
    return None


def is_exact(page: tiff.TiffDirectory) -> bool:
    """Whether GDAL and Pillow decode equal pixels: their libjpegs widen halved chroma differently."""
    return page.first(tiff.PHOTOMETRIC, -1) != YCBCR


def kind_of(dataset: Any, spec: ViewSpec, inverted: bool = False) -> Kind:
    """Returns how an opened raster is read by a view that states bands or a range, or a JPEG 2000 by any view.

    Args:
        dataset: of rasterio.
        spec: the view.
        inverted: whether white is zero.

    Raises:
        MemberError: unsupported_mode.
    """
    bands = bands_of(spec, [meaning.name == ALPHA for meaning in dataset.colorinterp])
    if any(dataset.colorinterp[band - 1].name == "palette" for band in bands) and bits_of(dataset) > 1:
        raise unsupported("its values are indices of a palette, which have no bands. Convert it to RGB.")
    kinds = {np.dtype(dataset.dtypes[band - 1]) for band in bands}
    if any(kind.kind == "c" for kind in kinds):
        raise unsupported("its values are complex numbers. Write their magnitudes.")
    if spec.range is None and kinds - {np.dtype(np.uint8), np.dtype(np.uint16)}:
        names = ", ".join(sorted(kind.name for kind in kinds))
        raise unsupported(f"values of type {names} have no fixed 8-bit scale. State their range in view.range.")
    nodata = dataset.nodatavals[bands[0] - 1] if spec.bands or spec.range else None
    nodata = None if nodata is None or np.isnan(nodata) else nodata
    return Kind(bands, bits_of(dataset), inverted, range=spec.range, nodata=nodata)


def bits_of(dataset: Any) -> int:
    """Significant bits of the values of an opened raster's first band."""
    stated = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", "")
    return int(stated) if stated.isdecimal() else 8 * np.dtype(dataset.dtypes[0]).itemsize


def bands_of(spec: ViewSpec, are_alpha: Sequence[bool]) -> tuple[int, ...]:
    """Returns the bands that a view looks at: those that it names, or one or three without alpha.

    Args:
        spec: the view.
        are_alpha: for each band of the picture whether it is alpha.

    Raises:
        MemberError: unsupported_mode.
    """
    bands = spec.bands or tuple(i for i, is_alpha in enumerate(are_alpha, start=1) if not is_alpha)
    if max(bands, default=0) > len(are_alpha):
        raise unsupported(f"view.bands = {list(bands)}, and it has {_counted(len(are_alpha))}. Name others.")
    if len(bands) not in (1, 3):
        raise unsupported(f"it has {_counted(len(are_alpha))}. Choose one or three of them with view.bands.")
    return bands


def _counted(bands: int) -> str:
    return f"{bands} band{'s' if bands > 1 else ''}"


def unsupported(message: str) -> MemberError:
    """The status of a picture whose pixel format or bands do not suit the view."""
    return MemberError("unsupported_mode", message)
