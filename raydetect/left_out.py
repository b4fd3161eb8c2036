"""Counts what a source holds and no row stands for, by reason, with the first names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raydetect.records import LeftOut

NAMED = 5
WITHDRAWN = "withdrawn"  # also the format of such a shard
REASONS = {
    "sidecar": "labels and masks that belong to an image",
    "sidecar_without_image": "labels and masks of no image",
    "mask": "masks, by source.mask_pattern",
    "pattern": "not matched by source.pattern",
    "hidden": "hidden files, and what systems leave beside files",
    "other_suffix": "no image by suffix",
    "no_suffix": "without a suffix, and no image by content",
    "other_format": "not of source.format",
    "unknown_container": "archives of a kind that is not read",
    "index": "indexes of tars",
    "not_a_file": "a pipe, socket or device",
    "linked_folder": "links to folders, which are not followed",
    "linked_outside": "files that links lead to from a folder which a server allows to one which it does not",
    "replaced": "labels and masks that a later file of the same name replaces",
    "bytes_after_end": "bytes after the end of a tar",
    WITHDRAWN: "shards that were deleted or overwritten before their night was scored",
}


@dataclass(slots=True)
class LeftOutCount:
    """Counts of one shard or listing."""

    found: dict[str, LeftOut] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """One more file.

        Args:
            reason: one of REASONS.
            name: its name, as people read it.
        """
        self.add_all({reason: LeftOut(1, (name,))})

    def add_all(self, more: Mapping[str, LeftOut]) -> None:
        """What was counted elsewhere, after what is here."""
        for reason, other in more.items():
            old = self.found.get(reason, LeftOut(0))
            self.found[reason] = LeftOut(old.count + other.count, (*old.names, *other.names)[:NAMED])


def left_out_of(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, LeftOut]:
    """From the JSON of a manifest or of another process."""
    return {reason: LeftOut(int(entry["count"]), tuple(entry["names"])) for reason, entry in plain.items()}


def left_out_text(found: Mapping[str, LeftOut]) -> str:
    """`30 hidden (__MACOSX/a/._0.png, ...), 1 other_suffix (notes.txt)`; "" when nothing was left out."""
    parts = []
    for reason, entry in sorted(found.items()):
        more = ", ..." if entry.count > len(entry.names) else ""
        parts.append(f"{entry.count:,} {reason} ({', '.join(entry.names)}{more})")
    return ", ".join(parts)
