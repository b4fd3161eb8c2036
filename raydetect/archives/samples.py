"""Entries of a container to members: which are images, their sidecars, labels, duplicates and unsafe names."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from raydetect.archives.base import is_image_name, safe_name
from raydetect.archives.naming import Naming
from raydetect.errors import MemberError
from raydetect.records import OK, Member

SIDECARS = (".mask.png", ".json", ".cls")
MAX_SIDECAR_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a container, in order.

    Attributes:
        name: as the container has it.
        data: its bytes; empty when `status` is not ok.
        status: "ok" or the reason why it could not be read.
        error: one sentence when not ok.
    """

    name: str
    data: bytes = b""
    status: str = OK
    error: str = ""


@dataclass(slots=True)
class _Sample:
    """Consecutive entries of one stem."""

    stem: str
    images: list[Entry] = field(default_factory=list)
    sidecars: dict[str, Entry] = field(default_factory=dict)


def is_wanted(name: str) -> bool:
    """Whether an entry's bytes are needed: an image or a sidecar."""
    return is_image_name(name) or name.lower().endswith(SIDECARS)


def assemble(
    container_uri: str, scheme: str, entries: Iterable[Entry], naming: Naming, seen: set[str] | None = None
) -> Iterator[Member]:
    """Members of a container.

    Args:
        container_uri: URI of the container.
        scheme: fsspec scheme that opens a member of it ("tar", "tarzst", "zip").
        entries: wanted entries in order.
        naming: the source's patterns.
        seen: safe names that came earlier in the container, for a shard that covers a later part.
    """
    names = set() if seen is None else set(seen)
    for sample in _samples(entries):
        for entry in sample.images:
            member = _member(container_uri, scheme, entry, sample, naming)
            if member is None:
                continue
            if member.key in names:
                message = f"{member.key}: a second member of this name. Rename one of them."
                member = replace(member, data=b"", status="duplicate_key", error=message)
            names.add(member.key)
            yield member


def key_of(container_uri: str, name: str) -> str:
    """The key of a member; an unsafe name is kept as it is, for people."""
    try:
        return f"{container_uri}#{safe_name(name)}"
    except MemberError:
        return f"{container_uri}#{name.encode('unicode_escape').decode('ascii')}"


def _samples(entries: Iterable[Entry]) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for entry in entries:
        stem, sidecar = _stem(entry.name)
        if sample is None or sample.stem != stem:
            if sample is not None:
                yield sample
            sample = _Sample(stem)
        if sidecar:
            sample.sidecars[sidecar] = entry
        else:
            sample.images.append(entry)
    if sample is not None:
        yield sample


def _stem(name: str) -> tuple[str, str]:
    lower = name.lower()
    for sidecar in SIDECARS:
        if lower.endswith(sidecar):
            return name[: -len(sidecar)], sidecar
    return name.rpartition(".")[0], ""


def _member(container_uri: str, scheme: str, entry: Entry, sample: _Sample, naming: Naming) -> Member | None:
    key = key_of(container_uri, entry.name)
    try:
        name = safe_name(entry.name)
    except MemberError as error:
        return Member(key, container_uri, status=error.status, error=f"{container_uri}: {error}")
    facts = naming.read(name)
    if facts is None:
        return None
    dots = entry.name.removesuffix(name)  # the `./` that some packers write
    member = Member(
        key,
        f"{scheme}://{entry.name}::{container_uri}",
        data=entry.data,
        status=entry.status,
        error=entry.error,
        label=facts.label,
        category=facts.category,
        defect=facts.defect,
        mask_uri=None if facts.mask_name is None else f"{scheme}://{dots}{facts.mask_name}::{container_uri}",
    )
    return _with_sidecars(member, sample, scheme, container_uri)


def _with_sidecars(member: Member, sample: _Sample, scheme: str, container_uri: str) -> Member:
    mask = sample.sidecars.get(".mask.png")
    if mask is not None:
        member = replace(member, mask_uri=f"{scheme}://{mask.name}::{container_uri}")
    words = _json_words(sample.sidecars.get(".json"))
    label = _cls_label(sample.sidecars.get(".cls"))
    if "label" in words and words["label"] in (0, 1):
        label = int(words["label"])
    return replace(
        member,
        label=member.label if label is None else label,
        category=str(words["category"]) if "category" in words else member.category,
        defect=str(words["defect"]) if "defect" in words else member.defect,
        meta=json.dumps(words, sort_keys=True) if words else "",
    )


def _json_words(entry: Entry | None) -> dict[str, Any]:
    """The sidecar's mapping; anything else is kept under `unreadable`, so that no label is invented."""
    if entry is None:
        return {}
    try:
        words = json.loads(entry.data)
    except ValueError:
        return {"unreadable": entry.name}
    return words if isinstance(words, dict) else {"value": words}


def _cls_label(entry: Entry | None) -> int | None:
    if entry is None:
        return None
    text = entry.data.strip()
    return None if not text.isdigit() else min(int(text), 1)
