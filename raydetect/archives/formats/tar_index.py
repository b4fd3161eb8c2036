"""The index of a tar by which it is read in parts: a text file `day.idx` beside `day.tar`, as NVIDIA DALI's wds2idx
writes it. It is never trusted: the driver looks whether it covers the tar, and every part reads the headers of its own
stretch and compares.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from raydetect.archives.formats.tar_headers import BLOCK
from raydetect.archives.samples import Entry
from raydetect.errors import ArchiveError
from raydetect.storage import FileInfo, Storage

INDEX_SUFFIX = ".idx"
VERSION = "v1.2"
MAX_TAIL_BYTES = 1 << 20
MAX_INDEX_BYTES = 64 << 20  # about a million members
ITEM = re.compile(r"(\S+) (\d+) (\d+) ")


@dataclass(frozen=True, slots=True)
class Component:
    """One line item of an index: where a member's data lies."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK

    def entry(self) -> Entry:
        """As a file of the tar."""
        return Entry(self.name, self.offset, self.size, self.name)


def index_uri(tar_uri: str) -> str:
    """The index that belongs to a tar."""
    return tar_uri[: -len(".tar")] + INDEX_SUFFIX


def read_index(place: str, storage: Storage) -> list[Component]:
    """Components of an index in order of offset.

    Raises:
        ArchiveError: it is not such an index.
        StorageError: it cannot be read.
    """
    with storage.open(place) as handle:  # it knows the size, so an answer that was cut is no damage
        data = handle.read(MAX_INDEX_BYTES + 1)
    if len(data) > MAX_INDEX_BYTES:
        message = f"is of more than {MAX_INDEX_BYTES:,} bytes. Pack fewer files into one tar, or remove the index."
        raise ArchiveError(f"{place}: {message}")
    try:
        lines = data.decode("utf-8", "surrogateescape").splitlines()
        version, count = lines[0].split()
        if version != VERSION or int(count) != len(lines) - 1:
            raise ValueError(f"first line {lines[0][:80]!r} does not fit {len(lines) - 1} samples of {VERSION}")
        found = [component for line in lines[1:] for component in _components(line)]
    except (ValueError, IndexError) as error:
        raise ArchiveError(f"{place}: not a wds2idx index ({error}). Build it again or remove it.") from None
    return sorted(found, key=lambda component: component.offset)


def _components(line: str) -> Iterator[Component]:
    """Items `ext offset size name`; a name, which may hold blanks, ends with its `.ext`."""
    at = 0
    while at < len(line):
        item = ITEM.match(line, at)
        if item is None:
            raise ValueError(f"line {line[:80]!r} is not `ext offset size name` items")
        end = _end_of_name(line, item.end(), f".{item.group(1)}")
        yield Component(line[item.end() : end], int(item.group(2)), int(item.group(3)))
        at = end + 1


def _end_of_name(line: str, start: int, suffix: str) -> int:
    at = start
    while (found := line.find(suffix, at)) >= 0:
        end = found + len(suffix)
        if end == len(line) or (line[end] == " " and ITEM.match(line, end + 1)):
            return end
        at = found + 1
    raise ValueError(f"line {line[:80]!r} has a name that does not end with {suffix!r}")


def why_not_used(tar: FileInfo, index: FileInfo, storage: Storage) -> str:
    """Why an index cannot part a tar, as a sentence; "" when it can.

    Raises:
        StorageError: the storage failed.
    """
    not_used = "so it is not used, and the tar is read as one shard. Build it again."
    if tar.modified is not None and index.modified is not None and index.modified < tar.modified:
        return f"{index.uri}: is older than its tar, {not_used}"
    try:
        components = read_index(index.uri, storage)
    except ArchiveError as error:
        return f"{error} It is not used."
    if not components or not _covers(components, tar, storage):
        return f"{index.uri}: does not cover its tar, {not_used}"
    return ""


def _covers(components: list[Component], tar: FileInfo, storage: Storage) -> bool:
    """Whether nothing but zeros follows the last member that an index names."""
    end = components[-1].end
    if not BLOCK <= tar.size_bytes - end <= MAX_TAIL_BYTES:
        return False
    return not bytes(storage.read_range(tar.uri, end, tar.size_bytes)).strip(b"\0")


@dataclass(frozen=True, slots=True)
class Region:
    """The stretch of a tar whose headers one part reads: from byte `begin` up to `stop`."""

    begin: float
    stop: float


def region_of(components: list[Component], span: tuple[int, int]) -> Region:
    """The stretch of a span: members whose data begins in it, with the headers before them. Stretches leave no gap."""
    return Region(_begin(components, span[0]), _begin(components, span[1]))


def _begin(components: list[Component], place: int) -> float:
    before = sum(component.offset < place for component in components)
    if before == len(components):
        return float("inf")
    return components[before - 1].end if before else 0


def compare(region: Region, components: list[Component], scanned: list[Entry], uri: str, index: str) -> list[Entry]:
    """All files of a tar: those of a stretch as its headers have them, and the others as the index has them.

    Raises:
        ArchiveError: the index has other files in the stretch.
    """
    inside = [component.entry() for component in components if region.begin <= component.offset < region.stop]
    told = [entry for entry in scanned if entry.status != "unsafe_name"]
    if [(e.name, e.place, e.size) for e in inside] != [(e.name, e.place, e.size) for e in told]:
        raise ArchiveError(f"{uri}: {index} does not fit this tar. Build the index again, or remove it.")
    others = [c.entry() for c in components if not region.begin <= c.offset < region.stop]
    return sorted([*others, *scanned], key=lambda entry: entry.place)
