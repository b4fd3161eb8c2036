"""What every archive shares: the contract, safe names, cutting into chunks, and the fingerprint of a listing."""

import abc
import hashlib
import json
from collections.abc import Iterable, Iterator

from raydetect.errors import MemberError
from raydetect.records import Chunk, Member, Shard

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class Archive(abc.ABC):
    """Encoded images in shards. Cheap to build and to send to a worker."""

    @abc.abstractmethod
    def shards(self) -> Iterator[Shard]:
        """Lists the shards, sorted; reads no image data.

        Raises:
            StorageError: the storage cannot be reached or nothing is there.
            SpecError: nothing there fits the source's format.
        """

    @abc.abstractmethod
    def read(self, shard: Shard) -> Iterator[Member]:
        """Streams the images of a shard in bounded memory. A bad member is yielded with a status.

        Raises:
            ArchiveError: the container is broken; the good members before the break were yielded.
            StorageError: the storage failed.
        """


def is_image_name(name: str) -> bool:
    """Whether a member's suffix is one of an image format, in any case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def safe_name(name: str) -> str:
    """A member's name as it stands in keys: `./` at the front removed.

    Raises:
        MemberError: unsafe_name, when it is absolute, climbs with `..` or cannot stand in a URI.
    """
    bare = name
    while bare.startswith("./"):
        bare = bare[2:]
    parts = bare.split("/")
    wrong = (
        not bare
        or bare.startswith("/")
        or ".." in parts
        or "" in parts
        or "\\" in bare
        or "::" in bare
        or (len(bare) > 1 and bare[1] == ":")
        or any(ord(letter) < 32 for letter in bare)
    )
    if wrong:
        raise MemberError(
            "unsafe_name",
            f"member name {name!r} is absolute, climbs out, or holds characters no URI can. Rename it.",
        )
    return bare


def cut_chunks(shard: Shard, members: Iterable[Member], chunk_images: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Consecutive members in chunks; the last one of a shard is marked, and an empty shard gives one empty chunk.

    A pure function of the members: a chunk closes at `chunk_images` images or once `chunk_bytes` encoded bytes
    are in it.
    """
    waiting: Chunk | None = None
    for number, group in enumerate(_groups(members, chunk_images, chunk_bytes)):
        if waiting is not None:
            yield waiting
        waiting = Chunk(shard.index, number, False, tuple(group))
    if waiting is None:
        yield Chunk(shard.index, 0, True, ())
    else:
        yield Chunk(waiting.shard, waiting.number, True, waiting.members)


def _groups(members: Iterable[Member], chunk_images: int, chunk_bytes: int) -> Iterator[list[Member]]:
    group: list[Member] = []
    held = 0
    for member in members:
        group.append(member)
        held += len(member.data)
        if len(group) == chunk_images or held >= chunk_bytes:
            yield group
            group, held = [], 0
    if group:
        yield group


def archive_fingerprint(shards: Iterable[Shard]) -> str:
    """sha256 over every shard's URI, format, size, fingerprint and span, hex."""
    total = hashlib.sha256()
    for shard in shards:
        words = [shard.uri, shard.format, shard.size_bytes, shard.fingerprint, shard.span]
        total.update(json.dumps(words).encode() + b"\n")
    return total.hexdigest()
