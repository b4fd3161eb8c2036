"""Authorization of requests, from the header alone, before any of the body is read."""

from collections.abc import MutableMapping
from typing import Any

from starlette.routing import BaseRoute, Match

from raydetect.gateway.http.tokens import Scope, Tokens

Headers = tuple[tuple[bytes, bytes], ...]
Refusal = tuple[int, str, Headers]  # status, one sentence, extra headers
BEARER: Headers = ((b"www-authenticate", b"Bearer"),)


class Authorization:
    """The scopes that endpoints require, by route."""

    def __init__(self, tokens: Tokens) -> None:
        """Starts without routes."""
        self._tokens = tokens
        self._required: list[tuple[BaseRoute, Scope]] = []

    def add(self, route: BaseRoute, scope: Scope) -> None:
        """Requires a scope for a route."""
        self._required.append((route, scope))

    def holder(self, request: MutableMapping[str, Any]) -> str:
        """The name of the token of a request; "" without a known one."""
        token = self._tokens.holder(_bearer(request))
        return "" if token is None else token.name

    @property
    def several(self) -> bool:
        """Whether there are several tokens."""
        return len(self._tokens.known) > 1

    def share(self, room: int) -> int:
        """How much one token may hold: half if there are several, so that none locks out the others."""
        return max(1, room // 2) if self.several else room

    def refusal(self, request: MutableMapping[str, Any]) -> Refusal | None:
        """Why a request is not authorised; None if it is, or matches no endpoint.

        Args:
            request: an ASGI scope of type http.
        """
        required = next((scope for route, scope in self._required if route.matches(request)[0] is Match.FULL), None)
        if required is None or not self._tokens.known:
            return None
        token = self._tokens.holder(_bearer(request))
        if token is None:
            return 401, "a token is required: Authorization: Bearer TOKEN.", BEARER
        if required not in token.scopes:
            return 403, f"the token of {token.name!r} does not have the scope {required!r}.", ()
        return None


def _bearer(request: MutableMapping[str, Any]) -> str:
    given = next((value for name, value in request["headers"] if name.lower() == b"authorization"), b"")
    return bytes(given).decode("latin-1")
