"""Folders and archives as people have them, from which the first job files are made."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.builders.archives import mixed_files, normal_files, tar_bytes
from tests.builders.images import defect_image, encode, normal_image


def write(folder: Path, files: list[tuple[str, bytes]]) -> Path:
    """Writes files below a folder."""
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def picture(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image file of pixels in uint8 or uint16."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def flat(folder: Path) -> Path:
    """Good images without folders."""
    return write(folder, [(f"{i:03d}.png", encode(normal_image(i))) for i in range(8)])


def good_and_bad(folder: Path) -> Path:
    """`good/` and `ng/`."""
    files = [(f"good/{i:03d}.png", encode(normal_image(i))) for i in range(8)]
    return write(folder, files + [(f"ng/{i:03d}.png", encode(defect_image(i, "spot")[0])) for i in range(3)])


def beside_bad(folder: Path) -> Path:
    """Good images beside the folder of bad ones."""
    files = [(f"{i:03d}.png", encode(normal_image(i))) for i in range(8)]
    return write(folder, [*files, ("defects/a.png", encode(defect_image(0, "spot")[0]))])


def mvtec(folder: Path) -> Path:
    """The layout of MVTec AD, two categories with masks."""
    files = normal_files(6) + mixed_files(2, 1)
    return write(folder, files + [(name.replace("widget", "gadget", 1), data) for name, data in files])


def one_category(folder: Path) -> Path:
    """The folder of one category of MVTec AD."""
    files = normal_files(6) + mixed_files(2, 1)
    return write(folder, [(name.partition("/")[2], data) for name, data in files])


def products(folder: Path) -> Path:
    """`PRODUCT/ok/` and `PRODUCT/nok/`."""
    good = [(f"{p}/ok/{i}.png", encode(normal_image(i))) for p in ("lid", "cup") for i in range(6)]
    return write(folder, good + [(f"{p}/nok/0.png", encode(defect_image(0, "spot")[0])) for p in ("lid", "cup")])


def tars(folder: Path) -> Path:
    """Two tar files in the layout of MVTec AD."""
    files = normal_files(6) + mixed_files(2, 1)
    return write(folder, [("a.tar", tar_bytes(files[:6])), ("b.tar", tar_bytes(files[6:]))])


def parquet(folder: Path) -> Path:
    """A Parquet file with a column of labels."""
    images = [data for _, data in normal_files(8)] + [encode(defect_image(0, "spot")[0])]
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": [0] * 8 + [1]}), folder / "day.parquet")
    return folder


def large(folder: Path) -> Path:
    """Pictures of 1400 x 1100 px."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(100, 140, (1100, 1400, 3), np.uint8) for _ in range(3)]
    return write(folder, [(f"{i}.jpg", picture(one, "JPEG")) for i, one in enumerate(pixels)])


def oblong(folder: Path) -> Path:
    """Pictures of 300 x 100 px."""
    rng = np.random.default_rng(0)
    return write(folder, [(f"{i}.png", picture(rng.integers(0, 255, (100, 300, 3), np.uint8))) for i in range(6)])


def twelve_bits(folder: Path) -> Path:
    """Grey pictures of 12 bits in files of 16."""
    rng = np.random.default_rng(0)
    return write(folder, [(f"{i}.png", picture(rng.integers(0, 4000, (128, 128), np.uint16))) for i in range(6)])


def grey(folder: Path) -> Path:
    """Grey pictures of 8 bits."""
    return write(folder, [(f"{i}.png", picture(normal_image(i)[..., 0])) for i in range(6)])


def one_broken(folder: Path) -> Path:
    """Good images, of which one of forty is cut off."""
    whole = [encode(normal_image(i)) for i in range(40)]
    return write(folder, [(f"{i:02d}.png", data[: len(data) // 2] if i == 5 else data) for i, data in enumerate(whole)])


SOURCES: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (
        flat, good_and_bad, beside_bad, mvtec, one_category, products, tars, parquet, large, oblong, twelve_bits, grey,
        one_broken,
    )
}  # fmt: skip
