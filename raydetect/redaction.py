"""What messages never show of a URI: who opens it, and the words by which it is opened.

Every deliberate error passes its text through `redacted`, so no other place has to think of it. Secrets of `storage`
never come into a message in the first place: values below it are not shown (`config.validate`), nor are they part of a
repr.
"""

import re

URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20})://((?:(?!::)[^\s'\"<>])+)")
PORT = re.compile(r"[^:]*:\d*\W*")  # marks of the sentence may stand behind
WITHOUT_USER = ("file", "memory", "zip", "tar", "tarzst", "member", "parquetrow")  # after `://` comes a path
ACCOUNTS = ("az", "abfs")  # container@account, which is no secret
WEB = ("http", "https")
SIGNING_WORDS = frozenset(
    (
        "awsaccesskeyid", "sig", "signature", "x-amz-credential", "x-amz-security-token", "x-amz-signature",
        "x-goog-credential", "x-goog-signature",
    )
)  # fmt: skip
SECRET_WORDS = SIGNING_WORDS | {
    "access_token", "api_key", "apikey", "auth", "authorization", "client_secret", "code", "credential", "jwt", "key",
    "passwd", "password", "pwd", "secret", "session_token", "token",
}  # fmt: skip
HIDDEN = "***"


def redacted(text: str) -> str:
    """The text with every URI in it as `redacted_uri` has it."""
    return URI.sub(lambda found: redacted_uri(found.group()), text) if "://" in text else text


def redacted_uri(uri: str) -> str:
    """The URI without a user, without the query of a web address, and without a query that signs."""
    scheme, _, rest = uri.partition("://")
    if scheme.lower() in WITHOUT_USER:
        return uri
    user = user_of(uri)
    if user:
        rest = HIDDEN + rest[len(user) :]
    elif _has_password(_first(rest)):  # cut off before its `@`
        rest = HIDDEN
    place, mark, _ = rest.partition("?")
    if mark and (scheme.lower() in WEB or names_secret(uri)):
        rest = f"{place}?{HIDDEN}"
    return f"{scheme}://{rest}"


def user_of(uri: str) -> str:
    """What stands before `@`: a user, with or without a password; "" when there is none, or it is a container.

    A password may hold unescaped slashes, as keys of AWS do. So where the first segment has a colon and no port, all up
    to the last `@` counts.
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
    """What stands between `://` and the first slash."""
    return re.split(r"[/?#]", rest, maxsplit=1)[0]


def _has_password(first: str) -> bool:
    return ":" in first and not PORT.fullmatch(first) and not first.startswith(("arn:", "["))


def names_secret(uri: str) -> bool:
    """Whether the query has a word that opens: of a web address any usual one, elsewhere those that sign."""
    scheme, _, rest = uri.partition("://")
    known = SECRET_WORDS if scheme.lower() in WEB else SIGNING_WORDS
    _, _, query = rest.partition("?")
    return any(part.partition("=")[0].lower() in known for part in re.split("[?&]", query) if "=" in part)
