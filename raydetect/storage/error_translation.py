"""Translates exceptions of storage libraries and separates failures of one object from failures of the storage."""

import errno
import re

from raydetect.errors import ChangedError, MissingError, NotAFileError, RaydetectError, StorageError, UnreadableError

REFUSED_KEYS = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "TokenRefreshRequired", "InvalidToken",
    "InvalidSecurity", "RequestTimeTooSkewed", "AccountProblem",
)  # fmt: skip
DENIED = ("AccessDenied", "403", "Forbidden", "AllAccessDisabled")
DISK = {
    errno.ENOSPC: "no space is left on the disk. Free some and start the same command again.",
    errno.EDQUOT: "the disk quota is used up. Free some space or raise it, and start the same command again.",
    errno.EFBIG: "it is larger than the disk or `ulimit -f` allows. Use another location or raise the limit.",
    errno.EROFS: "the disk is mounted read-only. Mount it writable or use another location.",
    errno.EACCES: "permission denied. Change the permissions or use another location.",
    errno.EPERM: "the operation is not permitted. Change the permissions or use another location.",
    errno.EIO: "the disk reports an input/output error. Check it, and start the same command again.",
}
ABSENT = ("NoSuchKey", "NoSuchVersion", "404")
MAX_MESSAGE = 3000  # characters read of a library's message; some include whole server responses
CHANGED = ("PreconditionFailed", "412")


def translate(uri: str, verb: str, error: Exception) -> RaydetectError:
    """Translates a storage library's exception into one sentence that names the file and the fix, without secrets.

    Returns:
        ChangedError: the object has changed since it was listed.
        UnreadableError: this object cannot be read, although others may be; a MissingError if it does not exist, a
            NotAFileError if it is a folder.
        StorageError: anything else: the whole storage is affected, or the failure may be temporary.
    """
    if isinstance(error, RaydetectError):
        return error
    text = _scrub(" ".join(str(error).split())) or type(error).__name__
    code = _error_code(error, text)
    translated = _object_error(uri, verb, error, code, text) if verb == "read" else None
    return translated or _storage_error(uri, verb, error, code, text)


def _object_error(uri: str, verb: str, error: Exception, code: str, text: str) -> StorageError | None:
    """Returns the error if it affects only this object, else None."""
    if code in CHANGED or type(error).__name__ == "FileExpired":
        return changed(uri)
    if code == "InvalidObjectState":
        return UnreadableError(f"{uri}: is archived, so it cannot be read ({text}). Restore it and score it again.")
    if code in DENIED or (not code and isinstance(error, PermissionError)):
        return UnreadableError(
            f"{uri}: the storage refused to {verb} it ({text}). Check the key, secret, profile and read permissions.",
            is_denied=True,
        )
    if code in ABSENT or (not code and isinstance(error, FileNotFoundError)):
        return MissingError(f"{uri}: not found. Check the path.")
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return NotAFileError(f"{uri}: is not a file ({type(error).__name__}). Check the path.")
    return None


def _storage_error(uri: str, verb: str, error: Exception, code: str, text: str) -> StorageError:
    if code == "NoSuchBucket":
        bucket = "/".join(uri.split("/")[:3])
        return MissingError(f"{uri}: the bucket {bucket} does not exist. Create it or correct the URI.", is_denied=True)
    if code in DENIED or code in REFUSED_KEYS:
        return StorageError(
            f"{uri}: the storage refused to {verb} it ({text}). Check the key, secret, token and profile."
        )
    if "credentials" in text.lower():
        return StorageError(
            f"{uri}: no credentials found. Set storage.key and storage.secret, a profile, or anon: true."
        )
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: not found. Check the path.")
    if isinstance(error, OSError) and error.errno in DISK and is_local(uri):
        place = str(error.filename or "")
        is_shown = place != uri.removeprefix("file://") and not place.endswith(".tmp")  # not our temporary files
        of = f" ({place})" if place and is_shown else ""
        return StorageError(f"{uri}: cannot {verb} it{of}: {DISK[error.errno]}")
    if "connect" in type(error).__name__.lower() or "Could not connect" in text:
        return StorageError(f"{uri}: the storage cannot be reached ({text}). Check storage.endpoint_url.")
    return StorageError(f"{uri}: cannot {verb} it ({type(error).__name__}: {text}).")


def is_local(uri: str) -> bool:
    """Whether a URI or path names a file on a local disk."""
    return uri.partition("://")[0] == "file" or "://" not in uri


def disk_reason(error: OSError) -> str:
    """Short reason of a disk error, such as "no space left on device"."""
    return " ".join((error.strerror or str(error)).split()).lower()


def changed(uri: str) -> ChangedError:
    """Creates the error for a file that has changed since it was listed."""
    return ChangedError(f"{uri}: has changed since it was listed. Nothing from it was kept; start the same job again.")


def _error_code(error: BaseException | None, text: str) -> str:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    if "Forbidden" in text or "Access Denied" in text:
        return "AccessDenied"
    return "NoSuchBucket" if "bucket does not exist" in text else ""


def _scrub(text: str) -> str:
    """Removes query strings (signatures) and anything after a key name."""
    text = re.sub(r"\?[^ '\"]+", "", text[:MAX_MESSAGE])
    return re.sub(r"(?i)((?:secret|token|key)[a-z_]*['\"]?\s*[=:]\s*)\S+", r"\1***", text)[:300]
