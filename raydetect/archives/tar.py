"""tar, tar.gz and tar.zst, streamed from front to back; an uncompressed tar with an index can be read in parts.

The index is the one of NVIDIA DALI's wds2idx: a text file `day.idx` beside `day.tar`.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import zstandard

from raydetect.archives.base import is_image_name
from raydetect.archives.naming import Naming
from raydetect.archives.samples import MAX_SIDECAR_BYTES, Entry, assemble, is_wanted, key_of
from raydetect.errors import ArchiveError
from raydetect.records import Member, Shard
from raydetect.spec import SourceSpec
from raydetect.storage import Storage

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
INDEX_SUFFIX = ".idx"
BLOCK = 512
DRAIN_BYTES = 1 << 20
FEED_BYTES = 4096  # of a zstd frame at a time; they become 128 MB at most
BROKEN = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, UnicodeDecodeError)
REPAIR = "Re-upload the shard or set source.on_bad_shard: record."


class _StrictTarInfo(tarfile.TarInfo):
    """The standard library takes a damaged header, or none, after a member for the end; here it is an error.

    A tar ends with blocks of zeros, so one that was cut between two members is told from a whole one.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged member header ({error})") from None
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("cut between two members: it has no end-of-archive block") from None


def read_tar(shard: Shard, source: SourceSpec, storage: Storage, naming: Naming) -> Iterator[Member]:
    """Members of a tar shard.

    Raises:
        ArchiveError: the tar or its index is broken.
    """
    if shard.span is None:
        scheme = "tarzst" if shard.uri.endswith(".zst") else "tar"
        return assemble(shard.uri, scheme, _stream(shard, source, storage), naming)
    components = read_index(shard.uri, storage)
    first = shard.span[0]
    seen = {key_of(shard.uri, c.name) for c in components if c.offset < first and is_image_name(c.name)}
    return assemble(shard.uri, "tar", _indexed(shard, components, source, storage), naming, seen)


def _stream(shard: Shard, source: SourceSpec, storage: Storage) -> Iterator[Entry]:
    last = "its start"
    with storage.open(shard.uri) as raw:
        try:
            with _decompressed(raw, shard.uri) as plain:
                with tarfile.open(fileobj=plain, mode="r|", tarinfo=_StrictTarInfo) as tar:
                    for info in tar:
                        entry = _entry(tar, info, source, shard.uri)
                        if entry is not None:
                            yield entry
                        last = info.name
                while plain.read(DRAIN_BYTES):  # a compressed stream checks its own sum at its end
                    pass
        except BROKEN as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ArchiveError(f"{shard.uri}: broken after {last!r} ({reason}). {REPAIR}") from None


def _decompressed(raw: IO[bytes], uri: str) -> Any:
    if uri.endswith((".gz", ".tgz")):
        return gzip.GzipFile(fileobj=raw)
    if uri.endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(raw), DRAIN_BYTES)
    return raw


class _ZstdFrames(io.RawIOBase):
    """What zstd frames hold; a frame that ends early is an error, which zstandard's own reader takes for the end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._packed, self._plain = raw, b"", memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._raw.read(FEED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("a zstd frame ends early")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count


def _entry(tar: tarfile.TarFile, info: tarfile.TarInfo, source: SourceSpec, uri: str) -> Entry | None:
    if info.isdir() or not is_wanted(info.name):
        return None
    where = f"{uri}#{info.name}"
    if not info.isreg():
        if not is_image_name(info.name):
            return None
        return Entry(info.name, status="unsafe_name", error=f"{where}: is a link or device, not a file. Pack the file.")
    limit = source.max_image_bytes if is_image_name(info.name) else MAX_SIDECAR_BYTES
    if info.size > limit:
        return too_many_bytes(info.name, where, info.size, limit)
    handle = tar.extractfile(info)
    assert handle is not None
    data = handle.read()
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name!r} has {len(data):,} of {info.size:,} bytes")
    return Entry(info.name, data)


def too_many_bytes(name: str, where: str, size: int, limit: int) -> Entry:
    """The entry of a member that is larger than allowed."""
    message = f"{where}: {size:,} bytes are more than the limit of {limit:,}. Raise source.max_image_bytes."
    return Entry(name, status="too_many_bytes", error=message)


@dataclass(frozen=True, slots=True)
class Component:
    """One line item of an index: where a member's data lies."""

    name: str
    offset: int
    size: int


def index_uri(tar_uri: str) -> str:
    """The index that belongs to a tar."""
    return tar_uri[: -len(".tar")] + INDEX_SUFFIX


def read_index(tar_uri: str, storage: Storage) -> list[Component]:
    """Components of a wds2idx index in order of offset.

    Raises:
        ArchiveError: it is not such an index.
    """
    place = index_uri(tar_uri)
    try:
        lines = storage.read(place).decode().splitlines()
        version, count = lines[0].split()
        if not version.startswith("v1.") or int(count) != len(lines) - 1:
            raise ValueError(f"first line {lines[0]!r} does not fit {len(lines) - 1} samples")
        found = [component for line in lines[1:] for component in _components(line, version)]
    except (ValueError, IndexError) as error:
        raise ArchiveError(f"{place}: not a wds2idx index ({error}). Build it again or remove it.") from None
    return sorted(found, key=lambda component: component.offset)


def _components(line: str, version: str) -> Iterator[Component]:
    words = line.split(" ")
    if version != "v1.2" or len(words) % 4:
        raise ValueError(f"line {line[:80]!r} is not `ext offset size name` items of v1.2")
    for i in range(0, len(words), 4):
        yield Component(words[i + 3], int(words[i + 1]), int(words[i + 2]))


def _indexed(shard: Shard, components: list[Component], source: SourceSpec, storage: Storage) -> Iterator[Entry]:
    assert shard.span is not None
    start, stop = shard.span
    with storage.open(shard.uri) as handle:
        for component in components:
            if start <= component.offset < stop and is_wanted(component.name):
                yield _read_component(handle, component, source, shard.uri)


def _read_component(handle: IO[bytes], component: Component, source: SourceSpec, uri: str) -> Entry:
    where = f"{uri}#{component.name}"
    handle.seek(component.offset - BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(handle.read(BLOCK), "utf-8", "surrogateescape")
        fits = header.size == component.size and header.isreg()
    except tarfile.HeaderError:
        fits = False
    if not fits:
        raise ArchiveError(f"{where}: {index_uri(uri)} does not fit this tar. Build the index again.")
    if component.size > source.max_image_bytes:
        return too_many_bytes(component.name, where, component.size, source.max_image_bytes)
    data = handle.read(component.size)
    if len(data) != component.size:
        raise ArchiveError(f"{where}: truncated after {len(data):,} of {component.size:,} bytes. {REPAIR}")
    return Entry(component.name, data)
