"""Redacts credentials in URIs: users, passwords, and secret query parameters.

Every raydetect error passes its message through `redacted`, so no other code has to. Secrets of `storage` never enter a
message: validation errors do not show values below it (`config.validation`), nor does its repr.
"""

import re

URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20})://((?:(?!::)[^\s'\"<>])+)")
PORT = re.compile(r"[^:]*:\d*\W*")  # may be followed by punctuation
WITHOUT_USER = ("file", "memory", "zip", "tar", "tarzst", "member", "parquetrow")  # a path follows `://`
ACCOUNTS = ("az", "abfs")  # container@account, which is not secret
WEB = ("http", "https")
SIGNING_PARAMETERS = frozenset(
    (
        "awsaccesskeyid", "sig", "signature", "x-amz-credential", "x-amz-security-token", "x-amz-signature",
        "x-goog-credential", "x-goog-signature",
    )
)  # fmt: skip
SECRET_PARAMETERS = SIGNING_PARAMETERS | {
    "access_token", "api_key", "apikey", "auth", "authorization", "client_secret", "code", "credential", "jwt", "key",
    "passwd", "password", "pwd", "secret", "session_token", "token",
}  # fmt: skip
HIDDEN = "***"


def redacted(text: str) -> str:
    """Applies `redacted_uri` to every URI in a text."""
    return URI.sub(lambda match: redacted_uri(match.group()), text) if "://" in text else text


def redacted_uri(uri: str) -> str:
    """Removes the user, the query of an http(s) URL, and any query with a signature."""
    scheme, _, rest = uri.partition("://")
    if scheme.lower() in WITHOUT_USER:
        return uri
    user = user_of(uri)
    if user:
        rest = HIDDEN + rest[len(user) :]
    elif _has_password(_first(rest)):  # truncated before its `@`
        rest = HIDDEN
    path, mark, _ = rest.partition("?")
    if mark and (scheme.lower() in WEB or names_secret(uri)):
        rest = f"{path}?{HIDDEN}"
    return f"{scheme}://{rest}"


def user_of(uri: str) -> str:
    """The part before `@`: a user with or without a password; "" if there is none or it is a container.

    A password may contain unescaped slashes, as AWS keys do. So if the first segment has a colon but no port,
    everything up to the last `@` counts.
    """
    scheme, _, rest = uri.partition("://")
    if scheme.lower() in WITHOUT_USER:
        return ""
    first = _first(rest)
    if "@" in first:
        user = first.rpartition("@")[0]
        return "" if scheme.lower() in ACCOUNTS and ":" not in user else user
    return rest.rpartition("@")[0] if _has_password(first) else ""


def _first(rest: str) -> str:
    """The part between `://` and the first slash."""
    return re.split(r"[/?#]", rest, maxsplit=1)[0]


def _has_password(first: str) -> bool:
    return ":" in first and not PORT.fullmatch(first) and not first.startswith(("arn:", "["))


def names_secret(uri: str) -> bool:
    """Whether the query has a secret parameter: any common one for http(s), else only those of signatures."""
    scheme, _, rest = uri.partition("://")
    known = SECRET_PARAMETERS if scheme.lower() in WEB else SIGNING_PARAMETERS
    _, _, query = rest.partition("?")
    return any(part.partition("=")[0].lower() in known for part in re.split("[?&]", query) if "=" in part)
