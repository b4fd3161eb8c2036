"""Caches the decoded images of one worker on its local disk, so that the archive is read and decoded once."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from raydetect.archives.chunks import refuse_bad_member
from raydetect.archives.labels import labels_text
from raydetect.artifacts.fit_preprocess import FitRules
from raydetect.blocks.coresets.group import Group
from raydetect.config import SourceSpec
from raydetect.config.validation import to_plain
from raydetect.detectors._base import Batch
from raydetect.errors import SpecError, TooManyBadRows
from raydetect.images.decode import DecodePool, Pixels, decode_stream
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.left_out import LeftOutCount, left_out_of, left_out_text
from raydetect.records import OK, Chunk, LeftOut, Member
from raydetect.storage import Scratch
from raydetect.views.align import NOT_MOVED, Shift
from raydetect.views.view import Layout, Window
from raydetect.views.windows import Input

SHARED_PER_BROADCAST = 64
REASONS = 3
BAD_SHARD = ("bad_shard", "unreadable")  # statuses of a row that stands for a whole shard


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
    """

    def __init__(self, preprocess: Preprocess, of_category: Callable[[str], Preprocess] | None = None) -> None:
        """Creates an empty cache for images decoded by these rules; categories may have regions of their own."""
        self.preprocess = preprocess
        self._preprocess_of = of_category or (lambda _: preprocess)
        self.shape = (*preprocess.image_size, 3)
        self.images: dict[str, CachedImage] = {}
        self._rows: dict[str, int] = {}
        self._bytes = int(np.prod(self.shape))
        self._file = Scratch("decoded images")

    def __len__(self) -> int:
        return len(self.images)

    def categories(self) -> dict[str, str | None]:
        """The category of each image by its key."""
        return {image.image_key: image.category for image in self.images.values()}

    def add(self, image: CachedImage, pixels_HWC: np.ndarray) -> None:
        """Adds an image; does nothing if its key exists.

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

    def pixels(self, keys: Sequence[str]) -> np.ndarray:
        """Reads the images of `keys` in that order, uint8 of shape (B, H, W, 3)."""
        images_BHWC = np.empty((len(keys), *self.shape), dtype=np.uint8)
        for i, key in enumerate(keys):
            self._file.read_at(self._rows[key] * self._bytes, images_BHWC[i].data)
        return images_BHWC

    def batch(self, keys: Sequence[str], device: torch.device, epoch: int = 0, draws: Sequence[int] = ()) -> Batch:
        """Reads the images of `keys` in that order as a batch on a device."""
        images_BCHW = torch.from_numpy(self.pixels(keys)).permute(0, 3, 1, 2).to(device)
        return Batch(images_BCHW, keys, [self.images[key].label or 0 for key in keys], epoch, draws)

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
            block_BHWC = self.pixels([image.key for image in images])
        else:
            block_BHWC = np.empty((len(images), *self.shape), dtype=np.uint8)
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


@dataclass(frozen=True, slots=True)
class ReadFacts:
    """Counts from reading a source on all workers.

    Attributes:
        bad: number of images that could not be used.
        bad_reasons: reasons of the first ones.
        labels: (label, value it was read from, number of images).
        left_out: files that are not images, by reason.
        hints: what another view may do better, one sentence each.
    """

    bad: int = 0
    bad_reasons: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    labels: tuple[tuple[int | None, str, int], ...] = ()
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Returns the entries for the artifact's record."""
        return {
            "labels": to_plain(self.labels),
            "left_out": to_plain(self.left_out),
            "bad_reasons": list(self.bad_reasons),
            **({"hints": list(self.hints)} if self.hints else {}),
        }

    @property
    def labels_text(self) -> str:
        """Labels for messages, ` (label: 0 = good (209), 1 = broken (63))`; "" if no image has a label."""
        has_labels = any(label is not None for label, _, _ in self.labels)
        return f" (label: {labels_text(self.labels)})" if has_labels else ""


@dataclass(slots=True)
class ReadImages:
    """Counts of usable and bad images of this worker, their labels and sizes, and the first reasons for bad ones.

    Attributes:
        sizes: number of images by (width, height) in px of the upright image; of all workers after `checked_total`.
        levels: number of 16-bit grey images by the levels of 256 that they span; likewise.
    """

    good: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    labels: Counter[tuple[int | None, str]] = field(default_factory=Counter)
    left_out: LeftOutCount = field(default_factory=LeftOutCount)
    shards: int = 0
    bad_shards: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    levels: Counter[int] = field(default_factory=Counter)

    def note_chunk(self, chunk: Chunk) -> None:
        """Counts a chunk; the last chunk of a shard shows whether the shard could be read."""
        self.left_out.add_all(chunk.left_out)
        self.shards += chunk.last
        self.bad_shards += any(map(_stands_for_a_shard, chunk.members))

    def note(self, member: Member, pixels: Pixels, source: SourceSpec) -> None:
        """Counts a decoded image.

        Raises:
            BadMemberError: it is bad and `on_bad_member` is `fail`.
        """
        refuse_bad_member(pixels.status, pixels.error, source)
        if pixels.status != OK:
            self.note_bad(pixels.error)
            return
        self.good += 1
        self.labels[member.label, member.raw_label] += 1
        self.sizes[pixels.width or 0, pixels.height or 0] += 1
        self.levels.update([] if pixels.levels is None else [pixels.levels])

    def note_bad(self, reason: str) -> None:
        """Counts a bad image."""
        self.bad += 1
        self.reasons = [*self.reasons, reason][:REASONS]

    def checked_total(self, group: Group, limit: float, where: str) -> ReadFacts:
        """Sums the counts of all workers.

        Raises:
            SpecError: there are no images.
            TooManyBadRows: more than the fraction `limit` of images or shards is bad.
        """
        labels = [[*key, count] for key, count in self.labels.items()]
        counts = [self.good, self.bad, self.shards, self.bad_shards]
        sizes = [[*size, count] for size, count in self.sizes.items()]
        fields = [counts, self.reasons, labels, to_plain(self.left_out.counts), sizes, list(self.levels.items())]
        sums = ReadImages()
        for text in group.gather_bytes(json.dumps(fields).encode()):
            sums._add(json.loads(text))
        self.sizes, self.levels = sums.sizes, sums.levels
        bad, total = sums.bad, sums.bad + sums.good
        if total == 0:
            left_out = left_out_text(sums.left_out.counts) or "nothing"
            raise SpecError(f"{where}: has no images; left out: {left_out}. Check source.uri, format and pattern.")
        reasons = tuple(sums.reasons[:REASONS])
        if bad > limit * total or sums.bad_shards > limit * sums.shards:
            raise TooManyBadRows(
                f"{bad} of {total} images cannot be used, and {sums.bad_shards} of {sums.shards} shards, more "
                f"than max_bad_fraction = {limit}. First: {'; '.join(reasons)}"
            )
        all_labels = tuple((label, value, count) for (label, value), count in sums.labels.items())
        return ReadFacts(bad, reasons, labels=all_labels, left_out=sums.left_out.counts)

    def _add(self, fields: list[Any]) -> None:
        (good, bad, shards, bad_shards), reasons, labels, left_out, sizes, levels = fields
        self.good, self.bad, self.reasons = self.good + good, self.bad + bad, self.reasons + reasons
        self.shards, self.bad_shards = self.shards + shards, self.bad_shards + bad_shards
        self.labels.update({(label, value): count for label, value, count in labels})
        self.left_out.add_all(left_out_of(left_out))
        self.sizes.update({(width, height): count for width, height, count in sizes})
        self.levels.update(dict(levels))


def read_images(
    chunks: Iterable[Chunk],
    source: SourceSpec,
    rules: FitRules,
    threads: int,
    on_progress: Callable[[int], None],
) -> tuple[ImageCache, ReadImages]:
    """Decodes all images of the chunks into a cache.

    Args:
        chunks: encoded images.
        source: settings of the source.
        rules: decoding rules of the fit.
        threads: number of decoding threads.
        on_progress: called with the number of images of each chunk.

    Raises:
        BadMemberError: an image is bad and `on_bad_member` is `fail`.
        SpecError: a category has no mask although the fit needs one.
    """
    cache, counts = ImageCache(rules.common, rules.of), ReadImages()
    with DecodePool(threads) as pool:
        for chunk in chunks:
            counts.note_chunk(chunk)
            groups: dict[Preprocess, list[Member]] = {}
            for member in chunk.members:
                groups.setdefault(rules.of(member.category), []).append(member)
            for preprocess, members in groups.items():
                decoded = decode_stream(members, DecodeRules.of(source), preprocess, pool)
                for member in members:
                    counts.note(member, cache.add_decoded(member, decoded), source)
            on_progress(len(chunk.members))
    return cache, counts


def _stands_for_a_shard(member: Member) -> bool:
    return member.status in BAD_SHARD and member.key.startswith(f"{member.image_uri}#")
