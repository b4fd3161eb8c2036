"""Every error raydetect raises on purpose: one sentence that says what, given what, where, and what to do."""

import json
from typing import Any

from raydetect.redaction import redacted


class RaydetectError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns for it.

    Whatever its own arguments are, it survives the way to another process whole: class, message and attributes. What
    opens a URI is not shown in the message.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), str(self), dict(self.__dict__))


class SpecError(RaydetectError):
    """The job file, an option or a parameter is wrong; found before any cluster is touched."""

    exit_code = 2


class StorageError(RaydetectError):
    """A file, folder or bucket cannot be reached, read or written."""


class UnreadableError(StorageError):
    """One object cannot be read for good: it is archived, not there, or not for this key. Others may be.

    Args:
        message: one sentence.
        is_denied: the storage refused, which may as well concern all objects.
    """

    def __init__(self, message: str, is_denied: bool = False) -> None:
        super().__init__(message)
        self.is_denied = is_denied


class MissingError(UnreadableError):
    """Nothing is at the URI."""

    exit_code = 2


class ChangedError(StorageError):
    """A file is another one than was listed."""


class IncompleteError(StorageError):
    """A run whose shards are all scored lacks records or files of them."""


class DamagedError(StorageError):
    """A file that raydetect wrote is there, and is not what was written."""


class ArtifactError(RaydetectError):
    """A fitted detector on disk is missing, damaged or of a newer format."""

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
    """The audit is finished, and a rule raised an alarm."""

    exit_code = 4


def is_outage(error: RaydetectError) -> bool:
    """Whether the storage failed, so that the same job may run later as it is."""
    return isinstance(error, StorageError) and not isinstance(error, MissingError | DamagedError)


def error_text(error: RaydetectError) -> str:
    """Kind, message and attributes as JSON, for the way to another process."""
    return json.dumps([type(error).__name__, str(error), error.__dict__])


def error_of(text: str) -> RaydetectError:
    """The error of `error_text`."""
    name, message, words = json.loads(text)
    return _again(error_kind(name) or RaydetectError, message, words)


def error_kind(name: str) -> type[RaydetectError] | None:
    """The class of a name, of those that this process has loaded."""
    waiting: list[type[RaydetectError]] = [RaydetectError]
    while waiting:
        kind = waiting.pop()
        if kind.__name__ == name:
            return kind
        waiting += kind.__subclasses__()
    return None


def _again(kind: type[RaydetectError], message: str, words: dict[str, Any]) -> RaydetectError:
    """An error that was made already; the arguments of its class are not its message."""
    error = kind.__new__(kind)
    RaydetectError.__init__(error, message)
    error.__dict__.update(words)
    return error
