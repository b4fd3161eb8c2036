"""A container as a directory of files that can be opened individually, and the reader that makes members of them."""

import abc
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from raydetect.archives.base import begins_as_image, composed, escaped_text, has_suffix, is_unsafe, key_of, safe_name
from raydetect.archives.labels import read_label
from raydetect.archives.path_patterns import Naming, PathFacts
from raydetect.archives.samples import MAX_SIDECAR_BYTES, Arrangement, Entry, Sample, arrange
from raydetect.config import SourceSpec
from raydetect.errors import MemberError, RaydetectError
from raydetect.left_out import LeftOutCount
from raydetect.records import OK, Member

ESCAPED = "member"  # URL scheme of raydetect.archives.filesystem
PLAIN_LETTERS = frozenset("/-_.,+=@() ")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")  # of most members: found to be plain at once


class ContainerDirectory(abc.ABC):
    """The files of one container.

    Attributes:
        uri: the container's URI.
        scheme: URL scheme of fsspec's filesystem for the container; "" if fsspec cannot read it.
        entries: all files, sorted by `place`.
    """

    uri: str
    scheme: str
    entries: Sequence[Entry]

    @abc.abstractmethod
    def read(self, entry: Entry) -> bytes:
        """Reads a file; files must be read in the order of `entries`.

        Raises:
            MemberError: the file is damaged.
            ArchiveError: the container is damaged at this file.
            StorageError: the storage failed.
        """

    @abc.abstractmethod
    def finish(self, left_out: LeftOutCount) -> None:
        """Counts data after the last file; called once all files have been read.

        Raises:
            ArchiveError: the container is damaged after the last file.
        """

    def key_of(self, entry: Entry) -> str:
        """Returns the key of a file."""
        return key_of(self.uri, entry.name)

    def safe_name(self, entry: Entry) -> str:
        """Returns the name of a file for matching with patterns.

        Raises:
            MemberError: unsafe_name: the name cannot be used.
        """
        return safe_name(entry.name)

    def uri_of(self, entry: Entry) -> str:
        """Returns the fsspec URL of a file; with the scheme `member` if fsspec's own cannot open the name."""
        if self.scheme and is_plain(entry.raw):
            return f"{self.scheme}://{entry.raw}::{self.uri}"
        return f"{ESCAPED}://{escaped(entry.raw)}::{self.uri}"


def is_plain(name: str) -> bool:
    """Whether fsspec's filesystems open a name without escaping."""
    if PLAIN_NAME.fullmatch(name):
        return True
    doubled = "//" in name or name != name.strip()
    return not doubled and escaped_text(name) == name and all(c.isalnum() or c in PLAIN_LETTERS for c in name)


def escaped(name: str) -> str:
    """Percent-encodes a name, which may contain any bytes, for a URL."""
    return quote(name.encode("utf-8", "surrogateescape"), safe="/")


@dataclass(frozen=True, slots=True)
class MemberReader:
    """Yields the members of one container."""

    directory: ContainerDirectory
    source: SourceSpec
    naming: Naming
    left_out: LeftOutCount

    def members(self, span: tuple[int, int] | None) -> Iterator[Member]:
        """Yields the members that start inside a span [start, stop) in bytes; None = all."""
        start, stop = span or (0, math.inf)
        arranged = arrange(self.directory.entries)
        for entry, reason in arranged.left_out:
            if start <= entry.place < stop:
                self.left_out.add(reason, escaped_text(entry.name))
        for sample in arranged.samples:
            if start <= sample.entry.place < stop:
                member = self.member(sample, arranged)
                if member is not None:
                    yield member
        self.directory.finish(self.left_out)

    def member(self, sample: Sample, arranged: Arrangement) -> Member | None:
        """Returns the member of an image; None if it is left out. Errors of one image become its status."""
        entry = sample.entry
        key = self._key(sample, arranged)
        try:
            return self._described(sample, arranged, key)
        except MemberError as error:
            uri = escaped_text(self.directory.uri)
            return Member(key, uri, status=error.status, error=f"{uri}#{escaped_text(entry.name)}: {error}")
        except RaydetectError:
            raise
        except Exception as error:  # parsers raise anything on invalid bytes
            reason = f"{type(error).__name__}: {escaped_text(str(error))[:160]}"
            message = f"{key}: cannot be read ({reason}). Pack it again."
            return Member(key, escaped_text(self.directory.uri), status="corrupt", error=message)

    def _key(self, sample: Sample, arranged: Arrangement) -> str:
        key, copy = self.directory.key_of(sample.entry), sample.copy
        if not copy:
            return key
        while composed(f"{sample.entry.name}@{copy}") in arranged.by_name:
            copy += 1
        return f"{key}@{copy}"

    def _described(self, sample: Sample, arranged: Arrangement, key: str) -> Member | None:
        entry = sample.entry
        if entry.is_named and not has_suffix(entry.name) and not self._is_image(entry):
            self.left_out.add("no_suffix", escaped_text(entry.name))
            return None
        name = self.directory.safe_name(entry)
        facts = self.naming.read(name)
        if facts is None:
            self.left_out.add("mask" if self.naming.is_mask(name) else "pattern", escaped_text(entry.name))
            return None
        member = with_facts(Member(key, self.directory.uri_of(entry)), facts)
        mask_uri = self._mask_uri(name, facts, entry, arranged)
        if mask_uri != member.mask_uri:
            member = replace(member, mask_uri=mask_uri)
        if sample.copy:
            message = f"{key}: a later member has the same name and replaces it when unpacked. Rename one of them."
            return replace(member, status="duplicate_key", error=message)
        return self._with_sidecars(self._with_data(member, entry), sample)

    def _is_image(self, entry: Entry) -> bool:
        """Whether a file without a suffix is an image, by its first bytes; False if its name is unsafe."""
        if entry.status != OK or not 0 < entry.size <= self.source.max_image_bytes or is_unsafe(entry.name):
            return False
        return begins_as_image(self.directory.read(entry)[:16])

    def _with_data(self, member: Member, entry: Entry) -> Member:
        if entry.status != OK:
            return replace(member, status=entry.status, error=f"{member.key}: {entry.error}")
        limit = self.source.max_image_bytes
        if entry.size > limit:
            return too_many_bytes(member, entry.size, limit)
        try:
            return replace(member, data=self.directory.read(entry))
        except MemberError as error:
            return replace(member, status=error.status, error=f"{member.key}: {error}")

    def _mask_uri(self, name: str, facts: PathFacts, entry: Entry, arranged: Arrangement) -> str | None:
        if facts.mask_name is None:
            return None
        mask = arranged.by_name.get(composed(facts.mask_name))
        if mask is None:  # a missing mask is reported where it is read
            is_decomposed = composed(name) != name
            mask_name = unicodedata.normalize("NFD", facts.mask_name) if is_decomposed else facts.mask_name
            mask = replace(entry, raw=entry.raw.removesuffix(name) + mask_name)
        return self.directory.uri_of(mask)

    def _with_sidecars(self, member: Member, sample: Sample) -> Member:
        mask = sample.sidecars.get(".mask.png")
        if mask is not None:
            member = replace(member, mask_uri=self.directory.uri_of(mask))
        for suffix, apply in ((".json", with_json), (".cls", with_cls)):
            entry = sample.sidecars.get(suffix)
            if entry is None:
                continue
            try:
                if entry.size > MAX_SIDECAR_BYTES:
                    raise MemberError("too_many_bytes", f"more than {MAX_SIDECAR_BYTES:,} bytes")
                if entry.status != OK:
                    raise MemberError(entry.status, entry.error)
                member = apply(member, self.directory.read(entry), self.naming)
            except (MemberError, ValueError, RecursionError, OverflowError) as error:
                message = f"sidecar_not_read: {escaped_text(entry.name)} ({escaped_text(str(error))[:80]})"
                member = replace(member, notes=(*member.notes, message))
        return member


def too_many_bytes(member: Member, size: int, limit: int) -> Member:
    """Returns the member with status too_many_bytes."""
    message = f"{member.key}: {size:,} bytes are more than the limit of {limit:,}. Raise source.max_image_bytes."
    return replace(member, data=b"", status="too_many_bytes", error=message)


def with_facts(member: Member, facts: PathFacts) -> Member:
    """Returns the member with the facts of its path, except the mask."""
    return replace(
        member,
        label=facts.label,
        raw_label=facts.raw_label,
        notes=(*member.notes, facts.note) if facts.note else member.notes,
        category=None if facts.category is None else escaped_text(facts.category),
        defect=None if facts.defect is None else escaped_text(facts.defect),
    )


def with_json(member: Member, data: bytes, naming: Naming) -> Member:
    """Returns the member with the fields of its JSON sidecar, and the JSON as `meta`.

    Raises:
        ValueError, RecursionError: the sidecar is not JSON.
    """
    fields = json.loads(data)
    if not isinstance(fields, dict):
        fields = {"value": fields}
    member = with_fields(member, fields, naming)
    return replace(member, meta=json.dumps(_plain(fields), sort_keys=True, allow_nan=False))


def with_fields(member: Member, fields: dict[str, Any], naming: Naming, class_names: Any = ()) -> Member:
    """Returns the member with `label`, `category` and `defect` from a mapping; null values change nothing."""
    reading = read_label(fields.get("label"), naming.normal_names, class_names)
    notes = list(filter(None, [reading.note]))
    texts: dict[str, str] = {}
    for name in ("category", "defect"):
        value = fields.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            texts[name] = composed(escaped_text(str(value)))
        elif value is not None and value == value:  # NaN counts as null
            notes.append(f"{name}_not_read: of type {type(value).__name__}")
    has_label = reading.label is not None or bool(reading.note)
    return replace(
        member,
        label=reading.label if has_label else member.label,
        raw_label=reading.raw if has_label else member.raw_label,
        category=texts.get("category", member.category),
        defect=texts.get("defect", member.defect),
        notes=(*member.notes, *notes),
    )


def with_cls(member: Member, data: bytes, naming: Naming) -> Member:
    """Returns the member with the label of its `.cls` sidecar, which contains a number or word.

    Raises:
        ValueError: the sidecar is not UTF-8 text.
    """
    return with_fields(member, {"label": data.decode("utf-8-sig").strip()}, naming)


def _plain(value: Any) -> Any:
    """Makes a value valid JSON: null for NaN and infinity, lone surrogates escaped."""
    if isinstance(value, dict):
        return {escaped_text(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return escaped_text(value) if isinstance(value, str) else value
