"""Caches the decoded images of one worker on its local disk, so that the archive is read and decoded once."""

import copy
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch

from raydetect.blocks.coresets.group import Group
from raydetect.detectors._base import Batch
from raydetect.images.decode import Pixels
from raydetect.images.preprocess import Preprocess
from raydetect.records import OK, Member
from raydetect.storage import Scratch
from raydetect.views.align import NOT_MOVED, Shift
from raydetect.views.view import Layout, Window
from raydetect.views.windows import Input

SHARED_PER_BROADCAST = 64


@dataclass(frozen=True, slots=True)
class CachedImage:
    """Metadata of a cached input: an image, or a tile of one.

    Attributes:
        key: the image's key, with row and column if the view has tiles; it seeds all randomness.
        label: of the image.
        category: of the image.
        image: the image's key; "" = `key`.
        size: (width, height) in px of the upright image; (0, 0) = that of the input.
        row: of the tile; 0 without tiles.
        column: likewise.
        shift: of the layout of its picture.
    """

    key: str
    label: int | None
    category: str | None
    image: str = ""
    size: tuple[int, int] = (0, 0)
    row: int = 0
    column: int = 0
    shift: Shift = NOT_MOVED

    @property
    def image_key(self) -> str:
        """The key of the image, which its tiles share."""
        return self.image or self.key


class ImageCache:
    """Uint8 RGB inputs of one size by key, in insertion order, in an unnamed file that is deleted with the cache.

    An image has one input, or with tiles several; its tiles are next to each other.

    Attributes:
        preprocess: how the images were decoded, which is what the artifact records.
        has_masks: whether the pixels of defects are kept too.
        is_shared: whether it has the images of all workers.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        of_category: Callable[[str], Preprocess] | None = None,
        has_masks: bool = False,
    ) -> None:
        """Creates an empty cache for images decoded by these rules; categories may have regions of their own."""
        self.preprocess = preprocess
        self._preprocess_of = of_category or (lambda _: preprocess)
        self.has_masks, self.is_shared = has_masks, False
        self.shape = (*preprocess.image_size, 3)
        self._stored = (*preprocess.image_size, 3 + has_masks)
        self.images: dict[str, CachedImage] = {}
        self._rows: dict[str, int] = {}
        self._bytes = int(np.prod(self._stored))
        self._file = Scratch("decoded images")

    def __len__(self) -> int:
        return len(self.images)

    def categories(self) -> dict[str, str | None]:
        """The category of each image by its key."""
        return {image.image_key: image.category for image in self.images.values()}

    def add(self, image: CachedImage, pixels_HWC: np.ndarray) -> None:
        """Adds an image, with its mask as a fourth channel if masks are kept; does nothing if its key exists.

        Raises:
            StorageError: the temporary folder is full.
        """
        if image.key not in self._rows:
            row = len(self._rows)
            self._file.write_at(row * self._bytes, np.ascontiguousarray(pixels_HWC).data)
            self._rows[image.key] = row
        self.images.setdefault(image.key, image)

    def forget(self, keys: Collection[str]) -> None:
        """Removes inputs from the cache."""
        for key in keys:
            del self.images[key]

    def add_decoded(self, member: Member, decoded: Iterator[Input | Pixels]) -> Pixels:
        """Adds the inputs of the next image of `decoded`, all or none; returns its `Pixels`."""
        added: list[str] = []
        for item in decoded:
            if isinstance(item, Pixels):
                if item.status != OK:
                    self.forget(added)
                return item
            image = _cached(member, item, self.preprocess)
            if image.key not in self.images:
                self.add(image, item.image_HWC)
                added.append(image.key)
        raise ValueError("the stream has no further image")

    def decoded(self, image_keys: Sequence[str]) -> Iterator[Input | Pixels]:
        """Yields the inputs of images and their `Pixels`, as `decode_stream` does."""
        inputs: dict[str, list[CachedImage]] = {key: [] for key in image_keys}
        for image in self.images.values():
            if image.image_key in inputs:
                inputs[image.image_key].append(image)
        for images in inputs.values():
            for image in images:
                layout, window = self._shown(image)
                looked_HW = layout.looked_input(window, self.preprocess.image_size)
                yield Input(layout, window, self.pixels([image.key])[0], looked_HW)
            yield Pixels()

    def looked(self, keys: Sequence[str]) -> np.ndarray:
        """Pixels of inputs that are looked at, bool (B, H, W)."""
        looked_BHW = np.ones((len(keys), *self.shape[:2]), bool)
        for i, key in enumerate(keys):
            layout, window = self._shown(self.images[key])
            looked_HW = layout.looked_input(window, self.preprocess.image_size)
            looked_BHW[i] = True if looked_HW is None else looked_HW
        return looked_BHW

    def _shown(self, image: CachedImage) -> tuple[Layout, Window]:
        """The layout of an input's picture, and its window."""
        size = image.size if image.size[0] else self.preprocess.image_size[::-1]
        layout = self.preprocess.layout(size, image.shift)
        return layout, layout.window_at[image.row, image.column]

    def of_category(self, category: str) -> "ImageCache":
        """Returns a view of the images of one category, with the rules by which they were decoded.

        Raises:
            SpecError: the category has no mask although the fit needs one.
        """
        view = copy.copy(self)
        view.preprocess = self._preprocess_of(category)
        view.images = {key: image for key, image in self.images.items() if image.category == category}
        return view

    def add_masked(
        self,
        member: Member,
        decoded: Iterator[Input | Pixels],
        mask_of: Callable[[Member, Layout, Pixels], np.ndarray],
    ) -> Pixels:
        """Adds the only input of the next image of `decoded` and its mask; returns its `Pixels`.

        Args:
            member: the image.
            decoded: what was decoded.
            mask_of: the pixels of defects on the canvas of an image, bool.
        """
        item = next(decoded)
        if isinstance(item, Pixels):
            return item
        pixels = next(decoded)
        assert isinstance(pixels, Pixels)
        if pixels.status == OK:
            left, upper, right, lower = item.window.place
            masked_HWC = np.zeros(self._stored, np.uint8)
            masked_HWC[..., :3] = item.image_HWC
            masked_HWC[upper:lower, left:right, 3] = mask_of(member, item.layout, pixels)
            self.add(_cached(member, item, self.preprocess), masked_HWC)
        return pixels

    def pixels(self, keys: Sequence[str]) -> np.ndarray:
        """Reads the images of `keys` in that order, uint8 of shape (B, H, W, 3)."""
        return self._stored_rows(keys)[..., :3]

    def _stored_rows(self, keys: Sequence[str]) -> np.ndarray:
        rows_BHWC = np.empty((len(keys), *self._stored), dtype=np.uint8)
        for i, key in enumerate(keys):
            self._file.read_at(self._rows[key] * self._bytes, rows_BHWC[i].data)
        return rows_BHWC

    def batch(self, keys: Sequence[str], device: torch.device, epoch: int = 0, draws: Sequence[int] = ()) -> Batch:
        """Reads the images of `keys` in that order as a batch on a device, with their masks if they are kept."""
        stored_BCHW = torch.from_numpy(self._stored_rows(keys)).permute(0, 3, 1, 2).to(device)
        masks_BHW = stored_BCHW[:, 3].bool() if self.has_masks else None
        labels = [self.images[key].label or 0 for key in keys]
        categories = [self.images[key].category for key in keys]
        return Batch(stored_BCHW[:, :3], keys, labels, epoch, draws, masks_BHW, categories)

    def share_all(self, group: Group) -> None:
        """Exchanges images, so that every worker has all of them; does nothing the second time."""
        if not self.is_shared:
            self.share(group, lambda _: True)
            self.is_shared = True

    def share(self, group: Group, wanted: Callable[[CachedImage], bool]) -> None:
        """Exchanges images, so that every worker adds those that it wants of all others; each is broadcast once."""
        mine = list(self.images.values())
        texts = group.gather_bytes(json.dumps([astuple(image) for image in mine]).encode())
        for root, text in enumerate(texts):
            images = [_restored(fields) for fields in json.loads(text)]
            for start in range(0, len(images), SHARED_PER_BROADCAST):
                self._share_block(group, root, images[start : start + SHARED_PER_BROADCAST], wanted)

    def _share_block(
        self, group: Group, root: int, images: list[CachedImage], wanted: Callable[[CachedImage], bool]
    ) -> None:
        if group.rank == root:
            block_BHWC = self._stored_rows([image.key for image in images])
        else:
            block_BHWC = np.empty((len(images), *self._stored), dtype=np.uint8)
        block_BHWC = group.broadcast(torch.from_numpy(block_BHWC), root).numpy()
        for image, pixels_HWC in zip(images, block_BHWC, strict=True):
            if wanted(image):
                self.add(image, pixels_HWC)


def _cached(member: Member, shown: Input, preprocess: Preprocess) -> CachedImage:
    row, column, key = shown.window.row, shown.window.column, member.key
    if preprocess.view.has_tiles:
        key = f"{key}@{row},{column}"
    layout = shown.layout
    return CachedImage(key, member.label, member.category, member.key, layout.picture, row, column, layout.shift)


def _restored(fields: list[Any]) -> CachedImage:
    image = CachedImage(*fields)
    (width, height), (across, down) = image.size, image.shift
    return replace(image, size=(width, height), shift=(across, down))
