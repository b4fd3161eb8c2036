"""Opens a source, whatever its formats: lists its shards on the driver, reads one in a worker."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from raydetect.archives.access import is_alone, others_of
from raydetect.archives.base import Archive, Listing, is_hidden, is_unsafe, readable
from raydetect.archives.formats import parquet, tar, tar_index
from raydetect.archives.formats import zip as zip_format
from raydetect.archives.formats.loose_files import KINDS, group_files, read_prefix
from raydetect.archives.own_results import without_results
from raydetect.archives.path_patterns import Naming
from raydetect.archives.samples import left_out_reason
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError, SpecError, StorageError, UnreadableError
from raydetect.left_out import NAMED, WITHDRAWN, LeftOutCount, left_out_text
from raydetect.records import Member, Shard
from raydetect.storage import FileInfo, Storage, normalise_uri, relative_to

CONTAINERS = {"tar": tar.SUFFIXES, "zip": zip_format.SUFFIXES, "parquet": parquet.SUFFIXES}
Reader = Callable[[Shard, SourceSpec, Storage, Naming, LeftOutCount], Iterator[Member]]


@dataclass(slots=True)
class _Found:
    """What listing one source came upon."""

    shards: list[Shard] = field(default_factory=list)
    left_out: LeftOutCount = field(default_factory=LeftOutCount)
    notes: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    def take(self, files: list[FileInfo], given: str) -> None:
        """Notes the files of one URI of the source.

        Raises:
            SpecError: an earlier URI named one of them; its images would count twice.
        """
        for file in files:
            if file.uri in self.files:
                raise SpecError(f"source.uri: names the same file twice: {given} holds {file.uri} again. Name it once.")
        self.files.update(file.uri for file in files)


@dataclass(frozen=True, slots=True)
class MixedArchive(Archive):
    """One or several URIs of any format; see `Archive`.

    Attributes:
        source: the job file's words.
        storage: of it.
        naming: reads names of members.
        allows: whether a listed file may be read; others are left out.
    """

    source: SourceSpec
    storage: Storage
    naming: Naming
    allows: Callable[[str], bool]

    def listing(self) -> Listing:
        """Lists every URI of the source, in the order given, each sorted."""
        found = _Found()
        for uri in self.source.uris():
            self._list(uri, found)
        if not found.shards:
            told = left_out_text(found.left_out.found) or "nothing"
            raise SpecError(
                f"{', '.join(self.source.uris())}: holds nothing of format {self.source.format}; left out: {told}. "
                f"Check source.uri, source.format and source.pattern.{_hint(self.source)}"
            )
        numbered = [replace(shard, index=index) for index, shard in enumerate(found.shards)]
        numbered[0] = replace(numbered[0], left_out=dict(found.left_out.found))
        return Listing(tuple(numbered), tuple(found.notes))

    def read(self, shard: Shard, left_out: LeftOutCount | None = None) -> Iterator[Member]:
        """Streams a shard with the reader of its format."""
        left_out = LeftOutCount() if left_out is None else left_out
        started = False
        try:
            for member in READERS[shard.format](shard, self.source, self.storage, self.naming, left_out):
                started = True
                yield member
        except UnreadableError as error:
            if started or not is_alone(error, self.storage, others_of(shard.uri, self._files())):
                raise StorageError(str(error)) from error
            yield Member(shard.key, shard.uri, status="unreadable", error=str(error))

    def _list(self, given: str, found: _Found) -> None:
        uri, is_pattern = self._is_pattern(given)
        single = None if is_pattern else self.storage.info(uri)
        if single is not None:
            found.take([single], given)
            if self._is_allowed(single, given, found):
                self._add_single(single, found)
            return
        files, results = without_results(list(self.storage.glob(uri) if is_pattern else self.storage.list(uri)))
        found.take(files, given)
        found.notes += results
        root = _root(uri) if is_pattern else uri
        files = [file for file in files if self._is_allowed(file, relative_to(file.uri, root), found)]
        loose = [file for file in files if not self._add_container(file, root, files, found)]
        if self.source.format in ("auto", "prefix"):
            found.shards += group_files(root, loose, self.source, found.left_out)
        else:
            for file in loose:
                name = relative_to(file.uri, root)
                found.left_out.add(KINDS.get(file.kind) or _reason_beside_containers(name), readable(name))
        found.notes += _twice(files, root, found.shards)
        found.notes += [
            f"{file.uri}: is a link to a folder, which is not followed. Name it in source.uri to read it."
            for file in files
            if file.kind == "link"
        ][:NAMED]

    def _is_allowed(self, file: FileInfo, name: str, found: _Found) -> bool:
        allowed = self.allows(file.uri)
        if not allowed:
            found.left_out.add("linked_outside", readable(name))
        return allowed

    def _files(self) -> Iterator[FileInfo]:
        for given in self.source.uris():
            uri, is_pattern = self._is_pattern(given)
            single = None if is_pattern else self.storage.info(uri)
            if single is not None:
                yield single
            else:
                yield from self.storage.glob(uri) if is_pattern else self.storage.list(uri)

    def _is_pattern(self, given: str) -> tuple[str, bool]:
        """The URI, and whether it is a pattern: a path that is there is that path, whatever its letters."""
        uri = normalise_uri(given)
        has_wildcard = any(letter in uri for letter in "*?[")
        return uri, has_wildcard and not self.storage.exists(uri)

    def _add_single(self, file: FileInfo, found: _Found) -> None:
        if file.kind != "file":
            raise SpecError(f"{file.uri}: is a pipe, socket or device. Name a file or a folder.")
        kind = self._kind(file.uri)
        if kind is None and self.source.format in CONTAINERS:
            kind = self.source.format
        if kind is not None:
            index = None
            if kind == "tar" and file.size_bytes > self.source.split_bytes and file.uri.endswith(".tar"):
                uri = tar_index.index_uri(file.uri)
                index = self.storage.info(uri) if self.allows(uri) else None
            found.shards += self._split(file, kind, index, found.notes)
            return
        loose = list(group_files(file.uri.rpartition("/")[0], [file], self.source, found.left_out))
        if not loose:
            known = ", ".join(suffix for suffixes in CONTAINERS.values() for suffix in suffixes)
            raise SpecError(f"{file.uri}: is no archive or image by its name. Known: {known}; or set source.format.")
        found.shards += loose

    def _add_container(self, file: FileInfo, root: str, files: list[FileInfo], found: _Found) -> bool:
        """Takes a file that is a container, or the index of one; False when it is neither."""
        kind, name = self._kind(file.uri), relative_to(file.uri, root)
        if self._is_index(file, files):
            found.left_out.add("index", readable(name))
            return True
        if kind is None or is_hidden(name) or file.kind != "file":
            return False
        index = None
        if kind == "tar" and file.uri.endswith(".tar"):
            index = next((other for other in files if other.uri == tar_index.index_uri(file.uri)), None)
        found.shards += self._split(file, kind, index, found.notes)
        return True

    def _is_index(self, file: FileInfo, files: list[FileInfo]) -> bool:
        tar_uri = file.uri.removesuffix(tar_index.INDEX_SUFFIX) + ".tar"
        return file.uri.endswith(tar_index.INDEX_SUFFIX) and any(other.uri == tar_uri for other in files)

    def _split(self, file: FileInfo, kind: str, index: FileInfo | None, notes: list[str]) -> Iterator[Shard]:
        """One shard, or byte ranges of a container that is larger than `split_bytes` and can be read in parts."""
        if is_unsafe(file.uri.partition("://")[2]) or readable(file.uri) != file.uri:
            yield Shard(0, readable(file.uri), "unnamable", file.size_bytes, file.fingerprint)
            return
        whole = Shard(0, file.uri, kind, file.size_bytes, file.fingerprint)
        count = max(1, -(-file.size_bytes // self.source.split_bytes))
        if kind == "tar" and count > 1:
            why_not = "" if index is None else tar_index.why_not_used(file, index, self.storage)
            notes += [why_not] if why_not else []
            count = 1 if index is None or why_not else count
            whole = replace(whole, index_uri=tar_index.index_uri(file.uri) if count > 1 else "")
        if count == 1:
            yield whole
            return
        edges = [file.size_bytes * i // count for i in range(count + 1)]
        for start, stop in pairwise(edges):
            yield replace(whole, span=(start, stop), size_bytes=stop - start)

    def _kind(self, uri: str) -> str | None:
        formats = CONTAINERS if self.source.format == "auto" else {}
        if self.source.format in CONTAINERS:
            formats = {self.source.format: CONTAINERS[self.source.format]}
        lower = uri.lower()
        return next((kind for kind, ends in formats.items() if lower.endswith(ends)), None)


def open_archive(source: SourceSpec, storage: Storage, allows: Callable[[str], bool] = lambda _: True) -> Archive:
    """The archive of a source; nothing is listed or read yet.

    Args:
        source: the job file's words.
        storage: of it.
        allows: whether a listed file may be read, by its URI; those that may not are left out.

    Raises:
        SpecError: a bad URI or pattern.
    """
    for uri in source.uris():
        normalise_uri(uri)
    if not source.uris():
        raise SpecError("source.uri: names nothing. State a file, a folder or a glob.")
    return MixedArchive(source, storage, Naming.of(source), allows)


def _read_unnamable(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    raise ArchiveError(f"{shard.uri}: its name holds `..`, `::` or letters that no URI can. Rename it.")
    yield  # a generator, as the other readers


def _read_withdrawn(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    yield from ()


READERS: dict[str, Reader] = {
    "tar": tar.read_tar,
    "zip": zip_format.read_zip,
    "parquet": parquet.read_parquet,
    "prefix": read_prefix,
    "unnamable": _read_unnamable,
    WITHDRAWN: _read_withdrawn,
}


def _hint(source: SourceSpec) -> str:
    has_braces = any("{" in uri and "," in uri for uri in source.uris())
    return " Braces are no pattern: name each in a list." if has_braces else ""


def _reason_beside_containers(name: str) -> str:
    reason = left_out_reason(name)
    return reason if reason in ("hidden", "unknown_container") else "other_format"


def _twice(files: list[FileInfo], root: str, shards: list[Shard]) -> list[str]:
    """A sentence for each container beside a folder of its name, which most likely holds the same files."""
    folders = {file.uri.rpartition("/")[0] for file in files}
    notes = []
    for uri in sorted({shard.uri for shard in shards if shard.format in CONTAINERS}):
        stem = next(uri[: -len(end)] for ends in CONTAINERS.values() for end in ends if uri.lower().endswith(end))
        folder = next((name for name in folders if name == stem or name.startswith(f"{stem}/")), None)
        if folder is not None:
            notes.append(f"{uri}: stands beside a folder of its name, {stem}. If both hold the same images, name one.")
    return notes


def _root(uri: str) -> str:
    """The folder that names are relative to: what stands before the first wildcard."""
    fixed = []
    for part in uri.split("/"):
        if any(letter in part for letter in "*?["):
            break
        fixed.append(part)
    root = "/".join(fixed)
    if root.endswith(":/"):
        raise StorageError(f"{uri}: the bucket itself cannot be a pattern. Name it.")
    return root
