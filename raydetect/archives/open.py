"""Opens a source of any format: lists its shards on the driver and reads one shard in a worker."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from raydetect.archives.access import is_alone, others_of
from raydetect.archives.base import Archive, Listing, escaped_text, is_hidden, is_unsafe
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
class _Collected:
    """Shards, counts and notes collected while listing a source; `uris` are those of all files seen."""

    shards: list[Shard] = field(default_factory=list)
    left_out: LeftOutCount = field(default_factory=LeftOutCount)
    notes: list[str] = field(default_factory=list)
    uris: set[str] = field(default_factory=set)

    def add_files(self, files: list[FileInfo], given: str) -> None:
        """Records the files of one URI of the source.

        Raises:
            SpecError: a file belongs to an earlier URI too, so its images would count twice.
        """
        for file in files:
            if file.uri in self.uris:
                raise SpecError(
                    f"source.uri: names the same file twice: {given} contains {file.uri} again. List it once."
                )
        self.uris.update(file.uri for file in files)


@dataclass(frozen=True, slots=True)
class MixedArchive(Archive):
    """One or several URIs of any format; see `Archive`.

    Attributes:
        source: settings of the source.
        storage: storage of the source.
        naming: reads labels and categories from member names.
        allows: whether the file at a URI may be read; other files are left out.
    """

    source: SourceSpec
    storage: Storage
    naming: Naming
    allows: Callable[[str], bool]

    def listing(self) -> Listing:
        """Lists the URIs of the source in the given order, with the files of each sorted."""
        listed = _Collected()
        for uri in self.source.uris():
            self._list(uri, listed)
        if not listed.shards:
            left_out = left_out_text(listed.left_out.counts) or "nothing"
            raise SpecError(
                f"{', '.join(self.source.uris())}: contains nothing of format {self.source.format}; left out: "
                f"{left_out}. Check source.uri, source.format and source.pattern.{_hint(self.source)}"
            )
        numbered = [replace(shard, index=index) for index, shard in enumerate(listed.shards)]
        numbered[0] = replace(numbered[0], left_out=dict(listed.left_out.counts))
        return Listing(tuple(numbered), tuple(listed.notes))

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

    def _list(self, given: str, listed: _Collected) -> None:
        uri, is_pattern = self._is_pattern(given)
        single = None if is_pattern else self.storage.info(uri)
        if single is not None:
            listed.add_files([single], given)
            if self._is_allowed(single, given, listed):
                self._add_single(single, listed)
            return
        files, results = without_results(list(self.storage.glob(uri) if is_pattern else self.storage.list(uri)))
        listed.add_files(files, given)
        listed.notes += results
        root = _root(uri) if is_pattern else uri
        files = [file for file in files if self._is_allowed(file, relative_to(file.uri, root), listed)]
        by_uri = {file.uri: file for file in files}
        loose = [file for file in files if not self._add_container(file, root, by_uri, listed)]
        if self.source.format in ("auto", "prefix"):
            listed.shards += group_files(root, loose, self.source, listed.left_out)
        else:
            for file in loose:
                name = relative_to(file.uri, root)
                listed.left_out.add(KINDS.get(file.kind) or _reason_beside_containers(name), escaped_text(name))
        listed.notes += _twice(files, root, listed.shards)
        listed.notes += [
            f"{file.uri}: is a link to a folder and is not followed. Add it to source.uri to read it."
            for file in files
            if file.kind == "link"
        ][:NAMED]

    def _is_allowed(self, file: FileInfo, name: str, listed: _Collected) -> bool:
        allowed = self.allows(file.uri)
        if not allowed:
            listed.left_out.add("linked_outside", escaped_text(name))
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
        """Returns (URI, whether it is a pattern); an existing path is never a pattern, whatever characters it has."""
        uri = normalise_uri(given)
        has_wildcard = any(character in uri for character in "*?[")
        return uri, has_wildcard and not self.storage.exists(uri)

    def _add_single(self, file: FileInfo, listed: _Collected) -> None:
        if file.kind != "file":
            raise SpecError(f"{file.uri}: is a pipe, socket or device. Give a file or a folder.")
        kind = self._kind(file.uri)
        if kind is None and self.source.format in CONTAINERS:
            kind = self.source.format
        if kind is not None:
            index = None
            if kind == "tar" and file.size_bytes > self.source.split_bytes and file.uri.endswith(".tar"):
                uri = tar_index.index_uri(file.uri)
                index = self.storage.info(uri) if self.allows(uri) else None
            listed.shards += self._split(file, kind, index, listed.notes)
            return
        loose = list(group_files(file.uri.rpartition("/")[0], [file], self.source, listed.left_out))
        if not loose:
            known = ", ".join(suffix for suffixes in CONTAINERS.values() for suffix in suffixes)
            raise SpecError(
                f"{file.uri}: does not have the suffix of an archive or image. Known: {known}; or set source.format."
            )
        listed.shards += loose

    def _add_container(self, file: FileInfo, root: str, by_uri: dict[str, FileInfo], listed: _Collected) -> bool:
        """Adds a file if it is a container or the index of one; returns whether it is."""
        kind, name = self._kind(file.uri), relative_to(file.uri, root)
        if self._is_index(file, by_uri):
            listed.left_out.add("index", escaped_text(name))
            return True
        if kind is None or is_hidden(name) or file.kind != "file":
            return False
        index = None
        if kind == "tar" and file.uri.endswith(".tar"):
            index = by_uri.get(tar_index.index_uri(file.uri))
        listed.shards += self._split(file, kind, index, listed.notes)
        return True

    def _is_index(self, file: FileInfo, by_uri: dict[str, FileInfo]) -> bool:
        tar_uri = file.uri.removesuffix(tar_index.INDEX_SUFFIX) + ".tar"
        return file.uri.endswith(tar_index.INDEX_SUFFIX) and tar_uri in by_uri

    def _split(self, file: FileInfo, kind: str, index: FileInfo | None, notes: list[str]) -> Iterator[Shard]:
        """Yields one shard, or the parts of a container that is larger than `split_bytes` and can be read in parts."""
        if is_unsafe(file.uri.partition("://")[2]) or escaped_text(file.uri) != file.uri:
            yield Shard(0, escaped_text(file.uri), "unnamable", file.size_bytes, file.fingerprint)
            return
        whole = Shard(0, file.uri, kind, file.size_bytes, file.fingerprint)
        count = max(1, -(-file.size_bytes // self.source.split_bytes))
        if kind == "tar" and count > 1:
            reason = "" if index is None else tar_index.unusable_reason(file, index, self.storage)
            notes += [reason] if reason else []
            count = 1 if index is None or reason else count
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
        return next((kind for kind, suffixes in formats.items() if lower.endswith(suffixes)), None)


def open_archive(source: SourceSpec, storage: Storage, allows: Callable[[str], bool] = lambda _: True) -> Archive:
    """Returns the archive of a source; lists and reads nothing yet.

    Args:
        source: settings of the source.
        storage: storage of the source.
        allows: whether the file at a URI may be read; other files are left out.

    Raises:
        SpecError: a URI or pattern is invalid.
    """
    for uri in source.uris():
        normalise_uri(uri)
    if not source.uris():
        raise SpecError("source.uri: is empty. Give a file, a folder or a glob.")
    return MixedArchive(source, storage, Naming.of(source), allows)


def _read_unnamable(
    shard: Shard, source: SourceSpec, storage: Storage, naming: Naming, left_out: LeftOutCount
) -> Iterator[Member]:
    raise ArchiveError(f"{shard.uri}: its name has `..`, `::` or characters that are not allowed in a URI. Rename it.")
    yield  # makes this a generator, like the other readers


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
    return " Braces are not expanded: give a list of URIs." if has_braces else ""


def _reason_beside_containers(name: str) -> str:
    reason = left_out_reason(name)
    return reason if reason in ("hidden", "unknown_container") else "other_format"


def _twice(files: list[FileInfo], root: str, shards: list[Shard]) -> list[str]:
    """Returns a note for each container beside a folder of the same name, which probably has the same files."""
    folders = {file.uri.rpartition("/")[0] for file in files}
    notes = []
    for uri in sorted({shard.uri for shard in shards if shard.format in CONTAINERS}):
        suffix = next(s for suffixes in CONTAINERS.values() for s in suffixes if uri.lower().endswith(s))
        stem = uri[: -len(suffix)]
        folder = next((name for name in folders if name == stem or name.startswith(f"{stem}/")), None)
        if folder is not None:
            notes.append(
                f"{uri}: is beside a folder of the same name, {stem}. If both have the same images, give only one."
            )
    return notes


def _root(uri: str) -> str:
    """Returns the folder before the first wildcard, to which names are relative."""
    fixed = []
    for part in uri.split("/"):
        if any(character in part for character in "*?["):
            break
        fixed.append(part)
    root = "/".join(fixed)
    if root.endswith(":/"):
        raise StorageError(f"{uri}: the bucket cannot be a pattern. Give its name.")
    return root
