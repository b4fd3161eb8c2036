"""Normalises, joins and checks URIs."""

import os
import re

from raydetect.errors import SpecError, StorageError
from raydetect.redaction import names_secret, user_of

SCHEMES = ("file", "s3", "memory", "gs", "az", "abfs", "http", "https")
FILE_URI = re.compile(r"\Afile:(?://localhost)?/(?!/)")  # other forms of file:///path in RFC 8089


def normalise_uri(uri: str) -> str:
    """Returns a URI without `.`, repeated or trailing slashes; plain paths become `file://`.

    `file:/path` and `file://localhost/path` become `file:///path`.

    Only for URIs from users. URIs from a listing must not be normalised, since `a//b` is a different key than `a/b`.

    Raises:
        SpecError: as for `check_uri`, or the URI is empty.
    """
    text = FILE_URI.sub("file:///", os.fspath(uri))
    if "\0" in text:
        raise SpecError(f"{text!r}: contains U+0000, which is not allowed in a name. Correct the URI.")
    if not text.strip():
        raise SpecError("the URI is empty. Give a path or a URL such as s3://bucket/folder.")
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
    """Refuses URIs that must not be opened.

    Raises:
        SpecError: the scheme is unknown, the URL is chained or presigned or contains a user, or the path contains `..`.
    """
    scheme, _, rest = uri.partition("://")
    if names_secret(uri):
        raise SpecError(
            f"{uri.partition('?')[0]}: is presigned or contains a token, and would be written to every row. Name the "
            "object itself, such as s3://bucket/key, and set a key or profile under storage."
        )
    if user_of(uri):
        raise SpecError(
            f"{uri}: contains a user or key before `@`, and would be written to every row. Remove it, and set a key or "
            "profile under storage."
        )
    if "::" in uri:
        raise SpecError(f"{uri}: `::` chains URLs, which is not allowed here. Use a path or URL without it.")
    if scheme not in SCHEMES:
        raise SpecError(f"{uri}: the scheme {scheme!r} is not supported. Use one of {', '.join(SCHEMES)}.")
    if ".." in rest.split("/"):
        raise SpecError(f"{uri}: `..` is not allowed in a URI. Write the full path.")


def join_uri(uri: str, *parts: str) -> str:
    """Joins a URI and path parts with `/`."""
    return "/".join((uri.rstrip("/"), *parts))


def relative_to(uri: str, root: str) -> str:
    """Returns the path of `uri` relative to `root`, unchanged.

    Raises:
        StorageError: `uri` is not below `root`.
    """
    prefix = root.rstrip("/") + "/"
    if not uri.startswith(prefix):
        raise StorageError(f"{uri}: is not below {root}.")
    return uri[len(prefix) :]
