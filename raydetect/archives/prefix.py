"""Loose images below a folder: consecutive files of the sorted listing make a shard."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence

from raydetect.archives.base import is_image_name, safe_name
from raydetect.archives.naming import Naming
from raydetect.archives.samples import key_of
from raydetect.errors import MemberError
from raydetect.records import Member, Shard
from raydetect.spec import SourceSpec
from raydetect.storage import FileInfo, Storage, join_uri, relative_to


def group_files(root: str, files: Iterable[FileInfo], source: SourceSpec) -> Iterator[Shard]:
    """Shards (index 0, to be numbered) of the images among `files`, which come sorted."""
    group: list[FileInfo] = []
    held = 0
    for file in files:
        if not is_image_name(file.uri):
            continue
        if group and (len(group) == source.shard_images or held + file.size_bytes > source.split_bytes):
            yield _shard(root, group)
            group, held = [], 0
        group.append(file)
        held += file.size_bytes
    if group:
        yield _shard(root, group)


def _shard(root: str, files: Sequence[FileInfo]) -> Shard:
    names = [(relative_to(file.uri, root), file.size_bytes) for file in files]
    marks = json.dumps([[file.uri, file.size_bytes, file.fingerprint] for file in files]).encode()
    return Shard(
        index=0,
        uri=root,
        format="prefix",
        size_bytes=sum(file.size_bytes for file in files),
        fingerprint=hashlib.sha256(marks).hexdigest()[:16],
        listing=zlib.compress(json.dumps(names).encode()),
    )


def loose_names(shard: Shard) -> list[str]:
    """Names of the images of a prefix shard, below its URI."""
    return [name for name, _ in _listed(shard)]


def _listed(shard: Shard) -> list[tuple[str, int]]:
    return [(name, size) for name, size in json.loads(zlib.decompress(shard.listing))]


def read_prefix(shard: Shard, source: SourceSpec, storage: Storage, naming: Naming) -> Iterator[Member]:
    """Members of a prefix shard, one request each."""
    for name, size in _listed(shard):
        uri = join_uri(shard.uri, name)
        key = key_of(shard.uri, name)
        try:
            facts = naming.read(safe_name(name))
        except MemberError as error:
            yield Member(key, uri, status=error.status, error=f"{shard.uri}: {error}")
            continue
        if facts is None:
            continue
        if size > source.max_image_bytes:
            message = f"{key}: {size:,} bytes are more than source.max_image_bytes. Raise it if genuine."
            yield Member(key, uri, status="too_many_bytes", error=message)
            continue
        yield Member(
            key,
            uri,
            data=storage.read(uri),
            label=facts.label,
            category=facts.category,
            defect=facts.defect,
            mask_uri=None if facts.mask_name is None else join_uri(shard.uri, facts.mask_name),
        )
