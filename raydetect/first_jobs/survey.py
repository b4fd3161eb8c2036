"""Looks at a source: lists it, reads its first images, and counts formats, sizes, depths, labels and broken files."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from raydetect.archives.base import Listing
from raydetect.archives.chunks import read_members
from raydetect.archives.formats.loose_files import loose_names
from raydetect.archives.labels import labels_text
from raydetect.archives.open import open_archive
from raydetect.config import SourceSpec, StorageOptions
from raydetect.errors import MemberError, SpecError
from raydetect.first_jobs.folders import is_mask
from raydetect.images.bit_depth import SIXTEEN_BIT
from raydetect.images.opening import DecodeRules, loaded_image
from raydetect.left_out import LeftOutCount, left_out_text
from raydetect.progress.texts import bytes_text
from raydetect.records import OK, Member
from raydetect.storage import Storage

MAX_IMAGES, MAX_BYTES, MAX_PIXELS = 1000, 128 << 20, 1 << 28  # read and decoded of a source
NAMED = 3  # broken files in a summary
FORMAT_NAMES = {"prefix": "loose images", "tar": "tar", "zip": "zip", "parquet": "Parquet"}


@dataclass(slots=True)
class Survey:
    """What is known about a source.

    Attributes:
        source: its settings.
        names: paths of its images: of all loose ones, else of those that were read.
        formats: number of shards by format; of images for loose ones.
        bytes: encoded size of all.
        images: number of images; None if there are containers of which only the first images were read.
        read: number of images that were read.
        sizes: number of pictures by (width, height) in px.
        depths: number of pictures by what they are, such as "16-bit grey".
        white: largest value in pictures of 16-bit grey.
        labels: number of images by (label, text) of labels inside of containers.
        broken: of the images that were read: name and reason.
        left_out: files that are no images, in words.
        notes: of the listing.
    """

    source: SourceSpec
    names: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    images: int | None = None
    read: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    depths: Counter[str] = field(default_factory=Counter)
    white: int = 0
    labels: Counter[tuple[int | None, str]] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)
    left_out: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_loose(self) -> bool:
        """Whether all images are files of their own."""
        return set(self.formats) == {"prefix"}

    @property
    def has_labels(self) -> bool:
        """Whether a column or sidecars have labels."""
        return any(label is not None for label, _ in self.labels)

    def lines(self) -> list[str]:
        """What was seen, one fact a line."""
        kinds = ", ".join(
            f"{count:,} {FORMAT_NAMES[kind]}" + ("" if kind == "prefix" else f" file{'s' if count > 1 else ''}")
            for kind, count in sorted(self.formats.items())
        )
        masks = sum(is_mask(name) for name in self.names)
        of_masks = f", of which {masks:,} are masks" if masks else ""
        found = [f"Contents   {kinds}{of_masks}; {bytes_text(self.bytes)}"]
        if self.read:
            of = "all" if self.images == self.read else "the first"
            found.append(f"Read       {of} {self.read:,} images: {_counted(self.depths)}")
            found.append(f"Size       {_sizes_text(self.sizes)}")
        if self.has_labels:
            found.append(f"Labels     {labels_text([(*key, count) for key, count in self.labels.items()])}")
        if self.broken:
            more = ", ..." if len(self.broken) > NAMED else ""
            named = "; ".join(f"{name}: {reason}" for name, reason in self.broken[:NAMED])
            found.append(f"Broken     {len(self.broken):,}: {named}{more}")
        if self.left_out:
            found.append(f"Left out   {self.left_out}")
        return found + [f"Note       {note}" for note in self.notes]


def survey(source: SourceSpec, options: StorageOptions) -> Survey:
    """Lists a source and reads its first images.

    Args:
        source: without a pattern.
        options: its storage.

    Raises:
        SpecError: it has no image that can be read.
        RaydetectError: it cannot be read.
    """
    archive = open_archive(source, Storage(options))
    listing, left_out, seen = archive.listing(), LeftOutCount(), Survey(source)
    _note_listing(seen, listing)
    left_out.add_all(listing.shards[0].left_out)
    members = chain.from_iterable(read_members(archive, shard, source, left_out) for shard in listing.shards)
    is_all = _read(seen, members)
    if seen.is_loose:
        seen.images = sum(not is_mask(name) for name in seen.names)
    elif is_all:
        seen.images = seen.read
    seen.left_out = left_out_text(left_out.counts)
    if not seen.sizes:
        where = ", ".join(source.uris())
        name, reason = seen.broken[0] if seen.broken else (where, f"has no images; left out: {seen.left_out}")
        raise SpecError(f"{where}: no image can be read; {name}: {reason}")
    return seen


def _note_listing(seen: Survey, listing: Listing) -> None:
    seen.notes = listing.notes
    for shard in listing.shards:
        loose = loose_names(shard) if shard.format == "prefix" else []
        seen.names += loose
        seen.formats[shard.format] += len(loose) if shard.format == "prefix" else 1
        seen.bytes += shard.size_bytes


def _read(seen: Survey, members: Iterator[Member]) -> bool:
    """Reads images up to the limits; returns whether these are all."""
    rules, held, pixels = DecodeRules.of(seen.source), 0, 0
    has_names = not seen.names
    for member in members:
        if seen.read == MAX_IMAGES or held > MAX_BYTES or pixels > MAX_PIXELS:
            return False
        name = member.key.partition("#")[2] or member.key
        if has_names:
            seen.names.append(name)
        if is_mask(name):
            continue
        seen.read += 1
        seen.labels[member.label, member.raw_label] += 1
        held += len(member.data)
        pixels += _note_image(seen, member, name, rules)
    return True


def _note_image(seen: Survey, member: Member, name: str, rules: DecodeRules) -> int:
    """Decodes an image; returns its number of px."""
    if member.status != OK:
        seen.broken.append((name, member.error))
        return 0
    try:
        with loaded_image(member.data, rules) as loaded:
            picture = loaded.picture
            if picture.mode in SIXTEEN_BIT:
                seen.white = max(seen.white, int(np.asarray(picture).max()))
            seen.depths[_depth(picture.mode)] += 1
            seen.sizes[loaded.size] += 1
            return math.prod(loaded.size)
    except MemberError as error:
        seen.broken.append((name, str(error)))
        return 0


def _depth(mode: str) -> str:
    if mode in SIXTEEN_BIT:
        return "16-bit grey"
    return "8-bit grey" if mode in ("L", "LA", "1") else "8-bit colour"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common()) or "none can be decoded"


def _sizes_text(sizes: Counter[tuple[int, int]]) -> str:
    (width, height), count = sizes.most_common(1)[0]
    text = f"{width} x {height} px"
    if len(sizes) == 1:
        return text
    sides = [max(size) for size in sizes]
    return f"{text} ({count:,}), and {len(sizes) - 1:,} others; long sides {min(sides):,} to {max(sides):,} px"
