"""Loose images below a folder: consecutive files of the sorted listing make a shard, with the sidecars beside them."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from raydetect.archives.access import is_alone, others_of
from raydetect.archives.base import is_unsafe, readable, unsafe_name
from raydetect.archives.directory import ESCAPED, Directory, MemberReader, escaped
from raydetect.archives.path_patterns import Naming
from raydetect.archives.samples import Arrangement, Entry, Sample, arrange
from raydetect.config import SourceSpec
from raydetect.errors import MemberError, StorageError, UnreadableError
from raydetect.left_out import LeftOutCount
from raydetect.records import Member, Shard
from raydetect.storage import FileInfo, Storage, join_uri, relative_to

KINDS = {"link": "linked_folder", "other": "not_a_file"}  # why what is no file is left out


def group_files(
    root: str, files: Iterable[FileInfo], source: SourceSpec, left_out: LeftOutCount | None = None
) -> Iterator[Shard]:
    """Shards (index 0, to be numbered) of the images among `files`, which come sorted.

    Args:
        root: the folder that names are relative to.
        files: of it.
        source: the job file's words.
        left_out: counts every file that is in no shard.
    """
    left_out = LeftOutCount() if left_out is None else left_out
    found: list[FileInfo] = []
    for file in files:
        reason = KINDS.get(file.kind)
        if reason is None:
            found.append(file)
        else:
            left_out.add(reason, readable(relative_to(file.uri, root)))
    entries = [_entry(root, file, place) for place, file in enumerate(found)]
    arranged = arrange(entries)
    for entry, reason in arranged.left_out:
        left_out.add(reason, readable(entry.name))
    yield from _cut(root, arranged.samples, found, source)


def _entry(root: str, file: FileInfo, place: int) -> Entry:
    name = relative_to(file.uri, root)
    return Entry(name, place, file.size_bytes, name)


def _cut(root: str, samples: list[Sample], files: list[FileInfo], source: SourceSpec) -> Iterator[Shard]:
    group: list[Sample] = []
    held = 0
    for sample in samples:
        size = sample.entry.size
        if group and (len(group) == source.shard_images or held + size > source.split_bytes):
            yield _shard(root, group, files)
            group, held = [], 0
        group.append(sample)
        held += size
    if group:
        yield _shard(root, group, files)


def _shard(root: str, samples: Sequence[Sample], files: list[FileInfo]) -> Shard:
    listed, marks = [], []
    for sample in samples:
        beside_it = {suffix: _line(entry, files) for suffix, entry in sample.sidecars.items()}
        listed.append([*_line(sample.entry, files), *([beside_it] if beside_it else [])])
        marks += [_mark(entry, files) for entry in (sample.entry, *sample.sidecars.values())]
    return Shard(
        index=0,
        uri=root,
        format="prefix",
        size_bytes=sum(sample.entry.size for sample in samples),
        fingerprint=hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16],
        listing=zlib.compress(json.dumps(listed).encode()),
    )


def _line(entry: Entry, files: list[FileInfo]) -> list[Any]:
    return [entry.name, entry.size, files[entry.place].fingerprint]


def _mark(entry: Entry, files: list[FileInfo]) -> list[Any]:
    return [files[entry.place].uri, entry.size, files[entry.place].fingerprint]


def loose_names(shard: Shard) -> list[str]:
    """Names of the images of a prefix shard, below its URI."""
    return [str(line[0]) for line in _lines(shard)]


def _lines(shard: Shard) -> list[list[Any]]:
    """[name, bytes, fingerprint, sidecars by suffix] of every image; listings of older versions end after the bytes."""
    found: list[list[Any]] = json.loads(zlib.decompress(shard.listing))
    return found


def read_prefix(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    """Members of a prefix shard, one request for each image and sidecar.

    Raises:
        ChangedError: a file was changed since it was listed.
        StorageError: the storage failed, or refuses all files.
    """
    folder = Folder(shard, storage)
    reader, nothing = MemberReader(folder, source, naming, left_out), Arrangement()
    for sample in folder.samples:
        member = reader.member(sample, nothing)
        if member is not None:
            yield member


class Folder(Directory):
    """The files of a prefix shard."""

    scheme = ""

    def __init__(self, shard: Shard, storage: Storage) -> None:
        """Unpacks the listing; reads nothing."""
        self.uri, self._storage = shard.uri, storage
        self._prints: dict[str, str | None] = {}
        self.samples: list[Sample] = []
        for place, line in enumerate(_lines(shard)):
            sidecars = {suffix: self._listed(words, place) for suffix, words in (line[3] if line[3:] else {}).items()}
            self.samples.append(Sample(self._listed(line, place), sidecars))
        self.entries = [sample.entry for sample in self.samples]

    def _listed(self, line: Sequence[Any], place: int) -> Entry:
        name = str(line[0])
        self._prints[name] = line[2] if line[2:] else None
        return Entry(name, place, int(line[1]), name)

    def read(self, entry: Entry) -> bytes:
        """The bytes of a file.

        Raises:
            MemberError: unreadable; others can be read.
            ChangedError: it was changed since it was listed.
            StorageError: the storage failed, or refuses all files.
        """
        uri, fingerprint = join_uri(self.uri, entry.name), self._prints[entry.name]
        listed = None if fingerprint is None else FileInfo(uri, entry.size, fingerprint)
        try:
            return self._storage.read(uri, listed)
        except UnreadableError as error:
            if is_alone(error, self._storage, self._others(entry)):
                raise MemberError("unreadable", str(error).removeprefix(f"{uri}: ")) from None
            raise StorageError(str(error)) from error

    def finish(self, left_out: LeftOutCount) -> None:
        """A folder ends with its last file."""

    def key_of(self, entry: Entry) -> str:
        """The key of a file."""
        name = readable(entry.name)
        return f"{readable(self.uri)}#{name.encode('unicode_escape').decode() if is_unsafe(name) else name}"

    def safe_name(self, entry: Entry) -> str:
        """The name of a file as patterns see it; object stores have names with `//` or a `/` in front.

        Raises:
            MemberError: unsafe_name.
        """
        if is_unsafe(entry.name) or "." in entry.name.split("/"):
            raise unsafe_name(entry.name)
        return entry.name

    def uri_of(self, entry: Entry) -> str:
        """The file's own URL, or ours where its name is no UTF-8."""
        if readable(entry.raw) != entry.raw:
            return f"{ESCAPED}://{escaped(entry.raw)}::{self.uri}"
        return join_uri(self.uri, entry.raw)

    def _others(self, entry: Entry) -> Iterator[str]:
        """Files that are not empty: of this shard, else of the folder."""
        mine = [other.name for other in self.entries if other.name != entry.name and other.size]
        yield from (join_uri(self.uri, name) for name in mine)
        if not mine:
            yield from others_of(join_uri(self.uri, entry.name), self._storage.list(self.uri))
