"""Counts of what a fit has read: usable and bad images, labels, sizes, and files that were left out."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raydetect.archives.chunks import refuse_bad_member
from raydetect.archives.labels import labels_text
from raydetect.blocks.coresets.group import Group
from raydetect.config import SourceSpec
from raydetect.config.validation import to_plain
from raydetect.errors import SpecError, TooManyBadRows
from raydetect.images.decode import Pixels
from raydetect.left_out import LeftOutCount, left_out_of, left_out_text
from raydetect.records import OK, Chunk, LeftOut, Member

REASONS = 3
BAD_SHARD = ("bad_shard", "unreadable")  # statuses of a row that stands for a whole shard


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


def _stands_for_a_shard(member: Member) -> bool:
    return member.status in BAD_SHARD and member.key.startswith(f"{member.image_uri}#")
