"""What every archive shares: the contract, names, cutting into chunks, and the fingerprint of a listing."""

import abc
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from raydetect.errors import MemberError
from raydetect.left_out import LeftOutCount
from raydetect.records import Chunk, Member, Shard
from raydetect.storage import FileInfo

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".avif",
)  # fmt: skip
LEFT_BY_SYSTEMS = frozenset(
    {"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found"}
)
# The first bytes of the formats that are decoded; of TIFF and RIFF a few more are looked at.
IMAGE_STARTS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"P1", b"P2", b"P3", b"P4", b"P5", b"P6",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds.

    Attributes:
        shards: numbered from 0; the first one has what was left out beside them.
        notes: sentences that a person should read, such as that an index was not used.
    """

    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = ()


class Archive(abc.ABC):
    """Encoded images in shards. Cheap to build and to send to a worker."""

    @abc.abstractmethod
    def listing(self) -> Listing:
        """Lists the shards, sorted; reads no image data.

        Raises:
            StorageError: the storage cannot be reached or nothing is there.
            SpecError: nothing there fits the source's format.
        """

    def shards(self) -> Iterator[Shard]:
        """The shards of `listing`."""
        yield from self.listing().shards

    @abc.abstractmethod
    def read(self, shard: Shard, left_out: LeftOutCount | None = None) -> Iterator[Member]:
        """Streams the images of a shard in bounded memory. A bad member is yielded with a status.

        Args:
            shard: of the listing.
            left_out: counts every file of the shard that is no member.

        Raises:
            ArchiveError: the container is broken; the good members before the break were yielded.
            StorageError: the storage failed.
        """


def listed_file(shard: Shard) -> FileInfo:
    """The container of a shard as it was listed; of a part the size of the whole is not kept."""
    return FileInfo(shard.uri, shard.size_bytes if shard.span is None else -1, shard.fingerprint)


def is_image_name(name: str) -> bool:
    """Whether a member's suffix is one of an image format, in any case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def has_suffix(name: str) -> bool:
    """Whether a file's name has a suffix at all; without one its content says whether it is an image."""
    return "." in name.rpartition("/")[2].lstrip(".")


def begins_as_image(start: bytes) -> bool:
    """Whether bytes begin as those of an image format."""
    if start.startswith(b"RIFF"):
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"avif", b"avis", b"mif1")
    if start[:1] == b"P":
        return start.startswith(IMAGE_STARTS) and start[2:3].isspace()
    return start.startswith(IMAGE_STARTS)


def is_hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot, or is one that systems leave beside files (`__MACOSX`, `@eaDir`)."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in LEFT_BY_SYSTEMS for part in parts)


def readable(text: str) -> str:
    """Text in one line that UTF-8 can hold: a byte, surrogate or control becomes `\\xfc`, `\\ud83d` or `\\n`."""
    if any(ord(letter) < 32 for letter in text):
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
    """A name for comparing: in Unicode's NFC, since macOS writes names decomposed."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


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
        or "" in parts
        or "\\" in bare
        or (len(bare) > 1 and bare[1] == ":")
        or is_unsafe(bare)
    )
    if wrong:
        raise unsafe_name(name)
    return bare


def is_unsafe(name: str) -> bool:
    """Whether no URI can hold a name: it climbs out, chains, or has control characters."""
    return ".." in name.split("/") or "::" in name or any(ord(letter) < 32 for letter in name)


def unsafe_name(name: str) -> MemberError:
    """The error of a name that cannot stand in a URI."""
    message = f"member name {name!r} is absolute, climbs out, or holds characters no URI can. Rename it."
    return MemberError("unsafe_name", message)


def key_of(container_uri: str, name: str) -> str:
    """The key of a member; an unsafe name is kept as it is, for people."""
    try:
        return f"{readable(container_uri)}#{readable(safe_name(name))}"
    except MemberError:
        return f"{readable(container_uri)}#{readable(name).encode('unicode_escape').decode('ascii')}"


def split_key(key: str, image_uri: str) -> tuple[str, str]:
    """(container or folder, name of the member in it) of a row; either may hold `#` itself.

    Args:
        key: of the row.
        image_uri: of the row.
    """
    places = [place for place, letter in enumerate(key) if letter == "#"]
    for place in places:
        container, name = key[:place], key[place + 1 :]
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
    """Consecutive members in chunks; the last one of a shard is marked, and an empty shard gives one empty chunk.

    A pure function of the members: a chunk closes at `chunk_images` images or once `chunk_bytes` encoded bytes
    are in it. The last one holds what reading the members counted in `left_out`.
    """
    waiting: Chunk | None = None
    for number, group in enumerate(_groups(members, chunk_images, chunk_bytes)):
        if waiting is not None:
            yield waiting
        waiting = Chunk(shard.index, number, False, tuple(group))
    found = {} if left_out is None else dict(left_out.found)
    if waiting is None:
        yield Chunk(shard.index, 0, True, (), found)
    else:
        yield Chunk(waiting.shard, waiting.number, True, waiting.members, found)


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
