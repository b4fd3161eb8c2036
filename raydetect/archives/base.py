"""The archive interface, and what all formats share: names, chunks, and the fingerprint of a listing."""

import abc
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from raydetect.errors import MemberError
from raydetect.left_out import LeftOutCount
from raydetect.records import Chunk, Member, Shard
from raydetect.storage import FileInfo

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".avif",
    ".jp2", ".j2k",
)  # fmt: skip
CONTROL = re.compile(r"[\x00-\x1f]")
LEFT_BY_SYSTEMS = frozenset(
    {"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found"}
)
# First bytes of the supported image formats; RIFF, AVIF and PNM are checked further in `begins_as_image`.
IMAGE_STARTS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listing:
    """The shards of a source.

    Attributes:
        shards: numbered from 0; the first one has the counts of files that the listing left out.
        notes: messages for the user, such as that an index is not used.
    """

    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = ()


class Archive(abc.ABC):
    """Encoded images in shards. Cheap to create and to send to a worker."""

    @abc.abstractmethod
    def listing(self) -> Listing:
        """Lists the shards, sorted; reads no image data.

        Raises:
            StorageError: the storage cannot be reached, or the URI does not exist.
            SpecError: no file has the source's format.
        """

    def shards(self) -> Iterator[Shard]:
        """Yields the shards of `listing`."""
        yield from self.listing().shards

    @abc.abstractmethod
    def read(self, shard: Shard, left_out: LeftOutCount | None = None) -> Iterator[Member]:
        """Streams the images of a shard in bounded memory. Yields bad members too, with their status.

        Args:
            shard: a shard of the listing.
            left_out: counts the files of the shard that are not members.

        Raises:
            ArchiveError: the container is damaged; members before the damage have been yielded.
            StorageError: the storage failed.
        """


def listed_file(shard: Shard) -> FileInfo:
    """Returns the container of a shard as listed; the size is unknown (-1) if the shard is only a part of it."""
    return FileInfo(shard.uri, shard.size_bytes if shard.span is None else -1, shard.fingerprint)


def is_image_name(name: str) -> bool:
    """Whether a name has the suffix of an image format, ignoring case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def has_suffix(name: str) -> bool:
    """Whether a file name has a suffix; files without one are checked by content."""
    return "." in name.rpartition("/")[2].lstrip(".")


def begins_as_image(start: bytes) -> bool:
    """Whether a file that starts with these bytes (at least 16, if it has them) has an image format."""
    if start.startswith(b"RIFF"):
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"avif", b"avis", b"mif1")
    if start[:1] == b"P":
        return start.startswith(IMAGE_STARTS) and start[2:3].isspace()
    return start.startswith(IMAGE_STARTS)


def is_hidden(name: str) -> bool:
    """Whether a path segment starts with a dot or is created by an operating system (`__MACOSX`, `@eaDir`)."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in LEFT_BY_SYSTEMS for part in parts)


def escaped_text(text: str) -> str:
    """Escapes bytes, surrogates and control characters as `\\xfc`, `\\ud83d` and `\\n`: one line of valid UTF-8."""
    if CONTROL.search(text):
        text = "".join(letter if ord(letter) >= 32 else repr(letter)[1:-1] for letter in text)
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:
            return text.encode("utf-8", "backslashreplace").decode()
    return text


def composed(name: str) -> str:
    """Normalises a name to NFC for comparison, as macOS writes decomposed names."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def safe_name(name: str) -> str:
    """Returns a member's name as used in keys, without leading `./`.

    Raises:
        MemberError: unsafe_name: it is absolute, contains `..`, or is not allowed in a URI.
    """
    bare = name
    while bare.startswith("./"):
        bare = bare[2:]
    parts = bare.split("/")
    wrong = (
        not bare
        or bare.startswith("/")
        or "" in parts
        or "\\" in bare
        or (len(bare) > 1 and bare[1] == ":")
        or is_unsafe(bare)
    )
    if wrong:
        raise unsafe_name(name)
    return bare


def is_unsafe(name: str) -> bool:
    """Whether a name is not allowed in a URI: it contains `..` segments, `::` or control characters."""
    return ".." in name.split("/") or "::" in name or CONTROL.search(name) is not None


def unsafe_name(name: str) -> MemberError:
    """Returns the error for a name that is not allowed in a URI."""
    message = f"member name {name!r} is absolute, contains `..`, or is not allowed in a URI. Rename it."
    return MemberError("unsafe_name", message)


def key_of(container_uri: str, name: str) -> str:
    """Returns the key of a member; an unsafe name is included with escapes, so that users can identify it."""
    try:
        return f"{escaped_text(container_uri)}#{escaped_text(safe_name(name))}"
    except MemberError:
        return f"{escaped_text(container_uri)}#{escaped_text(name).encode('unicode_escape').decode('ascii')}"


def split_key(key: str, image_uri: str) -> tuple[str, str]:
    """Splits a key into (container or folder, member name); both may contain `#`.

    Args:
        key: the row's key.
        image_uri: the row's image URI, which shows where to split.
    """
    for position in (i for i, letter in enumerate(key) if letter == "#"):
        container, name = key[:position], key[position + 1 :]
        if image_uri.endswith(f"::{container}") or image_uri in (container, f"{container}/{name}"):
            return container, name
    container, _, name = key.partition("#")
    return container, name


def chunk_members(
    shard: Shard,
    members: Iterable[Member],
    chunk_images: int,
    chunk_bytes: int,
    left_out: LeftOutCount | None = None,
) -> Iterator[Chunk]:
    """Groups consecutive members into chunks; marks the last one. An empty shard yields one empty chunk.

    A pure function of the members: a chunk ends at `chunk_images` images or as soon as it has `chunk_bytes` encoded
    bytes. The last one has the counts of `left_out`.
    """
    waiting: Chunk | None = None
    for number, group in enumerate(_groups(members, chunk_images, chunk_bytes)):
        if waiting is not None:
            yield waiting
        waiting = Chunk(shard.index, number, False, tuple(group))
    counts = {} if left_out is None else dict(left_out.counts)
    if waiting is None:
        yield Chunk(shard.index, 0, True, (), counts)
    else:
        yield Chunk(waiting.shard, waiting.number, True, waiting.members, counts)


def _groups(members: Iterable[Member], chunk_images: int, chunk_bytes: int) -> Iterator[list[Member]]:
    group: list[Member] = []
    size = 0
    for member in members:
        group.append(member)
        size += len(member.data)
        if len(group) == chunk_images or size >= chunk_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def archive_fingerprint(shards: Iterable[Shard]) -> str:
    """Returns the hex sha256 over URI, format, size, fingerprint and span of all shards."""
    digest = hashlib.sha256()
    for shard in shards:
        fields = [shard.uri, shard.format, shard.size_bytes, shard.fingerprint, shard.span]
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()
