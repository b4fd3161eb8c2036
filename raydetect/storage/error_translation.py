"""What a storage library raises, as one sentence, and told apart: the whole storage, or this one object for good."""

import errno
import re

from raydetect.errors import ChangedError, MissingError, RaydetectError, StorageError, UnreadableError

REFUSED_KEYS = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "TokenRefreshRequired", "InvalidToken",
    "InvalidSecurity", "RequestTimeTooSkewed", "AccountProblem",
)  # fmt: skip
DENIED = ("AccessDenied", "403", "Forbidden", "AllAccessDisabled")
DISK = {
    errno.ENOSPC: "no space is left on the disk. Free some and start the same command again.",
    errno.EDQUOT: "the disk quota is used up. Free some space or raise it, and start the same command again.",
    errno.EFBIG: "it is larger than the disk or `ulimit -f` allows. Name another place or raise the limit.",
    errno.EROFS: "the disk is mounted read-only. Mount it writable or name another place.",
    errno.EACCES: "permission denied. Change who may read and write there, or name another place.",
    errno.EPERM: "the operation is not permitted. Change who may read and write there, or name another place.",
    errno.EIO: "the disk reports an input/output error. Check it, and start the same command again.",
}
ABSENT = ("NoSuchKey", "NoSuchVersion", "404")
READ = 3000  # letters of a library's message; some repeat whole answers of a server
CHANGED = ("PreconditionFailed", "412")


def translate(uri: str, verb: str, error: Exception) -> RaydetectError:
    """A storage library's exception as one sentence that names the file and what to do. No secrets, no traceback.

    Returns:
        ChangedError: the object is another one than was listed.
        UnreadableError: this object cannot be read, while others may be; a MissingError when it is not there.
        StorageError: anything else, which concerns the whole storage or may pass.
    """
    if isinstance(error, RaydetectError):
        return error
    text = _scrub(" ".join(str(error).split())) or type(error).__name__
    code = _error_code(error, text)
    found = _of_object(uri, verb, error, code, text) if verb == "read" else None
    return found or _of_storage(uri, verb, error, code, text)


def _of_object(uri: str, verb: str, error: Exception, code: str, text: str) -> StorageError | None:
    """What concerns one object alone."""
    if code in CHANGED or type(error).__name__ == "FileExpired":
        return changed(uri)
    if code == "InvalidObjectState":
        return UnreadableError(f"{uri}: is archived, so it cannot be read ({text}). Restore it and score it again.")
    if code in DENIED or (not code and isinstance(error, PermissionError)):
        return UnreadableError(
            f"{uri}: the storage refused to {verb} it ({text}). Check key, secret, profile and who may read it.",
            is_denied=True,
        )
    if code in ABSENT or (not code and isinstance(error, FileNotFoundError)):
        return MissingError(f"{uri}: not found. Check the path.")
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return UnreadableError(f"{uri}: is no file ({type(error).__name__}). Check the path.")
    return None


def _of_storage(uri: str, verb: str, error: Exception, code: str, text: str) -> StorageError:
    if code == "NoSuchBucket":
        bucket = "/".join(uri.split("/")[:3])
        return MissingError(f"{uri}: the bucket {bucket} does not exist. Create it or mend the URI.", is_denied=True)
    if code in DENIED or code in REFUSED_KEYS:
        return StorageError(f"{uri}: the storage refused to {verb} it ({text}). Check key, secret, token, profile.")
    if "credentials" in text.lower():
        return StorageError(
            f"{uri}: no credentials found. Set storage.key and storage.secret, a profile, or anon: true."
        )
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: not found. Check the path.")
    if isinstance(error, OSError) and error.errno in DISK and is_local(uri):
        place = str(error.filename or "")
        of = f" ({place})" if place and place != uri.removeprefix("file://") else ""
        return StorageError(f"{uri}: cannot {verb} it{of}: {DISK[error.errno]}")
    if "connect" in type(error).__name__.lower() or "Could not connect" in text:
        return StorageError(f"{uri}: the storage cannot be reached ({text}). Check storage.endpoint_url.")
    return StorageError(f"{uri}: cannot {verb} it ({type(error).__name__}: {text}).")


def is_local(uri: str) -> bool:
    """Whether it names a file of a disk, by a URI or as a path."""
    return uri.partition("://")[0] == "file" or "://" not in uri


def disk_reason(error: OSError) -> str:
    """Why a disk refused, in a few words: "no space left on device"."""
    return " ".join((error.strerror or str(error)).split()).lower()


def changed(uri: str) -> ChangedError:
    """The error of a file that is another one than was listed."""
    return ChangedError(f"{uri}: was changed since it was listed. Nothing of it was kept; start the same job again.")


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
    """Drops query strings (signatures) and anything after a key name."""
    text = re.sub(r"\?[^ '\"]+", "", text[:READ])
    return re.sub(r"(?i)((?:secret|token|key)[a-z_]*['\"]?\s*[=:]\s*)\S+", r"\1***", text)[:300]
