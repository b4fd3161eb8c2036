"""Reads the members of a shard, with bad ones handled as the job file specifies."""

from collections.abc import Iterator

from raydetect.archives.base import Archive, chunk_members
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError
from raydetect.left_out import LeftOutCount
from raydetect.records import OK, Chunk, Member, Shard


def read_chunks(
    archive: Archive, shard: Shard, source: SourceSpec, chunk_images: int, chunk_bytes: int
) -> Iterator[Chunk]:
    """Yields the members of a shard in chunks; the last one has the counts of left-out files.

    Raises:
        ArchiveError: the shard or a member is bad, and the source is set to `fail`.
        StorageError: the storage failed; the job stops and can be restarted.
    """
    left_out = LeftOutCount(dict(shard.left_out))
    members = read_members(archive, shard, source, left_out)
    yield from chunk_members(shard, members, chunk_images, chunk_bytes, left_out)


def read_members(
    archive: Archive, shard: Shard, source: SourceSpec, left_out: LeftOutCount | None = None
) -> Iterator[Member]:
    """Streams the members of a shard; a damaged shard ends with a `bad_shard` member if the source is set to `record`.

    Raises:
        ArchiveError: the shard or a member is bad, and the source is set to `fail`.
        StorageError: the storage failed; the job stops and can be restarted.
    """
    try:
        for member in archive.read(shard, left_out):
            if member.key == shard.key and source.on_bad_shard == "fail":
                raise ArchiveError(member.error)
            refuse_bad_member(member.status, member.error, source)
            yield member
    except ArchiveError as error:
        if isinstance(error, BadMemberError):
            raise
        if source.on_bad_shard == "fail":
            raise ArchiveError(f"{error} Or set source.on_bad_shard: record.") from error
        yield Member(shard.key, shard.uri, status="bad_shard", error=f"{error} Then score with --retry bad_shard.")


class BadMemberError(ArchiveError):
    """An image is bad, and `on_bad_member` is `fail`."""


def refuse_bad_member(status: str, error: str, source: SourceSpec) -> None:
    """Raises if a member is bad and `on_bad_member` is `fail`.

    Raises:
        BadMemberError: the member is bad.
    """
    if status != OK and source.on_bad_member == "fail":
        raise BadMemberError(f"{error} (status {status}). Repair it or set source.on_bad_member: row.")
