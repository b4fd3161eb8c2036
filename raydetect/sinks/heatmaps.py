"""Heatmaps: an overlay on the image, or the anomaly map itself as 16-bit PNG on a fixed scale."""

import io

import numpy as np
from PIL import Image

from raydetect.errors import StorageError

# Control points (position, red, green, blue) of a colour map from dark violet to pale yellow with rising lightness,
# which is readable with every kind of colour blindness and in greyscale print.
RAMP = (
    (0.00, 48, 18, 90),
    (0.25, 132, 32, 107),
    (0.50, 214, 68, 70),
    (0.75, 249, 146, 38),
    (1.00, 253, 252, 168),
)
NORMAL_SHARE = 0.1
OPAQUE = 0.72
MAX_GREY = 65535
BAND_PIXELS = 1 << 18  # blended at a time, with about a hundred bytes per pixel
MAX_PIXELS = 1 << 26  # limit for reading; written heatmaps have at most the detector's input size, or 1024 px per side


def ramp_colours(level_HW: np.ndarray) -> np.ndarray:
    """Maps levels in [0, 1] to RGB, float32 in [0, 255], shape (H, W, 3)."""
    positions = [point[0] for point in RAMP]
    channels = [np.interp(level_HW, positions, [point[c] for point in RAMP]) for c in (1, 2, 3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def overlay_png(
    image_HW3: np.ndarray,
    map_HW: np.ndarray,
    low: float,
    high: float,
    box: tuple[int, int, int, int] | None = None,
) -> bytes:
    """Draws an anomaly map over its image; returns PNG bytes.

    Pixels in the range of normal images are unchanged; above it, colour and opacity grow with the map up to three
    times that range, so overlays of different images are comparable.

    Args:
        image_HW3: uint8 RGB image.
        map_HW: anomaly map of any size; resized to the image. Nothing is drawn where it is NaN.
        low: lower end of the fixed scale.
        high: upper end of the fixed scale; the normal range is its lowest tenth.
        box: (left, upper, right, lower) in px of the image that the map covers; None = all.
    """
    height, width = image_HW3.shape[:2]
    drawn_HW3 = image_HW3.copy()
    left, upper, right, lower = box or (0, 0, width, height)
    shown_HW3 = drawn_HW3[upper:lower, left:right]
    share_HW = _share(map_HW, low, high, (shown_HW3.shape[0], shown_HW3.shape[1]))
    step = max(1, BAND_PIXELS // width)
    for rows in (slice(top, top + step) for top in range(0, len(shown_HW3), step)):
        shown_HW3[rows] = _blended(shown_HW3[rows], share_HW[rows])
    return encoded_png(Image.fromarray(drawn_HW3))


def _share(map_HW: np.ndarray, low: float, high: float, size: tuple[int, int]) -> np.ndarray:
    """The map resized to (height, width) `size`, divided by the range of normal images; zero where it is NaN."""
    unknown_HW = np.isnan(map_HW)
    values_HW = np.where(unknown_HW, low, map_HW).astype(np.float32)
    resized = Image.fromarray(values_HW).resize(size[::-1], Image.Resampling.BICUBIC)
    share_HW = (np.asarray(resized) - low) / (high - low) / NORMAL_SHARE
    if unknown_HW.any():
        share_HW[np.asarray(Image.fromarray(unknown_HW).resize(size[::-1], Image.Resampling.NEAREST))] = 0
    return share_HW


def _blended(image_HW3: np.ndarray, share_HW: np.ndarray) -> np.ndarray:
    level_HW = np.clip((share_HW - 1.0) / 2.0, 0.0, 1.0)
    soft_HW = np.clip((share_HW - 0.9) / 0.4, 0.0, 1.0)
    alpha_HW1 = (OPAQUE * soft_HW * (0.55 + 0.45 * level_HW))[..., None]
    blended = (1.0 - alpha_HW1) * image_HW3.astype(np.float32) + alpha_HW1 * ramp_colours(level_HW)
    blended_HW3: np.ndarray = np.clip(np.rint(blended), 0, 255).astype(np.uint8)
    return blended_HW3


def map_png(map_HW: np.ndarray, low: float, high: float) -> tuple[bytes, int]:
    """Encodes a map as 16-bit grey PNG: round(65535 * (x - low) / (high - low)), clipped; 0 where the map is NaN.

    Returns:
        The PNG bytes and the number of clipped pixels.

    Raises:
        ValueError: `high` is not above `low`.
    """
    if not high > low:
        raise ValueError(f"the scale of a map needs high > low, given {low} and {high}")
    values_HW, clipped = np.empty(map_HW.shape, np.uint16), 0
    step = max(1, BAND_PIXELS // map_HW.shape[1])
    for rows in (slice(top, top + step) for top in range(0, len(map_HW), step)):
        level_HW = (map_HW[rows].astype(np.float64) - low) / (high - low)
        level_HW = np.nan_to_num(level_HW, nan=0.0, posinf=np.inf, neginf=-np.inf)
        clipped += int(((level_HW < 0.0) | (level_HW > 1.0)).sum())
        values_HW[rows] = np.rint(np.clip(level_HW, 0.0, 1.0) * MAX_GREY)
    return encoded_png(Image.fromarray(values_HW)), clipped


def read_map_png(data: bytes, low: float, high: float) -> np.ndarray:
    """Decodes a map of `map_png` to float32; the error within the scale is at most (high - low) / 65535 / 2.

    Raises:
        StorageError: the PNG is damaged.
    """
    values_HW = np.asarray(read_png(data)).astype(np.float64)
    return (low + values_HW / MAX_GREY * (high - low)).astype(np.float32)


def read_png(data: bytes) -> Image.Image:
    """Opens a stored heatmap.

    Raises:
        StorageError: it is not a complete PNG, or has more than `MAX_PIXELS`.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} px are more than any heatmap has")
        picture.load()
    except Exception as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise StorageError(f"a heatmap cannot be read as PNG ({reason}).") from None
    return picture


def encoded_png(picture: Image.Image) -> bytes:
    """Encodes a picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
