"""Small generated images: a textured normal part, and the same part with planted defects and their masks."""

import io

import numpy as np
from PIL import Image

DEFECTS = ("scratch", "blob", "spot")
SIZE_PX = 96


def normal_image(number: int, size_px: int = SIZE_PX) -> np.ndarray:
    """A round part on a woven background with small variations in light, position and noise; uint8 RGB."""
    random = np.random.default_rng([11, number])
    rows, columns = np.mgrid[:size_px, :size_px].astype(np.float64)
    row, column = size_px / 2 + random.uniform(-2, 2, size=2)
    distance = np.hypot(rows - row, columns - column) / size_px
    weave = 10 * np.sin(rows * 0.9) * np.sin(columns * 0.9)
    part = np.where(distance < 0.36, 150 + 30 * np.cos(distance * 22), 70 + weave)
    grey = part * random.uniform(0.94, 1.06) + random.normal(0, 3, size=(size_px, size_px))
    tint = np.array([1.0, 0.93, 0.82])
    return np.clip(grey[..., None] * tint, 0, 255).astype(np.uint8)


def defect_mask(number: int, defect: str, size_px: int = SIZE_PX) -> np.ndarray:
    """The mask of an image's defect; bool."""
    random = np.random.default_rng([13, number, DEFECTS.index(defect)])
    rows, columns = np.mgrid[:size_px, :size_px].astype(np.float64)
    row, column = size_px / 2 + random.uniform(-0.2, 0.2, size=2) * size_px
    if defect == "scratch":
        angle = random.uniform(0, np.pi)
        along = (rows - row) * np.sin(angle) + (columns - column) * np.cos(angle)
        across = (rows - row) * np.cos(angle) - (columns - column) * np.sin(angle)
        return (np.abs(along) < 0.2 * size_px) & (np.abs(across) < 2.0)
    if defect == "blob":
        return ((rows - row) / 1.4) ** 2 + (columns - column) ** 2 < (0.08 * size_px) ** 2
    return np.maximum(np.abs(rows - row), np.abs(columns - column)) < 0.05 * size_px


def defect_image(number: int, defect: str, size_px: int = SIZE_PX) -> tuple[np.ndarray, np.ndarray]:
    """A part with one planted defect, and its mask."""
    image = normal_image(10_000 + number, size_px).astype(np.int64)
    mask = defect_mask(number, defect, size_px)
    colour = {"scratch": (245, 240, 235), "blob": (25, 20, 30), "spot": (200, 60, 40)}[defect]
    image[mask] = (image[mask] + 4 * np.array(colour)) // 5
    return np.clip(image, 0, 255).astype(np.uint8), mask


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    """Encodes an image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()
