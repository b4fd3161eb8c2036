"""Fleets: one detector for each category in one artifact folder, and an index of them.

    artifact.json                           the index, written last as the commit
    categories/bottle-1a2b3c4d5e6f/         an ordinary artifact: artifact.json and its tensors

The members may share one detector (`per_category: calibration`). Its tensors then lie beside the index, which names
them, and the record of each member has a calibration of its own:

    artifact.json                           the index, with an entry `tensors`
    tensors-0a1b2c3d4e5f6a7b.safetensors    those of all members
    categories/bottle-1a2b3c4d5e6f/         artifact.json, whose entry `tensors` is the same and says `shared`

The index contains the digest of every member's record, which covers the member's tensors, so the digest of the index
covers the whole fleet. An ordinary artifact has an index too: it scores images of any category or without one.
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
    TensorsShape,
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
    """Entry of one category in an index."""

    folder: str
    digest: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetShape:
    """Required entries of an index; further entries are allowed."""

    categories: Mapping[str, MemberShape]
    tensors: TensorsShape | None = None
    packages: Mapping[str, str] = field(default_factory=dict)


FOLDER = re.compile(r"categories/[a-z0-9_-]+")
SLUG_LENGTH = 40
READERS = 16
OF_THE_DETECTOR = ("detector", "params", "seed", "tensors", "bank", "preprocess")  # entries that sharing members share


@dataclass(frozen=True, slots=True, order=True)
class ArtifactRef:
    """Location of one detector's artifact and the expected digest of its record."""

    uri: str
    digest: str


@dataclass(frozen=True, slots=True)
class ArtifactIndex:
    """Content of `artifact.json`: one detector, or one for each category. Small enough to send to workers.

    Attributes:
        uri: the artifact folder.
        digest: sha256 of `artifact.json`; covers everything in the folder.
        body: the parsed file.
        categories: the artifact of each category, sorted by name; empty for an ordinary artifact.
    """

    uri: str
    digest: str
    body: Mapping[str, Any]
    categories: Mapping[str, ArtifactRef] = field(default_factory=dict)

    @property
    def is_shared(self) -> bool:
        """Whether all categories have the same detector, each with a calibration of its own."""
        return bool(self.categories) and self.body.get("tensors") is not None

    def detector_of(self, ref: ArtifactRef) -> ArtifactRef:
        """Identifies the detector of an artifact of the index: equal if two share it, which is then loaded once."""
        return ArtifactRef(self.uri, self.digest) if self.is_shared else ref

    def for_category(self, category: str | None) -> ArtifactRef | None:
        """Returns the artifact that scores images of this category; None if a fleet has none.

        Names that differ only in Unicode composition (NFC, NFD) are the same category.
        """
        if not self.categories:
            return ArtifactRef(self.uri, self.digest)
        if category is None or category in self.categories:
            return None if category is None else self.categories[category]
        known = {unicodedata.normalize("NFC", name): ref for name, ref in self.categories.items()}
        return known.get(unicodedata.normalize("NFC", category))


def category_folder(category: str) -> str:
    """Returns the folder of a category inside a fleet: a readable slug and a digest of the name.

    Names come from archives; they may contain `..` or any character, or differ only in case.
    """
    digest = hashlib.sha256(category.encode(errors="surrogateescape")).hexdigest()[:12]
    slug = re.sub(r"[^a-z0-9_]+", "-", category.lower())[:SLUG_LENGTH].strip("-")
    return f"categories/{slug}-{digest}" if slug else f"categories/{digest}"


def member_uri(uri: str, category: str) -> str:
    """Returns the URI of the artifact of one category of a fleet."""
    return join_uri(uri, category_folder(category))


def write_fleet(uri: str, storage: Storage, members: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Commits a fleet whose members are already written and returns its digest.

    Args:
        uri: folder of the fleet.
        storage: storage of that folder.
        members: digest of the artifact at `member_uri(uri, category)`, by category.
        facts: further entries of the index: spec, counts, times, packages.

    Raises:
        SpecError: there are no members.
        StorageError: the index cannot be written.
    """
    if not members:
        raise SpecError(f"{uri}: the fleet has no category. Check {{category}} in source.pattern.")
    categories = {name: {"folder": category_folder(name), "digest": digest} for name, digest in sorted(members.items())}
    body = {**facts, "format_version": FORMATS["fleet"], "kind": "fleet", "categories": categories}
    return write_json(uri, storage, body)


def read_index(uri: str, storage: Storage) -> ArtifactIndex:
    """Reads the index of an artifact or a fleet, from one file.

    Raises:
        ArtifactError: the index is missing, damaged or of a newer format, or names a folder outside `categories/`.
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
    """Reads the record of every detector by category, or of an ordinary artifact under None, and checks the digests.

    Also reads the headers of the tensor files, so that inconsistencies are found while a job is planned.

    Raises:
        ArtifactError: a member is missing, damaged or does not match the index or the members that share its detector;
            the message names the category.
        StorageError: the storage failed.
    """
    if not index.categories:
        record = parse_record(index.uri, index.digest, index.body)
        check_bank(record, read_header(record, storage))
        return {None: record}
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _read_member(index, name, storage), index.categories)
        records = dict[str | None, ArtifactRecord](zip(index.categories, found, strict=True))
    if index.is_shared:
        _require_shared(index, records, storage)
    return records


def _require_shared(index: ArtifactIndex, records: Mapping[str | None, ArtifactRecord], storage: Storage) -> None:
    first = next(iter(records.values()))
    for name, record in records.items():
        differs = next((key for key in OF_THE_DETECTOR if record.body.get(key) != first.body.get(key)), None)
        if record.body["tensors"] != {**index.body["tensors"], "shared": True}:
            differs = "tensors"
        if differs is not None:
            raise ArtifactError(
                f"{index.uri}: category {name!r}: its record has other {differs} than the detector that all categories "
                "share. Fit again, or copy the whole fleet again."
            )
    check_bank(first, read_header(first, storage))


def _read_member(index: ArtifactIndex, category: str, storage: Storage) -> ArtifactRecord:
    ref = index.categories[category]
    try:
        record = read_record(ref.uri, storage)
        if not index.is_shared:
            check_bank(record, read_header(record, storage))
    except ArtifactError as error:
        raise ArtifactError(f"{index.uri}: category {category!r}: {error}") from None
    if record.digest != ref.digest:
        raise ArtifactError(
            f"{index.uri}: category {category!r}: {ref.uri} has the digest {record.digest[:16]}, the index says "
            f"{ref.digest[:16]}. Fit the fleet again, or copy the whole fleet again."
        )
    return record
