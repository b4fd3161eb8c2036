"""Images given in Python: arrays, pictures, paths and URIs, as members that are read when they are needed.

Arrays and pictures become uncompressed PPM bytes, so that they pass the decoder of archives and meet the same rules.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from raydetect.archives.base import key_of
from raydetect.errors import MemberError, RaydetectError, SpecError, StorageError
from raydetect.records import OK, Member
from raydetect.spec import FIT_CHUNK_IMAGES, SourceSpec
from raydetect.storage import Storage, normalise_uri
from raydetect.worker.bands import whole
from raydetect.worker.exif import upright
from raydetect.worker.opening import DecodeRules, depth_of
from raydetect.worker.preprocess import Pixels, decode_all

KINDS = "an array (N, H, W, 3) or (N, H, W) of uint8, or a list of such images, of paths, URIs or PIL pictures"
NAMED = 10
RULES = DecodeRules.of(SourceSpec(uri=""))
NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class BadImagesError(RaydetectError):
    """Images that cannot be used. A notebook has no rows with a status, so all of them are named at once.

    Attributes:
        bad: (position, key, sentence) of every one.
    """

    def __init__(self, bad: list[tuple[int, str, str]], total: int) -> None:
        """Names the first ones in the message."""
        self.bad = bad
        named = " ".join(f"[{position}] {sentence}" for position, _, sentence in bad[:NAMED])
        more = f" And {len(bad) - NAMED} more: see `bad` of this error." if len(bad) > NAMED else ""
        super().__init__(f"{len(bad)} of {total} images cannot be used: {named}{more} Leave them out or mend them.")


@dataclass(frozen=True, slots=True)
class GivenImage:
    """One image as it was given.

    Attributes:
        key: `<folder>#<name>` of a path or URI, as a job has it; `array#000012` of what has a position only.
        content: uint8 array (H, W, 3) or (H, W), picture, or URI.
        label: 0 normal, 1 anomalous, None unknown.
    """

    key: str
    content: "np.ndarray | Image.Image | str"
    label: int | None = None

    def member(self, storage: Storage) -> Member:
        """Its encoded bytes, or the reason why there are none.

        Raises:
            StorageError: the storage itself cannot be reached.
        """
        uri = self.content if isinstance(self.content, str) else self.key
        try:
            return Member(self.key, uri, data=self._encoded(storage), label=self.label)
        except MemberError as error:
            return Member(self.key, uri, status=error.status, error=f"{self.key}: {error}")
        except StorageError as error:
            if isinstance(error.__cause__, NOT_THERE):
                return Member(self.key, uri, status="empty", error=str(error))
            raise

    def _encoded(self, storage: Storage) -> bytes:
        if isinstance(self.content, str):
            return storage.read(self.content)
        if isinstance(self.content, np.ndarray):
            return _ppm(self.content)
        try:
            return _ppm(np.asarray(whole(upright(self.content), depth_of(self.content), 1), dtype=np.uint8))
        except MemberError:
            raise
        except Exception as error:  # a picture opened from a file is decoded here
            raise MemberError("corrupt", f"the picture cannot be decoded ({error}).") from None


def given_images(images: Any, y: Any = None) -> list[GivenImage]:
    """One entry for each image, in order. Cheap: no file is opened, no pixel copied.

    Args:
        images: see `KINDS`.
        y: labels 0 and 1, as many as images; none = unknown.

    Raises:
        SpecError: they are something else, or none; says what to do.
    """
    found = [_given(item, position) for position, item in enumerate(_items(images))]
    if not found:
        raise SpecError(f"images: is empty. Give {KINDS}.")
    if y is None:
        return found
    return [GivenImage(f.key, f.content, label) for f, label in zip(found, _labels(y, len(found)), strict=True)]


def refuse_doubles(given: Iterable[GivenImage]) -> None:
    """An image that is given twice would count once in a fit.

    Raises:
        SpecError: one is; names it.
    """
    seen: set[str] = set()
    for image in given:
        if image.key in seen:
            raise SpecError(f"images: {image.key} is given twice. Give every image once.")
        seen.add(image.key)


def decode_given(
    given: list[GivenImage], image_size: tuple[int, int], storage: Storage, threads: int
) -> Iterator[tuple[GivenImage, Pixels]]:
    """Pixels of every image, in order, at (height, width) `image_size`; nothing more is yielded after a bad one.

    Raises:
        BadImagesError: after the last image, when some are bad.
        StorageError: the storage itself cannot be reached.
    """
    bad: list[tuple[int, str, str]] = []
    for start in range(0, len(given), FIT_CHUNK_IMAGES):
        part = given[start : start + FIT_CHUNK_IMAGES]
        members = [image.member(storage) for image in part]
        for i, pixels in enumerate(decode_all(members, RULES, image_size, threads)):
            if pixels.status != OK:
                bad.append((start + i, part[i].key, pixels.error))
            elif not bad:
                yield part[i], pixels
    if bad:
        raise BadImagesError(bad, len(given))


def _items(images: Any) -> list[Any]:
    if isinstance(images, str | bytes | os.PathLike):
        raise SpecError(f"images: is one path, {str(images)!r}. Give a list, such as sorted(glob('normal/*.png')).")
    if isinstance(images, Image.Image):
        raise SpecError("images: is one picture. Give a list: [picture].")
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OUT":
        return _array_items(images)
    try:
        return list(images)
    except TypeError:
        raise SpecError(f"images: is of type {type(images).__name__}. Give {KINDS}.") from None


def _array_items(images: np.ndarray) -> list[Any]:
    shape = images.shape
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 3):
        raise SpecError(f"images: has the shape {shape} of one image. Give images[None].")
    if len(shape) == 4 and shape[3] != 3 and shape[1] == 3:
        raise SpecError(f"images: has shape {shape}, colours first. Give images.transpose(0, 2, 3, 1).")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3):
        raise SpecError(f"images: has shape {shape}. Give (N, H, W, 3) or (N, H, W).")
    if images.dtype != np.uint8:
        raise SpecError(f"images: {_not_uint8(images)}")
    return list(images)


def _given(item: Any, position: int) -> GivenImage:
    where = f"images[{position}]"
    if isinstance(item, str | os.PathLike):
        uri = normalise_uri(os.fspath(item))
        folder, _, name = uri.rpartition("/")
        return GivenImage(key_of(folder, name), uri)
    key = f"array#{position:06d}"
    if isinstance(item, Image.Image):
        return GivenImage(key, item)
    if not isinstance(item, np.ndarray):
        raise SpecError(f"{where}: is of type {type(item).__name__}. Give {KINDS}.")
    if item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] != 3) or 0 in item.shape:
        raise SpecError(f"{where}: has shape {item.shape}. Give (H, W, 3) or (H, W), at least 1 x 1 px.")
    if item.dtype != np.uint8:
        raise SpecError(f"{where}: {_not_uint8(item)}")
    return GivenImage(key, item)


def _not_uint8(array: np.ndarray) -> str:
    if array.dtype.kind == "f":
        return f"holds {array.dtype}. Give uint8: (255 * images).round().astype('uint8') if they lie in [0, 1]."
    return f"holds {array.dtype}. Give uint8 in [0, 255]; 16-bit files can be given by their paths."


def _labels(y: Any, count: int) -> list[int]:
    labels = np.asarray(y)
    if labels.shape != (count,):
        raise SpecError(f"y: has shape {labels.shape}. Give one label for each of the {count} images.")
    strange = [value for value in labels.tolist() if value not in (0, 1)]
    if strange:
        raise SpecError(f"y: holds {strange[0]!r}. Give 0 for normal and 1 for anomalous images.")
    return [int(value) for value in labels.tolist()]


def _ppm(pixels: np.ndarray) -> bytes:
    """Binary PPM (colour) or PGM (grey)."""
    height, width = pixels.shape[:2]
    kind = b"P6" if pixels.ndim == 3 else b"P5"
    return b"%s %d %d 255\n" % (kind, width, height) + np.ascontiguousarray(pixels).tobytes()
