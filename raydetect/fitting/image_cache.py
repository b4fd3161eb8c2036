"""Caches the decoded images of one worker on its local disk, so that the archive is read and decoded once."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raydetect.archives.chunks import refuse_bad_member
from raydetect.archives.labels import labels_text
from raydetect.artifacts.record import read_record
from raydetect.blocks.coresets.group import Group
from raydetect.config import AT_LEAST_2X, FitSpec, SourceSpec
from raydetect.config.validation import to_plain
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError, TooManyBadRows
from raydetect.images.decode import Pixels, decode_all
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.left_out import LeftOutCount, left_out_of, left_out_text
from raydetect.records import OK, Chunk, LeftOut, Member
from raydetect.storage import Scratch, Storage, normalise_uri

SHARED_PER_BROADCAST = 64
REASONS = 3
BAD_SHARD = ("bad_shard", "unreadable")  # statuses of a row that stands for a whole shard


@dataclass(frozen=True, slots=True)
class CachedImage:
    """Metadata of a cached image."""

    key: str
    label: int | None
    category: str | None


class ImageCache:
    """Uint8 RGB images of one size by key, in insertion order, in an unnamed file that is deleted with the cache.

    Attributes:
        preprocess: how the images were decoded, which is what the artifact records.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        """Creates an empty cache for images decoded by these rules."""
        self.preprocess = preprocess
        self.shape = (*preprocess.image_size, 3)
        self.images: dict[str, CachedImage] = {}
        self._rows: dict[str, int] = {}
        self._bytes = int(np.prod(self.shape))
        self._file = Scratch("decoded images")

    def __len__(self) -> int:
        return len(self.images)

    def add(self, image: CachedImage, pixels_HWC: np.ndarray) -> None:
        """Adds an image; does nothing if its key exists.

        Raises:
            StorageError: the temporary folder is full.
        """
        if image.key not in self._rows:
            row = len(self._rows)
            self._file.write_at(row * self._bytes, np.ascontiguousarray(pixels_HWC).data)
            self._rows[image.key] = row
            self.images[image.key] = image

    def forget(self, keys: Collection[str]) -> None:
        """Removes images from the cache."""
        for key in keys:
            del self.images[key]

    def of_category(self, category: str) -> "ImageCache":
        """Returns a view of the images of one category."""
        view = copy.copy(self)
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
        texts = group.gather_bytes(json.dumps([[i.key, i.label, i.category] for i in mine]).encode())
        for root, text in enumerate(texts):
            images = [CachedImage(*fields) for fields in json.loads(text)]
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


@dataclass(frozen=True, slots=True)
class ReadFacts:
    """Counts from reading a source on all workers.

    Attributes:
        bad: number of images that could not be used.
        bad_reasons: reasons of the first ones.
        labels: (label, value it was read from, number of images).
        left_out: files that are not images, by reason.
    """

    bad: int = 0
    bad_reasons: tuple[str, ...] = ()
    labels: tuple[tuple[int | None, str, int], ...] = ()
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Returns the entries for the artifact's record."""
        return {
            "labels": to_plain(self.labels),
            "left_out": to_plain(self.left_out),
            "bad_reasons": list(self.bad_reasons),
        }

    @property
    def labels_text(self) -> str:
        """Labels for messages, ` (label: 0 = good (209), 1 = broken (63))`; "" if no image has a label."""
        has_labels = any(label is not None for label, _, _ in self.labels)
        return f" (label: {labels_text(self.labels)})" if has_labels else ""


@dataclass(slots=True)
class ReadImages:
    """Counts of usable and bad images of this worker, their labels, and the first reasons for bad ones."""

    good: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    labels: Counter[tuple[int | None, str]] = field(default_factory=Counter)
    left_out: LeftOutCount = field(default_factory=LeftOutCount)
    shards: int = 0
    bad_shards: int = 0

    def note_chunk(self, chunk: Chunk) -> None:
        """Counts a chunk; the last chunk of a shard shows whether the shard could be read."""
        self.left_out.add_all(chunk.left_out)
        self.shards += chunk.last
        self.bad_shards += any(map(_stands_for_a_shard, chunk.members))

    def note_good(self, member: Member) -> None:
        """Counts a usable image."""
        self.good += 1
        self.labels[member.label, member.raw_label] += 1

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
        fields = [counts, self.reasons, labels, to_plain(self.left_out.counts)]
        sums = ReadImages()
        for text in group.gather_bytes(json.dumps(fields).encode()):
            sums._add(json.loads(text))
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
        return ReadFacts(bad, reasons, all_labels, sums.left_out.counts)

    def _add(self, fields: list[Any]) -> None:
        (good, bad, shards, bad_shards), reasons, labels, left_out = fields
        self.good, self.bad, self.reasons = self.good + good, self.bad + bad, self.reasons + reasons
        self.shards, self.bad_shards = self.shards + shards, self.bad_shards + bad_shards
        self.labels.update({(label, value): count for label, value, count in labels})
        self.left_out.add_all(left_out_of(left_out))


def fit_preprocess(spec: FitSpec) -> Preprocess:
    """Returns the decoding rules of a fit: its detector's input size, and its own rule for JPEGs.

    A fit that extends an artifact decodes as that artifact's images were decoded, whatever the default is.

    Raises:
        SpecError: a parameter is invalid, or the job states another rule than the artifact it extends.
        ArtifactError: that artifact is missing or damaged.
    """
    image_size = build_from(spec.detector, spec.seed).params.image_size
    stated = spec.preprocess.jpeg_scale
    if spec.extend is None:
        return Preprocess(image_size, stated or AT_LEAST_2X)
    earlier = read_record(normalise_uri(spec.extend), Storage(spec.storage)).preprocess.jpeg_scale
    if stated not in (None, earlier):
        raise SpecError(
            f"preprocess.jpeg_scale = {stated}: {spec.extend} was fitted on images decoded with {earlier}, and the new "
            "ones must be decoded alike. Remove the setting."
        )
    return Preprocess(image_size, earlier)


def read_images(
    chunks: Iterable[Chunk],
    source: SourceSpec,
    preprocess: Preprocess,
    threads: int,
    on_progress: Callable[[int], None],
) -> tuple[ImageCache, ReadImages]:
    """Decodes all images of the chunks into a cache.

    Args:
        chunks: encoded images.
        source: settings of the source.
        preprocess: decoding rules of the detector.
        threads: number of decoding threads.
        on_progress: called with the number of images of each chunk.

    Raises:
        BadMemberError: an image is bad and `on_bad_member` is `fail`.
    """
    cache, counts = ImageCache(preprocess), ReadImages()
    for member, pixels in _decoded(_counted(chunks, counts), source, preprocess, threads, on_progress):
        refuse_bad_member(pixels.status, pixels.error, source)
        if pixels.image_HWC is not None and pixels.status == OK:
            cache.add(CachedImage(member.key, member.label, member.category), pixels.image_HWC)
            counts.note_good(member)
        else:
            counts.note_bad(pixels.error)
    return cache, counts


def _stands_for_a_shard(member: Member) -> bool:
    return member.status in BAD_SHARD and member.key.startswith(f"{member.image_uri}#")


def _counted(chunks: Iterable[Chunk], counts: ReadImages) -> Iterator[Chunk]:
    for chunk in chunks:
        counts.note_chunk(chunk)
        yield chunk


def _decoded(
    chunks: Iterable[Chunk],
    source: SourceSpec,
    preprocess: Preprocess,
    threads: int,
    on_progress: Callable[[int], None],
) -> Iterator[tuple[Member, Pixels]]:
    rules = DecodeRules.of(source)
    for chunk in chunks:
        yield from zip(chunk.members, decode_all(chunk.members, rules, preprocess, threads), strict=True)
        on_progress(len(chunk.members))
