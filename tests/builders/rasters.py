"""Makers of rasters: TIFF in every layout, large ones written tile by tile, and JPEG 2000."""

from typing import Any

import numpy as np
import rasterio
from rasterio.io import MemoryFile
from rasterio.windows import Window

from raydetect.images.tiff import ORIENTATION, Reader

TILE = 256
DEFECT_PX = 400


def raster(values: np.ndarray, driver: str = "GTiff", **options: Any) -> bytes:
    """Encodes values (H, W) or (H, W, C) with GDAL's creation options; `overviews=[2, 4]` adds some."""
    values_HWC = values if values.ndim == 3 else values[..., None]
    height, width, count = values_HWC.shape
    overviews = options.pop("overviews", [])
    with MemoryFile() as file:
        size = {"height": height, "width": width, "count": count, "dtype": values.dtype}
        with file.open(driver=driver, **size, **options) as dataset:
            dataset.write(np.moveaxis(values_HWC, -1, 0))
            if overviews:
                dataset.build_overviews(overviews)
        file.seek(0)
        data: bytes = file.read()
    return data


def turned(data: bytes, orientation: int) -> bytes:
    """Sets the orientation of a TIFF, whose writer must have left a tag to replace."""
    reader = Reader(data)
    page = reader.directory(reader.start)
    assert ORIENTATION in page.value_offsets
    offset = page.value_offsets[ORIENTATION]
    return data[:offset] + orientation.to_bytes(2, "little" if reader.order == "<" else "big") + data[offset + 2 :]


def large_raster(path: str, side: int, defects: tuple[tuple[int, int], ...] = (), seed: int = 0) -> None:
    """Writes a tiled, compressed 8-bit colour GeoTIFF of a woven texture; a defect is a bright square at (x, y)."""
    random = np.random.default_rng(seed)
    block_HW = random.integers(0, 24, (TILE // 4, TILE // 4)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    y, x = np.mgrid[0:TILE, 0:TILE]
    weave_HW = (90 + 40 * ((x // 32 + y // 32) % 2)).astype(np.uint8)
    tile_CHW = np.stack([weave_HW + block_HW, weave_HW, weave_HW - block_HW])
    with rasterio.open(path, "w", **_profile(side, 3)) as dataset:
        for top in range(0, side, TILE):
            for left in range(0, side, TILE):
                height, width = min(TILE, side - top), min(TILE, side - left)
                part_CHW = tile_CHW[:, :height, :width].copy()
                for at_x, at_y in defects:
                    inside_x, inside_y = max(0, at_x - left), max(0, at_y - top)
                    end_x, end_y = max(0, at_x + DEFECT_PX - left), max(0, at_y + DEFECT_PX - top)
                    part_CHW[:, inside_y:end_y, inside_x:end_x] = 250
                dataset.write(part_CHW, window=Window(left, top, width, height))


def large_mask(path: str, side: int, defects: tuple[tuple[int, int], ...]) -> None:
    """Writes the mask of `large_raster`: one bit per px."""
    profile = {**_profile(side, 1), "photometric": "MINISBLACK", "nbits": 1}
    with rasterio.open(path, "w", **profile) as dataset:
        for x, y in defects:
            ones_CHW = np.ones((1, min(DEFECT_PX, side - y), min(DEFECT_PX, side - x)), np.uint8)
            dataset.write(ones_CHW, window=Window(x, y, ones_CHW.shape[2], ones_CHW.shape[1]))


def _profile(side: int, count: int) -> dict[str, Any]:
    return {
        "driver": "GTiff", "height": side, "width": side, "count": count, "dtype": "uint8", "tiled": True,
        "blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "zlevel": 1, "photometric": "RGB",
        "crs": None, "BIGTIFF": "IF_SAFER",
    }  # fmt: skip
