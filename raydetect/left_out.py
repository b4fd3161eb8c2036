"""Counts files of a source without a row, by reason, with the first names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raydetect.records import LeftOut

NAMED = 5
WITHDRAWN = "withdrawn"  # also the format of a withdrawn shard
REASONS = {
    "sidecar": "labels and masks of an image",
    "sidecar_without_image": "labels and masks without an image",
    "mask": "masks matched by source.mask_pattern",
    "pattern": "not matched by source.pattern",
    "hidden": "hidden files and files of operating systems",
    "other_suffix": "not an image, by suffix",
    "no_suffix": "without a suffix and not an image, by content",
    "other_format": "not in source.format",
    "unknown_container": "unsupported kinds of archives",
    "index": "indexes of tar files",
    "not_a_file": "a pipe, socket or device",
    "linked_folder": "links to folders, which are not followed",
    "linked_outside": "links from a folder that a server allows to one that it does not",
    "replaced": "labels and masks replaced by a later file of the same name",
    "bytes_after_end": "bytes after the end of a tar",
    WITHDRAWN: "shards deleted or overwritten before their night was scored",
}


@dataclass(slots=True)
class LeftOutCount:
    """The counts of one shard or listing."""

    counts: dict[str, LeftOut] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Adds a file.

        Args:
            reason: one of REASONS.
            name: name shown to users.
        """
        self.add_all({reason: LeftOut(1, (name,))})

    def add_all(self, more: Mapping[str, LeftOut]) -> None:
        """Adds the counts of another shard or listing."""
        for reason, other in more.items():
            old = self.counts.get(reason, LeftOut(0))
            self.counts[reason] = LeftOut(old.count + other.count, (*old.names, *other.names)[:NAMED])


def left_out_of(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, LeftOut]:
    """Restores counts from the JSON of a manifest or another process."""
    return {reason: LeftOut(int(entry["count"]), tuple(entry["names"])) for reason, entry in plain.items()}


def left_out_text(counts: Mapping[str, LeftOut]) -> str:
    """`30 hidden (__MACOSX/a/._0.png, ...), 1 other_suffix (notes.txt)`; "" if nothing was left out."""
    parts = []
    for reason, entry in sorted(counts.items()):
        more = ", ..." if entry.count > len(entry.names) else ""
        parts.append(f"{entry.count:,} {reason} ({', '.join(entry.names)}{more})")
    return ", ".join(parts)
