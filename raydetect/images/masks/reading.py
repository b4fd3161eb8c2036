"""Reads the masks of images by URI, sampled where the map or the input of the image is."""

from typing import Any

import fsspec
import numpy as np

from raydetect.errors import MemberError, RaydetectError, StorageError
from raydetect.images.decode import Pixels
from raydetect.images.masks.decoding import sampled_mask
from raydetect.images.opening import DecodeRules
from raydetect.records import Member
from raydetect.storage import Storage, translate
from raydetect.views.view import Layout


class MaskError(RaydetectError):
    """A mask is missing, is not an image, or differs in shape from its image."""


class Masks:
    """Reads masks by URI; consecutive masks from the same archive open it only once."""

    def __init__(self, storage: Storage, rules: DecodeRules, max_bytes: int) -> None:
        """Creates a reader; nothing is opened yet.

        Args:
            storage: gives access to the masks.
            rules: decoding rules of the images, which apply to their masks too.
            max_bytes: of one encoded mask; larger ones are not read.
        """
        self.rules, self._max_bytes = rules, max_bytes
        self._storage, self._container = storage, ""
        self._archive: Any = None

    def read(self, uri: str) -> bytes:
        """The encoded mask.

        Raises:
            StorageError: it cannot be read, or is too large.
        """
        data = self._read(uri)
        if len(data) > self._max_bytes:
            raise StorageError(f"{uri}: has more than source.max_image_bytes = {self._max_bytes:,} bytes.")
        return data

    def _read(self, uri: str) -> bytes:
        """The encoded mask, or one byte more of it than is allowed."""
        member, _, container = uri.partition("::")
        if not container:
            with self._storage.open(uri) as handle:
                return handle.read(self._max_bytes + 1)
        try:
            if container != self._container:
                scheme = container.partition("://")[0]
                options = {scheme: self._storage.fsspec_options(container)}
                self._archive, _ = fsspec.core.url_to_fs(uri, **options)
                self._container = container
            with self._archive.open(member.partition("://")[2], "rb") as handle:
                return bytes(handle.read(self._max_bytes + 1))
        except Exception as error:
            raise translate(uri, "read", error) from error


def read_mask(member: Member, layout: Layout, pixels: Pixels, masks: Masks) -> np.ndarray | None:
    """The mask of an image where its map is, bool (H, W); all False for a normal image, None if unknown.

    `decoding.py` defines which levels are a defect, and the orientation of the mask.

    Raises:
        MaskError: it cannot be read, or differs in shape from the image.
    """
    if member.label == 0:
        return np.zeros(layout.canvas, bool)
    if member.mask_uri is None:
        return None
    try:
        data = masks.read(member.mask_uri)
        mask_HW, size = sampled_mask(data, pixels, masks.rules, layout.canvas, layout.box)
    except (StorageError, MemberError) as error:
        message = f"{member.key}: its mask {member.mask_uri} cannot be read ({error}). Repair or remove it."
        raise MaskError(message) from None
    if size != (pixels.width, pixels.height):
        raise MaskError(
            f"{member.key}: is {pixels.width} x {pixels.height} px and its mask {size[0]} x {size[1]}. "
            "Provide a mask of the image's size."
        )
    if layout.looked is not None:
        mask_HW = mask_HW & layout.looked
    return mask_HW if mask_HW.any() else None
