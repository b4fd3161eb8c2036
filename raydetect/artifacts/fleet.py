"""A fleet: one detector for each category, in one artifact folder; and which of them scores which image.

    artifact.json                           the index, written last: the commit
    categories/bottle-1a2b3c4d5e6f/         an ordinary artifact: artifact.json and its tensors

The index holds the digest of every member's record, which covers the member's tensors, so the digest of the index
covers the whole fleet. An ordinary artifact is indexed too: it scores the images of every category, and of none.
"""

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from raydetect.artifacts.record import (
    FORMATS,
    ArtifactRecord,
    Sha256,
    checked,
    kind_of,
    parse_record,
    read_body,
    read_record,
    write_json,
)
from raydetect.artifacts.tensor_header import check_bank, read_header
from raydetect.errors import ArtifactError, SpecError
from raydetect.storage import Storage, join_uri


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberShape:
    """What an index says of one category."""

    folder: str
    digest: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetShape:
    """What an index must hold for those who read it; more may be there."""

    categories: Mapping[str, MemberShape]
    packages: Mapping[str, str] = field(default_factory=dict)


FOLDER = re.compile(r"categories/[a-z0-9_-]+")
SLUG_LETTERS = 40
READERS = 16


@dataclass(frozen=True, slots=True, order=True)
class ArtifactRef:
    """Where the artifact of one detector lies, and the digest that its record must have."""

    uri: str
    digest: str


@dataclass(frozen=True, slots=True)
class ArtifactIndex:
    """What `artifact.json` says of a folder: one detector, or one for each category. Small; may travel to workers.

    Attributes:
        uri: the folder.
        digest: sha256 of `artifact.json`; covers everything in the folder.
        body: everything in that file.
        categories: the artifact of each category, in order of names; empty for an ordinary artifact.
    """

    uri: str
    digest: str
    body: Mapping[str, Any]
    categories: Mapping[str, ArtifactRef] = field(default_factory=dict)

    def for_category(self, category: str | None) -> ArtifactRef | None:
        """Which artifact scores an image of this category; None when a fleet has none for it.

        Names that differ in how Unicode composes them are one category.
        """
        if not self.categories:
            return ArtifactRef(self.uri, self.digest)
        if category is None or category in self.categories:
            return None if category is None else self.categories[category]
        known = {unicodedata.normalize("NFC", name): ref for name, ref in self.categories.items()}
        return known.get(unicodedata.normalize("NFC", category))


def category_folder(category: str) -> str:
    """Folder of a category inside a fleet, a safe function of its name: readable letters and a digest of the whole.

    Names come from archives; they may climb, hold any letter, or differ in case alone.
    """
    digest = hashlib.sha256(category.encode(errors="surrogateescape")).hexdigest()[:12]
    slug = re.sub(r"[^a-z0-9_]+", "-", category.lower())[:SLUG_LETTERS].strip("-")
    return f"categories/{slug}-{digest}" if slug else f"categories/{digest}"


def member_uri(uri: str, category: str) -> str:
    """Where a fleet's fit writes the ordinary artifact of a category."""
    return join_uri(uri, category_folder(category))


def write_fleet(uri: str, storage: Storage, members: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Commits a fleet whose members are written already, and returns its digest.

    Args:
        uri: folder of the fleet.
        storage: reaches it.
        members: digest of the artifact at `member_uri(uri, category)`, by category.
        facts: further entries of the index: spec, counts, times, packages.

    Raises:
        SpecError: no member.
        StorageError: it cannot be written.
    """
    if not members:
        raise SpecError(f"{uri}: a fleet of no category was given. Check {{category}} of source.pattern.")
    categories = {name: {"folder": category_folder(name), "digest": digest} for name, digest in sorted(members.items())}
    body = {**facts, "format_version": FORMATS["fleet"], "kind": "fleet", "categories": categories}
    return write_json(uri, storage, body)


def read_index(uri: str, storage: Storage) -> ArtifactIndex:
    """The index of an artifact or a fleet, from one file.

    Raises:
        ArtifactError: it is missing, damaged or of a newer format, or names a folder outside.
    """
    digest, body = read_body(uri, storage)
    if kind_of(body) != "fleet":
        parse_record(uri, digest, body)
        return ArtifactIndex(uri, digest, body)
    checked(uri, body, FleetShape)
    entries = {name: (entry["folder"], entry["digest"]) for name, entry in body["categories"].items()}
    if not entries:
        raise ArtifactError(f"{uri}: the index of the fleet names no category. Fit again.")
    for name, (folder, _) in entries.items():
        if FOLDER.fullmatch(folder) is None:
            raise ArtifactError(
                f"{uri}: the index places category {name!r} in {folder!r}, outside of categories/. Fit again."
            )
    refs = {name: ArtifactRef(join_uri(uri, folder), digest) for name, (folder, digest) in sorted(entries.items())}
    return ArtifactIndex(uri, digest, body, refs)


def read_records(index: ArtifactIndex, storage: Storage) -> dict[str | None, ArtifactRecord]:
    """The record of every detector by category, checked against the index; under None that of an ordinary artifact.

    The headers of their tensors are read too, so that what does not go together is found while a job is planned.

    Raises:
        ArtifactError: a member is missing, damaged, or another one than the index names; says of which category.
        StorageError: the storage failed.
    """
    if not index.categories:
        record = parse_record(index.uri, index.digest, index.body)
        check_bank(record, read_header(record, storage))
        return {None: record}
    with ThreadPoolExecutor(READERS) as pool:
        records = pool.map(lambda name: _read_member(index, name, storage), index.categories)
        return dict(zip(index.categories, records, strict=True))


def _read_member(index: ArtifactIndex, category: str, storage: Storage) -> ArtifactRecord:
    ref = index.categories[category]
    try:
        record = read_record(ref.uri, storage)
        check_bank(record, read_header(record, storage))
    except ArtifactError as error:
        raise ArtifactError(f"{index.uri}: category {category!r}: {error}") from None
    if record.digest != ref.digest:
        raise ArtifactError(
            f"{index.uri}: category {category!r}: {ref.uri} has the digest {record.digest[:16]}, the index says "
            f"{ref.digest[:16]}. Fit the fleet again, or copy it anew as a whole."
        )
    return record
