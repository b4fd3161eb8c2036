"""ASGI middleware around the endpoints: authorisation, body sizes, requests in flight and internal errors."""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect

from raydetect.config import LimitSpec
from raydetect.gateway.backend import TooMany
from raydetect.gateway.http.authorization import Authorization, Headers, Refusal
from raydetect.gateway.http.capacity import ByteBudget

log = logging.getLogger("raydetect.gateway")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
PORT = re.compile(r":\d*$")
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
UNLIMITED_PATHS = ("/healthz", "/readyz")  # not limited by `max_requests`
INTERNAL_ERROR = "internal server error; see the server's log."
FORM = "multipart/form-data"
MOST_TEXT_BYTES = 1 << 20  # limit for JSON bodies, which hold URIs and never image bytes
BODY_GRACE_SECONDS, LEAST_BYTES_PER_SECOND = 5.0, 4096  # a body may be late by so much, at so slow a rate
LENGTH = re.compile(r"[0-9]{1,18}")
RETRY_AFTER: Headers = ((b"retry-after", b"1"),)
HEADERS: Headers = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Refused(Exception):
    """Stops reading a body; `Guard` sends the response."""


class Guard:
    """The middleware."""

    def __init__(self, app: App, hosts: Iterable[str], gate: Authorization, limits: LimitSpec) -> None:
        """Wraps an application.

        Args:
            app: the endpoints. They call `take` in the ASGI scope with the number of bytes that they read elsewhere
                for the request; it raises TooMany. `holder` is the name of the request's token,
                and `several_tokens` whether there are others.
            hosts: accepted host names; empty = any. This stops DNS rebinding, where a page of another site reaches a
                server on loopback by the site's own name.
            gate: decides who may reach which endpoint.
            limits: the limits in the job file.
        """
        self._app, self._hosts, self._gate, self._limits = app, frozenset(hosts), gate, limits
        self._bytes, self._in_flight = ByteBudget(limits.bytes_in_flight), Counter[str]()  # by name of the token

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the protocol omits the body
            scope = {**scope, "method": "GET"}
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        length = headers.get(b"content-length")
        exchange = _Exchange(receive, send, self._most(headers), None if length is None else int(length), self._bytes)
        holder = self._gate.holder(scope)
        self._in_flight[holder] += 1
        try:
            more = {"take": exchange.take, "holder": holder, "several_tokens": self._gate.several}
            await self._run({**scope, **more}, exchange)
        finally:
            self._in_flight[holder] -= 1
            exchange.end()

    def _refused(self, scope: Message, headers: dict[bytes, str]) -> Refusal | None:
        authority, origin = headers.get(b"host", ""), headers.get(b"origin", "")
        host = PORT.sub("", authority).lower()
        if self._hosts and host not in self._hosts:
            return 421, "unknown host name. Add it to `hosts` in the server's job file.", ()
        if origin and origin != f"{_scheme(scope, headers)}://{authority}":
            return 403, "pages of other sites may not call this server.", ()
        refused = self._gate.refusal(scope) or self._unreadable(headers)
        return refused or self._full(scope)

    def _full(self, scope: Message) -> Refusal | None:
        """A token among several holds at most half of the requests in flight."""
        if scope["path"] in UNLIMITED_PATHS:
            return None
        most = self._limits.max_requests
        if self._in_flight.total() >= most:
            return 429, f"{most} requests are in flight. Try again.", RETRY_AFTER
        share = self._gate.share(most)
        if self._in_flight[self._gate.holder(scope)] >= share:
            return 429, f"{share} requests of this token are in flight. Try again.", RETRY_AFTER
        return None

    def _unreadable(self, headers: dict[bytes, str]) -> Refusal | None:
        length = headers.get(b"content-length", "0")
        if not LENGTH.fullmatch(length):
            return 400, "Content-Length is not a number of bytes.", ()
        if int(length) > self._most(headers):
            return 413, _too_large(self._most(headers)), ()
        encoding = headers.get(b"content-encoding", "identity").strip().lower()
        if encoding != "identity":
            return 415, f"Content-Encoding {encoding[:100]!r} is not supported. Send the body uncompressed.", ()
        return None

    def _most(self, headers: dict[bytes, str]) -> int:
        """The largest allowed body of a request, in bytes."""
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        most = self._limits.max_body_bytes
        return most if kind == FORM else min(most, MOST_TEXT_BYTES)

    async def _run(self, scope: Message, exchange: "_Exchange") -> None:
        refusal: Refusal | None = None
        try:
            await asyncio.wait_for(self._app(scope, exchange.receive, exchange.send), self._limits.request_seconds)
        except TimeoutError:
            refusal = (503, f"no answer within {self._limits.request_seconds:g} s. Try again.", RETRY_AFTER)
        except asyncio.CancelledError:
            await exchange.refuse((503, "the server is stopping. Try again.", RETRY_AFTER))
            raise
        except (Refused, ClientDisconnect) as error:
            log.debug("%s %s: stopped by %s", scope["method"], scope["path"], type(error).__name__)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            refusal = (500, INTERNAL_ERROR, ())
        await exchange.refuse(exchange.refusal or refusal)


class _Exchange:
    """The messages of one request: counts received bytes and adds the server's headers to the response.

    Attributes:
        started: the response has started.
        refusal: why the rest of the body is not read; the endpoint's own response is then dropped.
    """

    def __init__(
        self, receive: Receive, send: Send, most: int, length: int | None, bytes_in_flight: ByteBudget
    ) -> None:
        self.started = False
        self.refusal: Refusal | None = None
        self._receive, self._send, self._left, self._most = receive, send, most, most
        self._length, self._bytes_in_flight, self._held, self._answered = length, bytes_in_flight, 0, False
        self._seconds, self._complete = BODY_GRACE_SECONDS, False  # left to wait for the body

    def take(self, count: int) -> None:
        """Reserves bytes for this request until it is answered.

        Raises:
            TooMany: the server's limit is reached, or the request was already answered.
        """
        self._bytes_in_flight.take(count)
        self._held += count
        if self._answered:
            self.end()
            raise TooMany("the request was already answered.")

    def end(self) -> None:
        """Releases the bytes of this request."""
        self._answered = True
        held, self._held = self._held, 0
        self._bytes_in_flight.give(held)

    async def receive(self) -> Message:
        """Receives the next part of the body. Reserves the whole Content-Length first, so that no read is wasted."""
        if self._length:
            self._take(self._length)
            self._length = 0
        message = await self._next()
        size = len(message.get("body", b""))
        self._left -= size
        if self._left < 0:
            self._refuse((413, _too_large(self._most), ()))
        if self._length is None:
            self._take(size)
        return message

    async def _next(self) -> Message:
        """The next message; time spent waiting for a body must be earned by its bytes."""
        if self._complete:
            return await self._receive()
        began = time.monotonic()
        try:
            async with asyncio.timeout(max(self._seconds, 0.001)):
                message = await self._receive()
        except TimeoutError:
            self._refuse((408, f"the body came at less than {LEAST_BYTES_PER_SECOND:,} bytes per second.", ()))
        self._seconds -= time.monotonic() - began
        self._seconds += len(message.get("body", b"")) / LEAST_BYTES_PER_SECOND
        self._complete = not message.get("more_body", False)
        return message

    def _take(self, count: int) -> None:
        try:
            self.take(count)
        except TooMany as error:
            self._refuse((429, str(error), RETRY_AFTER))

    def _refuse(self, refusal: Refusal) -> NoReturn:
        self.refusal = refusal
        raise Refused

    async def send(self, message: Message) -> None:
        """Sends a part of the endpoint's response."""
        if self.refusal is not None and not self.started:
            return
        if message["type"] == "http.response.start":
            self.started = True
            message["headers"] = [*message.get("headers", ()), *HEADERS]
        await self._send(message)

    async def refuse(self, refusal: Refusal | None) -> None:
        """Responds instead of the endpoint, unless its response has started."""
        if refusal is not None and not self.started:
            await _answer(self._send, *refusal)


def _scheme(scope: Message, headers: dict[bytes, str]) -> str:
    """The scheme that the client used: an ingress that ends TLS says so, and a page of another site cannot."""
    return headers.get(b"x-forwarded-proto", "").partition(",")[0].strip() or str(scope.get("scheme", "http"))


def _too_large(most: int) -> str:
    return f"the body has more than {most:,} bytes. Send fewer images per request."


async def _answer(send: Send, status: int, detail: str, more: Headers = ()) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
