"""Images given in Python (arrays, PIL images, paths, URIs), turned into members that are read on demand.

Arrays and PIL images are encoded as uncompressed PPM, so they go through the same decoder and rules as archives.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from raydetect.archives.base import key_of
from raydetect.archives.formats.loose_files import loose_names
from raydetect.archives.open import open_archive
from raydetect.config import FIT_CHUNK_IMAGES, STRETCH, SourceSpec, ViewSpec
from raydetect.errors import MemberError, RaydetectError, SpecError, StorageError
from raydetect.images.bit_depth import SIXTEEN_BIT
from raydetect.images.decode import DecodePool, Pixels, decode_stream
from raydetect.images.opening import DecodeRules, depth_of
from raydetect.images.orientation import upright
from raydetect.images.preprocess import Preprocess
from raydetect.images.resize import to_rgb
from raydetect.left_out import left_out_text
from raydetect.python_api.caller_warnings import warn
from raydetect.records import OK, Member
from raydetect.storage import Storage, join_uri, normalise_uri
from raydetect.views.windows import Input

KINDS = (
    "an array (N, H, W, 3) or (N, H, W) of uint8, a list of such images, of paths, URIs or PIL images, or a folder or "
    "glob of image files"
)
NAMED = 10
RULES = DecodeRules.of(SourceSpec(uri=""))
NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class BadImagesError(RaydetectError):
    """Images that cannot be used. A notebook has no rows with a status, so one error lists all of them.

    Attributes:
        bad: (position, key, message) of each.
    """

    def __init__(self, bad: list[tuple[int, str, str]], total: int) -> None:
        """Creates the error; its message lists the first bad images."""
        self.bad = bad
        first = " ".join(f"[{position}] {message}" for position, _, message in bad[:NAMED])
        more = f" And {len(bad) - NAMED} more: see `bad` of this error." if len(bad) > NAMED else ""
        super().__init__(f"{len(bad)} of {total} images cannot be used: {first}{more} Remove or repair them.")


@dataclass(frozen=True, slots=True)
class InputImage:
    """One image as passed by the caller.

    Attributes:
        key: `<folder>#<name>` for a path or URI, as in a job; `array#000012` (the position) for anything else.
        content: uint8 array (H, W, 3) or (H, W), PIL image, or URI.
        label: 0 normal, 1 anomalous, None unknown.
    """

    key: str
    content: "np.ndarray | Image.Image | str"
    label: int | None = None

    def member(self, storage: Storage, spec: ViewSpec = STRETCH) -> Member:
        """Encodes the image as a member; one that cannot be encoded gets a status and the reason.

        Args:
            storage: for paths and URIs.
            spec: the view that looks at it.

        Raises:
            StorageError: the storage itself cannot be reached.
        """
        uri = self.content if isinstance(self.content, str) else self.key
        try:
            return Member(self.key, uri, data=self._encoded(storage, spec), label=self.label)
        except MemberError as error:
            return Member(self.key, uri, status=error.status, error=f"{self.key}: {error}")
        except StorageError as error:
            if isinstance(error.__cause__, NOT_THERE):
                return Member(self.key, uri, status="empty", error=str(error))
            raise

    def _encoded(self, storage: Storage, spec: ViewSpec) -> bytes:
        if isinstance(self.content, str):
            return storage.read(self.content)
        if isinstance(self.content, np.ndarray):
            return netpbm(self.content)
        if spec.range is not None and self.content.mode in SIXTEEN_BIT:
            raise MemberError(
                "unsupported_mode",
                f"a PIL image of mode {self.content.mode} is made 8-bit before view.range is applied. Give its path.",
            )
        try:
            return netpbm(np.asarray(to_rgb(upright(self.content), depth_of(self.content), 1), dtype=np.uint8))
        except MemberError:
            raise
        except Exception as error:  # a PIL image opened from a file is decoded here
            raise MemberError("corrupt", f"the image cannot be decoded ({error}).") from None


def as_input_images(images: Any, storage: Storage, y: Any = None) -> list[InputImage]:
    """Lists the images in order, one entry each. Cheap: opens no file and copies no pixels.

    Files of a folder or glob that are no images are left out, as in a job, which a warning says.

    Args:
        images: see `KINDS`.
        storage: for a folder or glob.
        y: labels 0 and 1, one for each image; None = unknown.

    Raises:
        SpecError: the images or labels are invalid, or there are none; the message says what to do.
    """
    found = [_given(item, position) for position, item in enumerate(_items(images, storage))]
    if not found:
        raise SpecError(f"images: is empty. Give {KINDS}.")
    if y is None:
        return found
    return [InputImage(f.key, f.content, label) for f, label in zip(found, _labels(y, len(found)), strict=True)]


def refuse_duplicates(inputs: Iterable[InputImage]) -> None:
    """Refuses an image that is given twice, as it would count only once in a fit.

    Raises:
        SpecError: an image is given twice; the message names it.
    """
    seen: set[str] = set()
    for image in inputs:
        if image.key in seen:
            raise SpecError(f"images: {image.key} is given twice. Give every image once.")
        seen.add(image.key)


def decode_inputs(
    inputs: list[InputImage], preprocess: Preprocess, storage: Storage, threads: int
) -> Iterator[Input | Pixels]:
    """Yields the inputs and then the `Pixels` of every image in order, up to the first bad image.

    Raises:
        BadImagesError: after the last image, if some are bad.
        StorageError: the storage itself cannot be reached.
    """
    bad: list[tuple[int, str, str]] = []
    with DecodePool(threads) as pool:
        for position, item in _decoded(inputs, preprocess, storage, pool):
            if isinstance(item, Pixels) and item.status != OK:
                bad.append((position, inputs[position].key, item.error))
            elif not bad:
                yield item
    if bad:
        raise BadImagesError(bad, len(inputs))


def _decoded(
    inputs: list[InputImage], preprocess: Preprocess, storage: Storage, pool: DecodePool
) -> Iterator[tuple[int, Input | Pixels]]:
    position = 0
    for start in range(0, len(inputs), FIT_CHUNK_IMAGES):
        part = inputs[start : start + FIT_CHUNK_IMAGES]
        members = [image.member(storage, preprocess.view.spec) for image in part]
        for item in decode_stream(members, RULES, preprocess, pool):
            yield position, item
            position += isinstance(item, Pixels)


def _items(images: Any, storage: Storage) -> list[Any]:
    if isinstance(images, str | os.PathLike):
        return _listed(os.fspath(images), storage)
    if isinstance(images, bytes):
        raise SpecError(f"images: is of type bytes. Give {KINDS}.")
    if isinstance(images, Image.Image):
        raise SpecError("images: is a single PIL image. Give a list: [image].")
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OUT":
        return _array_items(images)
    try:
        return list(images)
    except TypeError:
        raise SpecError(f"images: is of type {type(images).__name__}. Give {KINDS}.") from None


def _listed(uri: str, storage: Storage) -> list[str]:
    """The URIs of the images in a folder or of a glob, sorted.

    Raises:
        SpecError: it holds archives.
        StorageError: it does not exist, or cannot be listed.
    """
    shards = open_archive(SourceSpec(uri=uri), storage).listing().shards
    archives = [shard for shard in shards if shard.format != "prefix"]
    if archives:
        raise SpecError(
            f"images: {uri} holds archives, such as {archives[0].uri}, which only jobs read. Use `raydetect fit` and "
            "`raydetect score`, or unpack them."
        )
    left_out = left_out_text(shards[0].left_out) if shards else ""
    if left_out:
        warn(f"images: {uri}: left out {left_out}")
    return [join_uri(shard.uri, name) for shard in shards for name in loose_names(shard)]


def _array_items(images: np.ndarray) -> list[Any]:
    shape = images.shape
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 3):
        raise SpecError(f"images: has shape {shape}, that of a single image. Give images[None].")
    if len(shape) == 4 and shape[3] != 3 and shape[1] == 3:
        raise SpecError(f"images: has shape {shape}, channels first. Give images.transpose(0, 2, 3, 1).")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3):
        raise SpecError(f"images: has shape {shape}. Give (N, H, W, 3) or (N, H, W).")
    if images.dtype != np.uint8:
        raise SpecError(f"images: {_not_uint8(images)}")
    return list(images)


def _given(item: Any, position: int) -> InputImage:
    where = f"images[{position}]"
    if isinstance(item, str | os.PathLike):
        uri = normalise_uri(os.fspath(item))
        folder, _, name = uri.rpartition("/")
        return InputImage(key_of(folder, name), uri)
    key = f"array#{position:06d}"
    if isinstance(item, Image.Image):
        return InputImage(key, item)
    if not isinstance(item, np.ndarray):
        raise SpecError(f"{where}: is of type {type(item).__name__}. Give {KINDS}.")
    if item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] != 3) or 0 in item.shape:
        raise SpecError(f"{where}: has shape {item.shape}. Give (H, W, 3) or (H, W), at least 1 x 1 px.")
    if item.dtype != np.uint8:
        raise SpecError(f"{where}: {_not_uint8(item)}")
    return InputImage(key, item)


def _not_uint8(array: np.ndarray) -> str:
    if array.dtype.kind == "f":
        return f"holds {array.dtype}. Give uint8: (255 * images).round().astype('uint8') if they lie in [0, 1]."
    return f"holds {array.dtype}. Give uint8 in [0, 255]; 16-bit files can be given by their paths."


def _labels(y: Any, count: int) -> list[int]:
    labels = np.asarray(y)
    if labels.shape != (count,):
        raise SpecError(f"y: has shape {labels.shape}. Give one label for each of the {count} images.")
    invalid = [value for value in labels.tolist() if value not in (0, 1)]
    if invalid:
        raise SpecError(f"y: holds {invalid[0]!r}. Give 0 for normal and 1 for anomalous images.")
    return [int(value) for value in labels.tolist()]


def netpbm(pixels: np.ndarray) -> bytes:
    """Encodes pixels as binary PPM (colour) or PGM (grey)."""
    height, width = pixels.shape[:2]
    kind = b"P6" if pixels.ndim == 3 else b"P5"
    return b"%s %d %d 255\n" % (kind, width, height) + np.ascontiguousarray(pixels).tobytes()
