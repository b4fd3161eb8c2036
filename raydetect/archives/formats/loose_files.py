"""Loose images in a folder: consecutive files of the sorted listing form a shard, together with their sidecars."""

import hashlib
import json
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any

from raydetect.archives.access import is_alone, others_of
from raydetect.archives.base import escaped_text, is_unsafe, unsafe_name
from raydetect.archives.directory import ESCAPED, ContainerDirectory, MemberReader, escaped
from raydetect.archives.path_patterns import Naming
from raydetect.archives.samples import Arrangement, Entry, Sample, arrange
from raydetect.config import SourceSpec
from raydetect.errors import MemberError, StorageError, UnreadableError
from raydetect.left_out import LeftOutCount
from raydetect.records import Member, Shard
from raydetect.storage import FileInfo, Storage, join_uri, relative_to

Line = list[Any]  # [name, bytes, fingerprint] of an image, and its sidecars by suffix if it has some
KINDS = {"link": "linked_folder", "other": "not_a_file"}  # reasons to leave out what is not a file


def group_files(
    root: str, files: Iterable[FileInfo], source: SourceSpec, left_out: LeftOutCount | None = None
) -> Iterator[Shard]:
    """Yields the shards of the images among `files`; all have index 0 and are numbered by the caller.

    Args:
        root: folder that names are relative to.
        files: files of the folder, sorted.
        source: settings of the source.
        left_out: counts the files that are not in any shard.
    """
    left_out = LeftOutCount() if left_out is None else left_out
    regular: list[FileInfo] = []
    for file in files:
        reason = KINDS.get(file.kind)
        if reason is None:
            regular.append(file)
        else:
            left_out.add(reason, escaped_text(relative_to(file.uri, root)))
    entries = [_entry(root, file, place) for place, file in enumerate(regular)]
    arranged = arrange(entries)
    for entry, reason in arranged.left_out:
        left_out.add(reason, escaped_text(entry.name))
    yield from cut_lines(root, [_described(sample, regular) for sample in arranged.samples], source)


def _entry(root: str, file: FileInfo, place: int) -> Entry:
    name = relative_to(file.uri, root)
    return Entry(name, place, file.size_bytes, name)


def regroup_files(shards: Iterable[Shard], seen: Container[object], source: SourceSpec) -> list[Shard]:
    """Shards of the images of prefix shards that are not among `seen` (see `file_key`); all have index 0."""
    regrouped: list[Shard] = []
    for root, listed in groupby(shards, lambda shard: shard.uri):
        lines = chain.from_iterable(map(lines_of, listed))
        regrouped += cut_lines(root, [line for line in lines if not _is_seen(root, line, seen)], source)
    return regrouped


def file_keys(shard: Shard) -> list[bytes]:
    """The key of each image of a prefix shard, whatever folder the shard was listed from."""
    return [file_key(join_uri(shard.uri, str(line[0])), line[2] if line[2:] else None) for line in lines_of(shard)]


def file_key(uri: str, fingerprint: str | None) -> bytes:
    """A hash of what makes a file the same: its URI and its content; None = of any content."""
    return hashlib.blake2b(json.dumps([uri, fingerprint]).encode(), digest_size=16).digest()


def _is_seen(root: str, line: Line, seen: Container[object]) -> bool:
    uri = join_uri(root, str(line[0]))
    return file_key(uri, line[2]) in seen or file_key(uri, None) in seen


def cut_lines(root: str, lines: Sequence[Line], source: SourceSpec) -> Iterator[Shard]:
    """Yields the shards of consecutive lines, all with index 0."""
    group: list[Line] = []
    group_bytes = 0
    for line in lines:
        size = int(line[1])
        if group and (len(group) == source.shard_images or group_bytes + size > source.split_bytes):
            yield shard_of_lines(root, group)
            group, group_bytes = [], 0
        group.append(line)
        group_bytes += size
    if group:
        yield shard_of_lines(root, group)


def shard_of_lines(root: str, lines: Sequence[Line]) -> Shard:
    """The shard of these lines, with index 0."""
    files = [file for line in lines for file in (line, *(line[3].values() if line[3:] else ()))]
    folder = root.rstrip("/")
    marks = [[f"{folder}/{file[0]}", file[1], file[2] if file[2:] else None] for file in files]
    return Shard(
        index=0,
        uri=root,
        format="prefix",
        size_bytes=sum(int(line[1]) for line in lines),
        fingerprint=hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16],
        listing=zlib.compress(json.dumps(lines).encode()),
    )


def _described(sample: Sample, files: list[FileInfo]) -> Line:
    sidecars = {suffix: _line(entry, files) for suffix, entry in sample.sidecars.items()}
    return [*_line(sample.entry, files), *([sidecars] if sidecars else [])]


def _line(entry: Entry, files: list[FileInfo]) -> list[Any]:
    return [entry.name, entry.size, files[entry.place].fingerprint]


def loose_names(shard: Shard) -> list[str]:
    """Returns the names of the images of a prefix shard, relative to its URI."""
    return [str(line[0]) for line in lines_of(shard)]


def lines_of(shard: Shard) -> list[Line]:
    """Returns [name, bytes, fingerprint, sidecars by suffix] of every image; older versions wrote the first two."""
    lines: list[Line] = json.loads(zlib.decompress(shard.listing))
    return lines


def key_of_line(root: str, line: Line) -> str:
    """Returns the key of the image of a line."""
    name = escaped_text(str(line[0]))
    return f"{escaped_text(root)}#{name.encode('unicode_escape').decode() if is_unsafe(name) else name}"


def read_prefix(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    """Yields the members of a prefix shard, with one request for each image and sidecar.

    Raises:
        ChangedError: a file has changed since it was listed.
        StorageError: the storage failed, or denies access to all files.
    """
    folder = Folder(shard, storage)
    reader, empty = MemberReader(folder, source, naming, left_out), Arrangement()
    for sample in folder.samples:
        member = reader.member(sample, empty)
        if member is not None:
            yield member


class Folder(ContainerDirectory):
    """The files of a prefix shard."""

    scheme = ""

    def __init__(self, shard: Shard, storage: Storage) -> None:
        """Unpacks the listing; reads nothing."""
        self.uri, self._storage = shard.uri, storage
        self._fingerprints: dict[str, str | None] = {}
        self.samples: list[Sample] = []
        for place, line in enumerate(lines_of(shard)):
            sidecars = {suffix: self._listed(fields, place) for suffix, fields in (line[3] if line[3:] else {}).items()}
            self.samples.append(Sample(self._listed(line, place), sidecars))
        self.entries = [sample.entry for sample in self.samples]

    def _listed(self, line: Sequence[Any], place: int) -> Entry:
        name = str(line[0])
        self._fingerprints[name] = line[2] if line[2:] else None
        return Entry(name, place, int(line[1]), name)

    def read(self, entry: Entry) -> bytes:
        """Reads a file.

        Raises:
            MemberError: unreadable: this file cannot be read, but others can.
            ChangedError: the file has changed since it was listed.
            StorageError: the storage failed, or denies access to all files.
        """
        uri, fingerprint = join_uri(self.uri, entry.name), self._fingerprints[entry.name]
        listed = None if fingerprint is None else FileInfo(uri, entry.size, fingerprint)
        try:
            return self._storage.read(uri, listed)
        except UnreadableError as error:
            if is_alone(error, self._storage, self._others(entry)):
                raise MemberError("unreadable", str(error).removeprefix(f"{uri}: ")) from None
            raise StorageError(str(error)) from error

    def finish(self, left_out: LeftOutCount) -> None:
        """Does nothing: a folder has no data after its last file."""

    def key_of(self, entry: Entry) -> str:
        """Returns the key of a file."""
        return key_of_line(self.uri, [entry.name])

    def safe_name(self, entry: Entry) -> str:
        """Returns the name of a file; unlike in containers it may have `//` or a leading `/`, as in object stores.

        Raises:
            MemberError: unsafe_name: the name cannot be used.
        """
        if is_unsafe(entry.name) or "." in entry.name.split("/"):
            raise unsafe_name(entry.name)
        return entry.name

    def uri_of(self, entry: Entry) -> str:
        """Returns the file's URL, or a `member` URL if its name is not UTF-8."""
        if escaped_text(entry.raw) != entry.raw:
            return f"{ESCAPED}://{escaped(entry.raw)}::{self.uri}"
        return join_uri(self.uri, entry.raw)

    def _others(self, entry: Entry) -> Iterator[str]:
        """Yields the URIs of other non-empty files of this shard; of the whole folder if the shard has none."""
        names = [other.name for other in self.entries if other.name != entry.name and other.size]
        yield from (join_uri(self.uri, name) for name in names)
        if not names:
            yield from others_of(join_uri(self.uri, entry.name), self._storage.list(self.uri))
