"""Opens TIFF, JPEG 2000 and PNG in memory with rasterio, which is optional, and keeps GDAL to the bytes it was given.

Only the driver of the format may open the bytes. GDAL looks for no other files and writes none; its cache of decoded
blocks is bounded for the whole process.
"""

import importlib
import importlib.util
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from raydetect.errors import MemberError
from raydetect.images import tiff
from raydetect.images.png import PNG_START

# Of decoded blocks in a process. Windows side by side share whole strips, but only the tiles at their edges.
CACHE_BYTES, TILES_CACHE_BYTES = 64 << 20, 24 << 20
OPTIONS = {
    "GDAL_CACHEMAX": CACHE_BYTES,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "NONE",
    "GDAL_NUM_THREADS": "1",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": "{none}",
    "CPL_CURL_ENABLE_VSIMEM": "NO",
    "PROJ_NETWORK": "OFF",
}
INSTALL = "pip install 'raydetect[rasters]'"
JP2_STARTS = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
NAME = "image"


def is_jpeg2000(data: bytes) -> bool:
    """Whether data start as a JPEG 2000 file or codestream."""
    return data.startswith(JP2_STARTS)


def is_installed() -> bool:
    """Whether rasterio can be imported."""
    return importlib.util.find_spec("rasterio") is not None


@contextmanager
def opened_dataset(data: bytes, level: int | None = None) -> Iterator[Any]:
    """Opens the first picture of a TIFF, JPEG 2000 or PNG, without a copy of the bytes.

    Args:
        data: the file.
        level: number of the overview to open; None = the picture itself.

    Raises:
        MemberError: unsupported_mode (rasterio is missing), corrupt.
    """
    library = _library()
    extra = {} if level is None else {"overview_level": level}
    driver = "GTiff" if tiff.is_tiff(data) else "PNG" if data.startswith(PNG_START) else "JP2OpenJPEG"
    file = library.io.MemoryFile(data, filename=NAME)
    try:
        try:
            with library.Env(**OPTIONS):  # never held while others run in this thread
                dataset = library.open(file.name, driver=driver, sharing=False, **extra)
        except Exception as error:
            raise damaged(error) from None
        try:
            yield dataset
        finally:
            dataset.close()
    finally:
        file.close()


def read_window(dataset: Any, bands: tuple[int, ...], box: tuple[int, int, int, int]) -> Any:
    """Reads raw values of a box (left, upper, right, lower) in stored px, of shape (C, H, W) in the file's type.

    Raises:
        MemberError: corrupt, also if libjpeg warns.
    """
    library, seen = _library(), _listener().seen
    left, upper, right, lower = box
    window = library.windows.Window(left, upper, right - left, lower - upper)
    seen.text = ""
    try:
        with library.Env(**(OPTIONS | {"GDAL_CACHEMAX": _cache_bytes(dataset)})):
            values_CHW = dataset.read(list(bands), window=window)
    except Exception as error:
        raise damaged(error) from None
    if seen.text:
        raise MemberError("corrupt", f"its pixels cannot be decoded ({seen.text}).")
    return values_CHW


def _cache_bytes(dataset: Any) -> int:
    """Bytes of the cache that suit the blocks of a dataset; GDAL changes its limit at once."""
    return TILES_CACHE_BYTES if dataset.block_shapes[0][1] < dataset.width else CACHE_BYTES


def damaged(error: Exception) -> MemberError:
    """The status of a file that GDAL cannot read; its message names no temporary path, so that it never varies."""
    text = " ".join(str(error.__cause__ or error).split())
    words = [NAME if word.startswith(("/vsimem/", "'/vsimem/")) else word for word in text.split(" ")]
    return MemberError("corrupt", f"its pixels cannot be decoded ({' '.join(words)[:160]}).")


def missing(what: str) -> MemberError:
    """The status of a file that needs rasterio where it is not installed."""
    return MemberError("unsupported_mode", f"{what} needs rasterio on every worker. Install it: {INSTALL}.")


@cache
def _library() -> Any:
    if not is_installed():
        raise missing("reading it")
    library = importlib.import_module("rasterio")
    for name in ("io", "windows"):
        importlib.import_module(f"rasterio.{name}")
    errors = importlib.import_module("rasterio.errors")
    warnings.filterwarnings("ignore", category=errors.NotGeoreferencedWarning)
    return library


class _Seen(threading.local):
    """The last warning of libjpeg in this thread."""

    text = ""


class _Listener(logging.Handler):
    """Notes warnings of libjpeg, which GDAL only logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen = _Seen()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "JPEGLib:" in text:
            self.seen.text = text.rpartition("JPEGLib:")[2].strip()[:160]


@cache
def _listener() -> _Listener:
    listener = _Listener()
    logging.getLogger("rasterio._err").addHandler(listener)
    return listener
