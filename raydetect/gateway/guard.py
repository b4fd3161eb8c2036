"""ASGI layers around the endpoints: size of bodies, requests in flight, who calls, and no word about what broke."""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

log = logging.getLogger("raydetect.gateway")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]
PORT = re.compile(r":\d*$")
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
ALWAYS = ("/healthz", "/readyz")  # answered however busy the server is
BROKE = "something broke in the server; its log says what."
LATER: Headers = ((b"retry-after", b"1"),)
HEADERS: Headers = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class BodyTooLarge(Exception):
    """More bytes came than one request may have."""


class Guard:
    """The layers, in one."""

    def __init__(self, app: App, hosts: Iterable[str], max_body_bytes: int, max_requests: int, seconds: float) -> None:
        """Wraps an application.

        Args:
            app: the endpoints.
            hosts: names by which clients may call this server; empty = any. A page of another site that a browser
                shows reaches a server on loopback by a name of its own, and is refused by this.
            max_body_bytes: of one request.
            max_requests: in flight at a time.
            seconds: after which a request is given up.
        """
        self._app, self._hosts = app, frozenset(hosts)
        self._max_body_bytes, self._max_requests, self._seconds = max_body_bytes, max_requests, seconds
        self._in_flight = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        self._in_flight += 1
        try:
            await self._run(scope, receive, send)
        finally:
            self._in_flight -= 1

    def _refused(self, scope: Message, headers: dict[bytes, str]) -> tuple[int, str, Headers] | None:
        authority, origin, length = (headers.get(name, "") for name in (b"host", b"origin", b"content-length"))
        host = PORT.sub("", authority).lower()
        if self._hosts and host not in self._hosts:
            return 421, "this server is not called by that name. Add it to `hosts` in its job file.", ()
        if origin and origin.partition("://")[2] != authority:
            return 403, "pages of other sites may not call this server.", ()
        if length and not length.isdecimal():
            return 400, "Content-Length is no number.", ()
        if int(length or 0) > self._max_body_bytes:
            return 413, _too_large(self._max_body_bytes), ()
        if self._in_flight >= self._max_requests and scope["path"] not in ALWAYS:
            return 429, f"{self._max_requests} requests are in flight. Try again.", LATER
        return None

    async def _run(self, scope: Message, receive: Receive, send: Send) -> None:
        talk = _Talk(receive, send, self._max_body_bytes)
        more: Headers = ()
        try:
            await asyncio.wait_for(self._app(scope, talk.receive, talk.send), self._seconds)
            return
        except TimeoutError:
            refusal, more = (503, f"no answer within {self._seconds:g} s. Try again."), LATER
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            refusal = (500, BROKE)
        if not talk.begun:
            await _answer(send, *refusal, more)


class _Talk:
    """The messages of one request: bytes that come are counted, answers get the server's headers."""

    def __init__(self, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self.begun = False
        self._receive, self._send, self._left, self._limit = receive, send, max_body_bytes, max_body_bytes

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise BodyTooLarge(_too_large(self._limit))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            message["headers"] = [*message.get("headers", ()), *HEADERS]
        await self._send(message)


def _too_large(limit: int) -> str:
    return f"the body has more than {limit:,} bytes. Send fewer images at a time."


async def _answer(send: Send, status: int, detail: str, more: Headers = ()) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
