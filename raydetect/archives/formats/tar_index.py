"""The index for reading a tar in parts: a text file `day.idx` beside `day.tar`, in the format of NVIDIA DALI's wds2idx.

It is never trusted: the driver checks that it covers the tar, and every part compares it with the headers of its own
bytes.
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
    """One item of an index: a member with the byte offset and size of its data."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Byte offset of the next header."""
        return self.offset + -(-self.size // BLOCK) * BLOCK

    def entry(self) -> Entry:
        """Returns the item as a file of the tar."""
        return Entry(self.name, self.offset, self.size, self.name)


def index_uri(tar_uri: str) -> str:
    """Returns the URI of the index of a tar."""
    return tar_uri[: -len(".tar")] + INDEX_SUFFIX


def read_index(uri: str, storage: Storage) -> list[Component]:
    """Reads the components of an index, sorted by offset.

    Raises:
        ArchiveError: the file is not an index, or is too large.
        StorageError: the file cannot be read.
    """
    with storage.open(uri) as handle:  # raises StorageError if the response is truncated
        data = handle.read(MAX_INDEX_BYTES + 1)
    if len(data) > MAX_INDEX_BYTES:
        message = f"has more than {MAX_INDEX_BYTES:,} bytes. Pack fewer files into one tar, or remove the index."
        raise ArchiveError(f"{uri}: {message}")
    try:
        lines = data.decode("utf-8", "surrogateescape").splitlines()
        version, count = lines[0].split()
        if version != VERSION or int(count) != len(lines) - 1:
            raise ValueError(f"first line {lines[0][:80]!r} does not match {len(lines) - 1} samples of {VERSION}")
        components = [component for line in lines[1:] for component in _components(line)]
    except (ValueError, IndexError) as error:
        raise ArchiveError(f"{uri}: not a wds2idx index ({error}). Rebuild or remove it.") from None
    return sorted(components, key=lambda component: component.offset)


def _components(line: str) -> Iterator[Component]:
    """Parses items `ext offset size name`; a name may contain spaces and ends with its `.ext`."""
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
    while (position := line.find(suffix, at)) >= 0:
        end = position + len(suffix)
        if end == len(line) or (line[end] == " " and ITEM.match(line, end + 1)):
            return end
        at = position + 1
    raise ValueError(f"line {line[:80]!r} has a name that does not end with {suffix!r}")


def unusable_reason(tar: FileInfo, index: FileInfo, storage: Storage) -> str:
    """Returns the reason why an index cannot be used to split a tar, as a sentence; "" if it can.

    Raises:
        StorageError: the storage failed.
    """
    not_used = "so it is not used, and the tar is read as one shard. Rebuild it."
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
    """Whether only zeros follow the last member of an index."""
    end = components[-1].end
    if not BLOCK <= tar.size_bytes - end <= MAX_TAIL_BYTES:
        return False
    return not bytes(storage.read_range(tar.uri, end, tar.size_bytes)).strip(b"\0")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes [begin, stop) of a tar, whose headers one part reads."""

    begin: float
    stop: float


def byte_range_of(components: list[Component], span: tuple[int, int]) -> ByteRange:
    """Returns the bytes of a span: members whose data starts in it, with their headers. Ranges have no gaps."""
    return ByteRange(_begin(components, span[0]), _begin(components, span[1]))


def _begin(components: list[Component], offset: int) -> float:
    before = sum(component.offset < offset for component in components)
    if before == len(components):
        return float("inf")
    return components[before - 1].end if before else 0


def compare(
    byte_range: ByteRange, components: list[Component], scanned: list[Entry], uri: str, index: str
) -> list[Entry]:
    """Returns all files of a tar: those in the byte range from its headers, the others from the index.

    Raises:
        ArchiveError: index and headers differ in the byte range.
    """
    inside = [component.entry() for component in components if byte_range.begin <= component.offset < byte_range.stop]
    indexable = [entry for entry in scanned if entry.status != "unsafe_name"]
    if [(e.name, e.place, e.size) for e in inside] != [(e.name, e.place, e.size) for e in indexable]:
        raise ArchiveError(f"{uri}: {index} does not match this tar. Rebuild or remove the index.")
    others = [c.entry() for c in components if not byte_range.begin <= c.offset < byte_range.stop]
    return sorted([*others, *scanned], key=lambda entry: entry.place)
