"""zip: the directory at the end names every member, so a large one can be read in parts."""

import zipfile
import zlib
from collections.abc import Iterator

from raydetect.archives.base import is_image_name
from raydetect.archives.naming import Naming
from raydetect.archives.samples import MAX_SIDECAR_BYTES, Entry, assemble, is_wanted, key_of
from raydetect.archives.tar import REPAIR, too_many_bytes
from raydetect.errors import ArchiveError
from raydetect.records import Member, Shard
from raydetect.spec import SourceSpec
from raydetect.storage import Storage

SUFFIXES = (".zip",)
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError)


def read_zip(shard: Shard, source: SourceSpec, storage: Storage, naming: Naming) -> Iterator[Member]:
    """Members of a zip shard, in order of their place in the file.

    Raises:
        ArchiveError: the directory cannot be read.
    """
    with storage.open(shard.uri) as handle:
        try:
            opened = zipfile.ZipFile(handle)
        except BROKEN as error:
            raise ArchiveError(f"{shard.uri}: not a zip with a readable directory ({error}). {REPAIR}") from None
        with opened:
            infos = sorted(opened.infolist(), key=lambda info: info.header_offset)
            infos = [info for info in infos if not info.is_dir() and is_wanted(info.filename)]
            start, stop = shard.span or (0, shard.size_bytes)
            seen = {
                key_of(shard.uri, info.filename)
                for info in infos
                if info.header_offset < start and is_image_name(info.filename)
            }
            mine = [info for info in infos if start <= info.header_offset < stop]
            entries = (_entry(opened, info, source, shard.uri) for info in mine)
            yield from assemble(shard.uri, "zip", entries, naming, seen)


def _entry(opened: zipfile.ZipFile, info: zipfile.ZipInfo, source: SourceSpec, uri: str) -> Entry:
    where = f"{uri}#{info.filename}"
    limit = source.max_image_bytes if is_image_name(info.filename) else MAX_SIDECAR_BYTES
    if info.file_size > limit:
        return too_many_bytes(info.filename, where, info.file_size, limit)
    if info.flag_bits & 0x1:
        return Entry(info.filename, status="corrupt", error=f"{where}: is encrypted. Pack it without a password.")
    try:
        with opened.open(info) as member:
            data = member.read(limit + 1)
    except BROKEN as error:
        return Entry(info.filename, status="corrupt", error=f"{where}: cannot be unpacked ({error}). Pack it again.")
    if len(data) > limit:
        return too_many_bytes(info.filename, where, len(data), limit)
    return Entry(info.filename, data)
