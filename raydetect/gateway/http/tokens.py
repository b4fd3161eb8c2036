"""Bearer tokens with names and scopes, kept as digests and compared in constant time."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from raydetect.config import ServeSpec
from raydetect.config.validation import STRICT, validate
from raydetect.config.yaml_text import read_text, read_yaml
from raydetect.errors import SpecError

VARIABLE = "RAYDETECT_TOKENS"
SHORTEST = 20
Scope = Literal["score", "archive", "admin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEntry:
    """One entry of the tokens file: the token itself, or its sha256."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: Annotated[str, Field(min_length=1, description="the holder, for the log")]
    token: Annotated[str | None, Field(description="the secret; at least 20 characters")] = None
    sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$", description="hex digest, instead of the secret")] = (
        None
    )
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, description="what it may do: score, archive, admin")]

    def __post_init__(self) -> None:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("set either token or sha256, not both")
        if self.token is not None and len(self.token) < SHORTEST:
            raise ValueError(f"a token of fewer than {SHORTEST} characters can be guessed; make a longer one")


@dataclass(frozen=True, slots=True)
class Token:
    """A token as the server stores it."""

    name: str
    sha256: str
    scopes: frozenset[Scope]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a server; if empty, every client may do everything."""

    known: tuple[Token, ...]

    def holder(self, authorization: str | None) -> Token | None:
        """The token in an `Authorization: Bearer ...` header; None if it is missing or unknown."""
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            return None
        given = _sha256(secret.strip())
        match = None
        for token in self.known:  # compares all, so that timing reveals nothing
            if hmac.compare_digest(token.sha256, given):
                match = token
        return match


def read_tokens(spec: ServeSpec, environment: Mapping[str, str] = os.environ) -> Tokens:
    """Reads the tokens from `tokens_file`, or from the variable RAYDETECT_TOKENS.

    Raises:
        SpecError: they cannot be read or are invalid, or there are none and the server listens beyond loopback.
    """
    text, where = environment.get(VARIABLE), f"the variable {VARIABLE}"
    if spec.tokens_file is not None:
        where = spec.tokens_file
        text = read_text(Path(spec.tokens_file), "tokens_file")
    if text is None:
        if not is_loopback(spec.host):
            raise SpecError(f"host {spec.host}: listens beyond loopback without tokens. Set tokens_file or {VARIABLE}.")
        return Tokens(())
    return Tokens(tuple(_entries(text, where)))


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _entries(text: str, where: str) -> list[Token]:
    try:
        values = read_yaml(text)
    except SpecError as error:
        raise SpecError(f"{where}: {error} Write a list of {{name, token, scopes}}.") from None
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise SpecError(f"{where}: is not a list of tokens. Write a list of {{name, token, scopes}}.")
    entries = [validate(TokenEntry, value, f"{where}, entry {i}") for i, value in enumerate(values, 1)]
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise SpecError(f"{where}: two tokens have the same name. Give each a name of its own.")
    return [Token(e.name, e.sha256 or _sha256(e.token or ""), frozenset(e.scopes)) for e in entries]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
