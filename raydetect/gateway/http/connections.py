"""One connection of a client: how large a head may be, how long all may take, and who goes when there are too many.

It stands under uvicorn, with `--local` as in the proxies of Ray Serve, and knows nothing of endpoints.
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
BACKLOG = 256  # connections that the kernel holds until they are accepted, which may be all at once
DETAILS = {
    400: "the request breaks the rules of HTTP/1.1.",
    408: "the head of the request took too long.",
    431: "the head of the request is too large.",
}


def _connections() -> int:
    """At most half of the files that this process may open; the others are for images and what scores them."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(2, min(MOST_CONNECTIONS, files // 2))


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may take, and how many there are.

    The size of a head is bounded by h11, to 64 KiB and what one read brings.

    Attributes:
        connections: open at a time.
        head_seconds: from the first byte of a head to its last; also how long the rest of a body is read, and thrown
            away, after a request was refused.
        answer_seconds: after which a client that takes nothing of its answer is cut off.
    """

    connections: int = field(default_factory=_connections)
    head_seconds: float = 10.0
    answer_seconds: float = 30.0


class _Ending:
    """A transport whose `close` lets a client that still sends read its answer.

    To close it at once would have the client's kernel throw the answer away, as soon as it is told that its bytes came
    too late.
    """

    def __init__(self, transport: asyncio.Transport, still_sends: Callable[[], bool]) -> None:
        self._transport, self._still_sends, self._half = transport, still_sends, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Ends what is sent; and the connection, unless the client still sends and this is the first call."""
        if self._half or self._transport.is_closing() or not self._still_sends() or not self._transport.can_write_eof():
            self._transport.close()
        else:
            self._half = True
            self._transport.write_eof()


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol on h11, bounded.

    A connection waits for its client while the head of a request is not complete and while an answer is not taken. When
    there are too many, the one that has waited longest is closed, whoever opened it: clients behind one address
    translation look alike, and one that sends its head at once, such as a health check, does not wait.
    """

    bounds: ClassVar[ConnectionLimits] = ConnectionLimits()
    waiting: ClassVar[dict["BoundedProtocol", None]] = {}  # the longest first

    def __init__(self, *words: Any, **named: Any) -> None:
        """As uvicorn makes it."""
        super().__init__(*words, **named)
        self._head: asyncio.TimerHandle | None = None
        self._answer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came; one that waits may have to go."""
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, _Ending(transport, self._still_sends))
        transport.set_write_buffer_limits(0)  # so that `pause_writing` tells of every byte that is not taken
        self._note()
        self._begin_head()
        if len(self.connections) > self.bounds.connections and self.waiting:
            longest = next(iter(self.waiting))
            self.waiting.pop(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client has gone."""
        super().connection_lost(exc)
        self._end_head()
        self.resume_writing()
        self.waiting.pop(self, None)

    def data_received(self, data: bytes) -> None:
        """Bytes came, of a head or of a body; those that come after the last answer are thrown away."""
        if self.conn.our_state is h11.CLOSED:
            return
        if self in self.waiting:
            self._begin_head()
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        """An answer was given; what the client still sends of its request is read for a while."""
        super().on_response_complete()
        self._note()
        if self in self.waiting and self._still_sends():
            self._begin_head()

    def pause_writing(self) -> None:
        """The client takes no more of its answer just now."""
        super().pause_writing()
        self._note()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has taken all of it."""
        super().resume_writing()
        self._note()
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP or too large; uvicorn calls it while h11's error is being handled."""
        self._refuse(int(getattr(sys.exception(), "error_status_hint", 400)))

    def _should_upgrade(self) -> bool:
        return False  # a websocket's handshake is a GET like any other here

    def _still_sends(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _note(self) -> None:
        """Whether the connection waits for its client."""
        in_hand = self.cycle is not None and not self.cycle.response_complete
        if in_hand:
            self._end_head()
        if in_hand and not self.flow.write_paused:
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
        else:  # nothing came, or what is left of a refused request
            self.transport.abort()

    def _refuse(self, status: int) -> None:
        """Says so, unless an answer was begun, and ends the connection."""
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

    def _watch(self, left_bytes: int) -> None:
        self._answer = self.loop.call_later(self.bounds.answer_seconds, self._still_takes, left_bytes)

    def _still_takes(self, left_bytes: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now < left_bytes:
            self._watch(now)
        else:
            self.transport.abort()


def bounded_protocol(**changes: Any) -> type[BoundedProtocol]:
    """The protocol of one server, whose connections are its own.

    Args:
        changes: of `ConnectionLimits`.
    """
    return type(
        "BoundedProtocol", (BoundedProtocol,), {"bounds": replace(ConnectionLimits(), **changes), "waiting": {}}
    )
