"""raydetect's own exceptions; each message says what is wrong, with which value, where, and what to do."""

import json
from typing import Any

from raydetect.redaction import redacted


class RaydetectError(Exception):
    """Base class of raydetect's exceptions; `exit_code` is the exit code of the command line.

    Pickling keeps class, message and attributes, whatever the constructor's arguments. Credentials in URIs are redacted
    from the message.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), dict(self.__dict__))


class SpecError(RaydetectError, ValueError):
    """The job file, an option, a parameter or an argument is invalid; raised before any cluster is used."""

    exit_code = 2


class StorageError(RaydetectError):
    """A file, folder or bucket cannot be reached, read or written."""


class UnreadableError(StorageError):
    """One object cannot be read permanently: it is archived, missing, or not accessible. Others may be readable.

    Args:
        message: one sentence.
        is_denied: access was denied, which may apply to all objects.
    """

    def __init__(self, message: str, is_denied: bool = False) -> None:
        super().__init__(message)
        self.is_denied = is_denied


class MissingError(UnreadableError):
    """There is nothing at the URI."""

    exit_code = 2


class NotAFileError(UnreadableError):
    """There is a folder at the URI, or a file where the URI has a folder."""

    exit_code = 2


class ChangedError(StorageError):
    """A file has changed since it was listed."""


class IncompleteError(StorageError):
    """All shards of a run are scored, but records or files of them are missing."""


class DamagedError(StorageError):
    """A file that raydetect wrote has different content now."""


class ArtifactError(RaydetectError):
    """An artifact is missing, damaged or in a newer format."""

    exit_code = 2


class ResumeError(RaydetectError):
    """The results directory belongs to another spec, artifact or archive."""

    exit_code = 2


class ArchiveError(RaydetectError):
    """A whole shard cannot be read (truncated, not a tar, broken directory)."""


class MemberError(RaydetectError):
    """One image cannot be used; becomes a row with this status, never a score.

    Args:
        status: one of `records.BAD_STATUSES`.
        message: one sentence for the row's `error` column.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class TooManyBadRows(RaydetectError):
    """The run finished, but more than `max_bad_fraction` of its rows or shards are bad."""

    exit_code = 3


class AlarmRaised(RaydetectError):
    """The audit finished, and a rule raised an alarm."""

    exit_code = 4


def is_outage(error: RaydetectError) -> bool:
    """Whether the storage failed, so that the same job may succeed later."""
    return isinstance(error, StorageError) and not isinstance(error, MissingError | NotAFileError | DamagedError)


def error_text(error: RaydetectError) -> str:
    """Serialises kind, message and attributes to JSON, for another process."""
    return json.dumps([type(error).__name__, str(error), error.__dict__])


def error_of(text: str) -> RaydetectError:
    """Restores an error from `error_text`."""
    name, message, attributes = json.loads(text)
    return _rebuild(error_kind(name) or RaydetectError, message, attributes)


def error_kind(name: str) -> type[RaydetectError] | None:
    """The exception class of a name, among those loaded in this process."""
    pending: list[type[RaydetectError]] = [RaydetectError]
    while pending:
        kind = pending.pop()
        if kind.__name__ == name:
            return kind
        pending += kind.__subclasses__()
    return None


def _rebuild(kind: type[RaydetectError], message: str, attributes: dict[str, Any]) -> RaydetectError:
    """Creates an error without calling its constructor, whose arguments may differ from its message."""
    error = kind.__new__(kind)
    RaydetectError.__init__(error, message)
    error.__dict__.update(attributes)
    return error
