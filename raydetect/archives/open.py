"""Opens a source, whatever its formats: lists its shards on the driver, reads one in a worker."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from raydetect.archives import parquet, tar
from raydetect.archives import zip as zip_format
from raydetect.archives.base import Archive, is_image_name
from raydetect.archives.naming import Naming
from raydetect.archives.prefix import group_files, read_prefix
from raydetect.errors import SpecError, StorageError
from raydetect.records import Member, Shard
from raydetect.spec import SourceSpec
from raydetect.storage import FileInfo, Storage, normalise_uri

CONTAINERS = {"tar": tar.SUFFIXES, "zip": zip_format.SUFFIXES, "parquet": parquet.SUFFIXES}
READERS = {
    "tar": tar.read_tar,
    "zip": zip_format.read_zip,
    "parquet": parquet.read_parquet,
    "prefix": read_prefix,
}


@dataclass(frozen=True, slots=True)
class MixedArchive(Archive):
    """One or several URIs of any format; see `Archive`."""

    source: SourceSpec
    storage: Storage
    naming: Naming

    def shards(self) -> Iterator[Shard]:
        """Lists every URI of the source, in the order given, each sorted."""
        found = [shard for uri in self.source.uris() for shard in self._list(normalise_uri(uri))]
        if not found:
            raise SpecError(
                f"{', '.join(self.source.uris())}: holds nothing of format {self.source.format}. "
                "Check source.uri, source.format and source.pattern."
            )
        containers = [(shard.uri, shard.span) for shard in found if shard.format != "prefix"]
        if len(set(containers)) != len(containers):
            raise SpecError("source.uri: names the same file twice. Name each archive once.")
        yield from (replace(shard, index=index) for index, shard in enumerate(found))

    def read(self, shard: Shard) -> Iterator[Member]:
        """Streams a shard with the reader of its format."""
        return READERS[shard.format](shard, self.source, self.storage, self.naming)

    def _list(self, uri: str) -> Iterator[Shard]:
        single = None if _is_glob(uri) else self.storage.info(uri)
        if single is not None:
            yield from self._single(single)
            return
        files = list(self.storage.list(uri)) if self.source.format != "prefix" else None
        if files is None:
            yield from group_files(_root(uri), self.storage.list(uri), self.source)
            return
        names = {file.uri for file in files}
        kinds = {file.uri: self._kind(file.uri) for file in files}
        for file in files:
            kind = kinds[file.uri]
            if kind is not None:
                yield from split_container(file, kind, self.source, names)
        if self.source.format == "auto":
            loose = [file for file in files if kinds[file.uri] is None]
            yield from group_files(_root(uri), loose, self.source)

    def _single(self, file: FileInfo) -> Iterator[Shard]:
        kind = self._kind(file.uri)
        if kind is None and self.source.format in CONTAINERS:
            kind = self.source.format
        if kind is not None:
            beside = {file.uri}
            if kind == "tar" and file.size_bytes > self.source.split_bytes and file.uri.endswith(".tar"):
                beside |= {tar.index_uri(file.uri)} if self.storage.exists(tar.index_uri(file.uri)) else set()
            yield from split_container(file, kind, self.source, beside)
        elif is_image_name(file.uri):
            yield from group_files(file.uri.rpartition("/")[0], [file], self.source)
        else:
            known = ", ".join(suffix for suffixes in CONTAINERS.values() for suffix in suffixes)
            raise SpecError(f"{file.uri}: is no archive or image by its name. Known: {known}; or set source.format.")

    def _kind(self, uri: str) -> str | None:
        formats = CONTAINERS if self.source.format == "auto" else {}
        if self.source.format in CONTAINERS:
            formats = {self.source.format: CONTAINERS[self.source.format]}
        lower = uri.lower()
        return next((kind for kind, ends in formats.items() if lower.endswith(ends)), None)


def open_archive(source: SourceSpec, storage: Storage) -> Archive:
    """The archive of a source; nothing is listed or read yet.

    Raises:
        SpecError: a bad URI or pattern.
    """
    for uri in source.uris():
        normalise_uri(uri)
    if not source.uris():
        raise SpecError("source.uri: names nothing. State a file, a folder or a glob.")
    return MixedArchive(source, storage, Naming.of(source))


def split_container(file: FileInfo, kind: str, source: SourceSpec, names: set[str]) -> Iterator[Shard]:
    """One shard, or byte ranges of a container that is larger than `split_bytes` and can be read in parts."""
    whole = Shard(0, file.uri, kind, file.size_bytes, file.fingerprint)
    random_access = kind in ("zip", "parquet") or (file.uri.endswith(".tar") and tar.index_uri(file.uri) in names)
    count = -(-file.size_bytes // source.split_bytes) if random_access else 1
    if count <= 1:
        yield whole
        return
    edges = [file.size_bytes * i // count for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield replace(whole, span=(start, stop), size_bytes=stop - start)


def _is_glob(uri: str) -> bool:
    return any(letter in uri for letter in "*?[")


def _root(uri: str) -> str:
    """The folder that names are relative to: what stands before the first wildcard."""
    if not _is_glob(uri):
        return uri
    fixed = []
    for part in uri.split("/"):
        if _is_glob(part):
            break
        fixed.append(part)
    root = "/".join(fixed)
    if root.endswith(":/"):
        raise StorageError(f"{uri}: the bucket itself cannot be a pattern. Name it.")
    return root
