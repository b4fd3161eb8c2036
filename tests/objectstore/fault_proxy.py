"""An HTTP proxy before an object store that fails on purpose: refusals, cut connections, cut bodies, slow bodies.

Faults come from a plan: a list of fault names, used up one by one by the requests that match, or drawn from a
seed. The Host header is forwarded as it is, so signatures stay valid.
"""

import asyncio
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from urllib.parse import urlsplit

from tests.objectstore import ObjectStore

FAULTS = ("slow_down", "drop", "truncate", "slow")
REFUSALS = {
    "slow_down": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "internal_error": ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    "forbidden": ("403 Forbidden", "AccessDenied", "Access Denied."),
    "expired": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    "archived": ("403 Forbidden", "InvalidObjectState", "The operation is not valid for the object's storage class."),
}
# Bodies that are not what their head says: shorter than stated, shorter with a length to match, shorter without one.
SHORT_BODIES = ("truncate", "shorter", "shorter_without_length")
CUT = ("drop", "lost")  # after these aiohttp sends the request once more by itself
HEAD_END = b"\r\n\r\n"


@dataclass
class FaultPlan:
    """What goes wrong next, and what went wrong so far."""

    waiting: deque[str] = field(default_factory=deque)
    always: str | None = None
    matches: Callable[[str, str], bool] = lambda method, path: True
    injected: Counter[str] = field(default_factory=Counter)

    def take(self, method: str, path: str) -> str | None:
        """The fault for this request, if any; `always` is that of every one that matches."""
        if self.always is not None and self.matches(method, path):
            self.injected[self.always] += 1
            return self.always
        if self.waiting and self.matches(method, path):
            fault = self.waiting.popleft()
            self.injected[fault] += 1
            return fault
        return None


@dataclass
class RandomFaults(FaultPlan):
    """What a seed says: faults of every kind in turn, and stretches in which each request is refused as `expired`."""

    seed: int = 0
    kinds: Sequence[str] = ("slow_down", "drop", "truncate")
    share: float = 0.05  # of requests with which a fault begins
    stretches: float = 0.02  # of requests with which a stretch begins
    longest: int = 4  # requests in a stretch
    _coming: deque[str] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._random, self._turn = random.Random(self.seed), cycle(self.kinds)

    def take(self, method: str, path: str) -> str | None:
        """The fault for this request, if any."""
        if not self.matches(method, path):
            return None
        if not self._coming:
            self._coming.extend(self._drawn())
        fault = self._coming.popleft() if self._coming else None
        if fault is not None:
            self.injected[fault] += 1
        return fault

    def _drawn(self) -> list[str]:
        if self._random.random() < self.stretches:
            return ["expired"] * self._random.randint(2, self.longest)
        if self._random.random() >= self.share:
            return []
        fault = next(self._turn)
        return [fault] * (2 if fault in CUT else 1)


@contextmanager
def faulty(store: ObjectStore, plan: FaultPlan) -> Iterator[ObjectStore]:
    """The same store, reached through the proxy."""
    target = urlsplit(store.endpoint_url)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    ports: list[int] = []

    async def serve() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _handle(reader, writer, (str(target.hostname), int(target.port or 80)), plan)

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        started.set()
        async with server:
            await server.serve_forever()

    def run() -> None:
        task = loop.create_task(serve())
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield replace(store, endpoint_url=f"http://127.0.0.1:{ports[0]}")
    finally:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        thread.join(10)


async def _handle(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int], plan: FaultPlan
) -> None:
    try:
        head = await reader.readuntil(HEAD_END)
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        if b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue" + HEAD_END)
        body = await _body(reader, head)
        fault = plan.take(method, path)
        if fault == "drop":
            return
        if fault in REFUSALS:
            writer.write(_refusal(*REFUSALS[fault], is_head=method == "HEAD"))
            await writer.drain()
            return
        await _forward(writer, _closing(head), body, target, fault)
    except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
        return
    finally:
        writer.close()


async def _forward(
    writer: asyncio.StreamWriter, head: bytes, body: bytes, target: tuple[str, int], fault: str | None
) -> None:
    back_reader, back_writer = await asyncio.open_connection(*target, limit=1 << 20)
    try:
        back_writer.write(head + body)
        await back_writer.drain()
        answer_head = await back_reader.readuntil(HEAD_END)
        answer = b"" if head.startswith(b"HEAD ") else await back_reader.read()
        if fault == "lost":  # the store did what was asked, and nobody is told
            return
        if fault in SHORT_BODIES:
            answer = answer[: len(answer) // 2]
        if fault == "shorter" and answer:  # a HEAD has no body, and tells the truth
            answer_head = _without_length(answer_head, f"Content-Length: {len(answer)}")
        if fault in ("without_length", "shorter_without_length"):
            answer_head = _without_length(answer_head)
        writer.write(_closing(answer_head))
        if fault == "slow":
            for start in range(0, len(answer), max(1, len(answer) // 8)):
                writer.write(answer[start : start + max(1, len(answer) // 8)])
                await writer.drain()
                await asyncio.sleep(0.2)
        else:
            writer.write(answer)
        await writer.drain()
    finally:
        back_writer.close()


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return await reader.readexactly(int(value))
        if name.lower() == b"transfer-encoding" and b"chunked" in value:
            parts = [line_of := await reader.readuntil(b"\r\n")]
            while int(line_of.split(b";")[0], 16):
                parts.append(await reader.readexactly(int(line_of.split(b";")[0], 16) + 2))
                parts.append(line_of := await reader.readuntil(b"\r\n"))
            return b"".join([*parts, await reader.readuntil(b"\r\n")])
    return b""


def _refusal(status: str, code: str, message: str, is_head: bool) -> bytes:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    length = f"Content-Length: {len(body)}\r\nConnection: close"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\n{length}".encode() + HEAD_END
    return head if is_head else head + body


def _without_length(head: bytes, *instead: str) -> bytes:
    lines = [line for line in head[: -len(HEAD_END)].split(b"\r\n") if not line.lower().startswith(b"content-length:")]
    return b"\r\n".join([*lines, *(line.encode() for line in instead)]) + HEAD_END


def _closing(head: bytes) -> bytes:
    """The head with `Connection: close` (one request per connection keeps this simple) and without `Expect`."""
    dropped = (b"connection:", b"expect:")
    lines = [line for line in head[: -len(HEAD_END)].split(b"\r\n") if not line.lower().startswith(dropped)]
    return b"\r\n".join([*lines, b"Connection: close"]) + HEAD_END
