"""Limits of client connections: size of headers, timeouts, and which one closes when there are too many.

uvicorn uses this protocol, both with `--local` and in the proxies of Ray Serve.
"""

import asyncio
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 512
BACKLOG = 256  # connections that the kernel queues until they are accepted
DETAILS = {
    400: "the request is not valid HTTP/1.1.",
    408: "the request header took too long.",
    431: "the request header is too large.",
}


def _connections() -> int:
    """At most half of the process's open files; the others are for images and scoring."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(2, min(MOST_CONNECTIONS, files // 2))


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits per connection, and the number of connections.

    h11 limits a request header to 64 KiB plus what one read returns.

    Attributes:
        connections: open at a time.
        head_seconds: from the first byte of a request header to its last; also how long the rest of a refused
            request's body is read and discarded.
        answer_seconds: after which a client that reads none of its response is disconnected.
    """

    connections: int = field(default_factory=_connections)
    head_seconds: float = 10.0
    answer_seconds: float = 30.0


class _Ending:
    """A transport whose `close` lets a client that is still sending read its response.

    Closing at once would send a TCP reset, and the client's kernel would discard the response.
    """

    def __init__(self, transport: asyncio.Transport, still_sends: Callable[[], bool]) -> None:
        self._transport, self._still_sends, self._half = transport, still_sends, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Half-closes on the first call while the client is still sending, otherwise closes the connection."""
        if self._half or self._transport.is_closing() or not self._still_sends() or not self._transport.can_write_eof():
            self._transport.close()
        else:
            self._half = True
            self._transport.write_eof()


class BoundedProtocol(H11Protocol):
    """uvicorn's h11 protocol with limits.

    A connection waits for its client while a request header is incomplete and while a response is not read. When there
    are too many connections, the one that has waited longest is closed, regardless of its address: clients behind NAT
    share one. A client that sends its header at once, such as a health check, does not wait.
    """

    bounds: ClassVar[ConnectionLimits] = ConnectionLimits()
    waiting: ClassVar[dict["BoundedProtocol", None]] = {}  # the longest wait first

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Creates the protocol with uvicorn's arguments."""
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._answer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accepts a client; closes the longest-waiting connection if there are too many."""
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, _Ending(transport, self._still_sends))
        transport.set_write_buffer_limits(0)  # so that `pause_writing` is called for any unread byte
        self._update_waiting()
        self._begin_head()
        if len(self.connections) > self.bounds.connections and self.waiting:
            longest = next(iter(self.waiting))
            self.waiting.pop(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cleans up after a client disconnected."""
        super().connection_lost(exc)
        self._end_head()
        self.resume_writing()
        self.waiting.pop(self, None)

    def data_received(self, data: bytes) -> None:
        """Handles bytes of a header or body; discards those after the last response."""
        if self.conn.our_state is h11.CLOSED:
            return
        if self in self.waiting:
            self._begin_head()
        super().data_received(data)
        self._update_waiting()

    def on_response_complete(self) -> None:
        """Continues reading for a while if the client is still sending its request."""
        super().on_response_complete()
        self._update_waiting()
        if self in self.waiting and self._still_sends():
            self._begin_head()

    def pause_writing(self) -> None:
        """Starts the timeout of a client that has stopped reading its response."""
        super().pause_writing()
        self._update_waiting()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Stops the timeout once the client has read everything."""
        super().resume_writing()
        self._update_waiting()
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    def send_400_response(self, msg: str) -> None:
        """Refuses an invalid or too large header; uvicorn calls it while handling h11's error."""
        self._refuse(int(getattr(sys.exception(), "error_status_hint", 400)))

    def _should_upgrade(self) -> bool:
        return False  # a WebSocket handshake is answered like any other GET

    def _still_sends(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _update_waiting(self) -> None:
        """Updates whether the connection waits for its client."""
        in_progress = self.cycle is not None and not self.cycle.response_complete
        if in_progress:
            self._end_head()
        if in_progress and not self.flow.write_paused:
            self.waiting.pop(self, None)
        elif self in self.connections:
            self.waiting.setdefault(self)

    def _begin_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self.bounds.head_seconds, self._late)

    def _end_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _late(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408)
        else:  # no bytes received, or the rest of a refused request
            self.transport.abort()

    def _refuse(self, status: int) -> None:
        """Sends the error unless a response has started, and closes the connection."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps({"detail": DETAILS.get(status, DETAILS[400])}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            response = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
            for event in (response, h11.Data(data=body), h11.EndOfMessage(), h11.ConnectionClosed()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._begin_head()

    def _watch(self, unread_bytes: int) -> None:
        self._answer = self.loop.call_later(self.bounds.answer_seconds, self._still_takes, unread_bytes)

    def _still_takes(self, unread_bytes: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now < unread_bytes:
            self._watch(now)
        else:
            self.transport.abort()


def bounded_protocol(**changes: Any) -> type[BoundedProtocol]:
    """Returns a protocol class for one server, with its own set of connections.

    Args:
        changes: fields of `ConnectionLimits` to override.
    """
    return type(
        "BoundedProtocol", (BoundedProtocol,), {"bounds": replace(ConnectionLimits(), **changes), "waiting": {}}
    )
