"""Who may reach which endpoint. It is decided from the head of a request, before anything of its body is read."""

from collections.abc import MutableMapping
from typing import Any

from starlette.routing import BaseRoute, Match

from raydetect.gateway.http.tokens import Scope, Tokens

Headers = tuple[tuple[bytes, bytes], ...]
Refusal = tuple[int, str, Headers]  # status, one sentence, more headers
BEARER: Headers = ((b"www-authenticate", b"Bearer"),)


class Authorization:
    """The scopes that endpoints need, by the routes that lead to them."""

    def __init__(self, tokens: Tokens) -> None:
        """Knows no route yet."""
        self._tokens = tokens
        self._needs: list[tuple[BaseRoute, Scope]] = []

    def add(self, route: BaseRoute, scope: Scope) -> None:
        """Lets nobody but holders of a scope reach a route."""
        self._needs.append((route, scope))

    def refusal(self, request: MutableMapping[str, Any]) -> Refusal | None:
        """Why a request may not reach its endpoint; None when it may, or leads to no endpoint.

        Args:
            request: an ASGI scope of type http.
        """
        needed = next((scope for route, scope in self._needs if route.matches(request)[0] is Match.FULL), None)
        if needed is None or not self._tokens.known:
            return None
        given = next((value for name, value in request["headers"] if name.lower() == b"authorization"), b"")
        token = self._tokens.holder(given.decode("latin-1"))
        if token is None:
            return 401, "a token is needed: Authorization: Bearer TOKEN.", BEARER
        if needed not in token.scopes:
            return 403, f"the token of {token.name!r} has not the scope {needed!r}.", ()
        return None
