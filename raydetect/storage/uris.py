"""URIs: their one form, how they are joined, and which are refused."""

import os
import re

from raydetect.errors import SpecError, StorageError
from raydetect.redaction import names_secret, user_of

SCHEMES = ("file", "s3", "memory", "gs", "az", "abfs", "http", "https")
FILE_URI = re.compile(r"\Afile:(?://localhost)?/(?!/)")  # the other forms that RFC 8089 has for file:///path


def normalise_uri(uri: str) -> str:
    """`scheme://...` without `..`, `.`, doubled slashes or a slash at the end; plain paths become `file://`.

    `file:/path` and `file://localhost/path` are `file:///path`.

    For URIs that people write. Those that a listing gave are kept as they are, since `a//b` is a key of its own.

    Raises:
        SpecError: an unknown scheme, a chained or presigned URL, one with a user, or a path that climbs out with `..`.
    """
    text = FILE_URI.sub("file:///", os.fspath(uri))
    if "\0" in text:
        raise SpecError(f"{text!r}: holds U+0000, which no name may hold. Mend the URI.")
    if not text.strip():
        raise SpecError("an empty URI was given. State a path or a URL such as s3://bucket/folder.")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return "file://" + os.path.abspath(os.path.expanduser(text))
    check_uri(text)
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    if not parts and scheme != "memory":
        raise SpecError(f"{text}: names no bucket or path. Write {scheme}://NAME/...")
    root = "/" if scheme in ("file", "memory") else ""
    return f"{scheme}://{root}{'/'.join(parts)}"


def check_uri(uri: str) -> None:
    """Refuses what may not be opened.

    Raises:
        SpecError: an unknown scheme, a chained or presigned URL, one with a user, or a path that climbs out with `..`.
    """
    scheme, _, rest = uri.partition("://")
    if names_secret(uri):
        raise SpecError(
            f"{uri.partition('?')[0]}: is a presigned URL, or one with a token, and would stand in every row. Name the "
            "object itself, such as s3://bucket/key, and give a key or profile under storage."
        )
    if user_of(uri):
        raise SpecError(
            f"{uri}: holds a user or a key before `@`, and would stand in every row. Leave it out, and give a key or "
            "profile under storage."
        )
    if "::" in uri:
        raise SpecError(f"{uri}: `::` chains URLs, which is not allowed here. Name a path or URL without it.")
    if scheme not in SCHEMES:
        raise SpecError(f"{uri}: the scheme {scheme!r} is not supported. Use one of {', '.join(SCHEMES)}.")
    if ".." in rest.split("/"):
        raise SpecError(f"{uri}: `..` is not allowed in a URI. Write the path out.")


def join_uri(uri: str, *parts: str) -> str:
    """`uri/part/part`."""
    return "/".join((uri.rstrip("/"), *parts))


def relative_to(uri: str, root: str) -> str:
    """The path of `uri` below `root`, as it is.

    Raises:
        StorageError: it is not below it.
    """
    prefix = root.rstrip("/") + "/"
    if not uri.startswith(prefix):
        raise StorageError(f"{uri}: is not below {root}.")
    return uri[len(prefix) :]
