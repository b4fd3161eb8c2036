"""The server over raw sockets: missing tokens, slow clients, endless requests and rare requests."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from uvicorn.config import HTTP_PROTOCOLS

from raydetect.config import LimitSpec
from raydetect.distributed.serving.proxy import bound_connections
from raydetect.errors import MemberError
from raydetect.gateway.backend import TooMany
from raydetect.gateway.fetch import Fetcher
from raydetect.gateway.http import app, limits
from raydetect.gateway.http.authorization import Authorization
from raydetect.gateway.http.capacity import ThreadLane
from raydetect.gateway.http.connections import BoundedProtocol
from raydetect.gateway.http.limits import Guard
from raydetect.gateway.http.tokens import Tokens, read_tokens
from raydetect.storage import Storage
from tests.builders.images import encode, normal_image
from tests.builders.server import LIMITS, NOBODY, SCORE, files, make_place, running, serve_spec

HOST, JSON = "Host: 127.0.0.1\r\n", "Content-Type: application/json\r\n"
SECRET, OTHER = "a-secret-of-line-four-0001", "a-secret-of-line-five-0002"
TOKENS = f"[{{name: a, token: {SECRET}, scopes: [score]}}, {{name: b, token: {OTHER}, scopes: [archive]}}]"
HOLDER = {"Authorization": f"Bearer {SECRET}"}
FEW, SOON = 12, 1.0  # connections, and seconds for a request header
SLOW_BODY = f"POST /v1/archives HTTP/1.1\r\n{HOST}{JSON}Content-Length: 1000000\r\n"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_place`."""
    return make_place(tmp_path_factory.mktemp("wire"))


@pytest.fixture(scope="module")
def guarded(data_dir: Path) -> Iterator[str]:
    """The URL of a server with two tokens, two requests at a time and few connections."""
    spec = serve_spec(data_dir, limits={**LIMITS, "max_requests": 2})
    tokens = read_tokens(spec, {"RAYDETECT_TOKENS": TOKENS})
    with running(spec, tokens, connections=FEW, head_seconds=SOON, answer_seconds=SOON) as url:
        yield url


@pytest.fixture(scope="module")
def open_to_all(data_dir: Path) -> Iterator[str]:
    """The URL of a server without tokens."""
    with running(serve_spec(data_dir), head_seconds=SOON) as url:
        yield url


def connected(url: str) -> socket.socket:
    """A connection to a server, with a timeout of 10 s."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), 10)


def send_and_read(url: str, *parts: str | bytes) -> bytes:
    """Everything a server answers until it closes the connection; times out after 10 s of silence."""
    with connected(url) as connection:
        for part in parts:
            connection.sendall(part if isinstance(part, bytes) else part.encode())
        return until_closed(connection)


def until_closed(connection: socket.socket) -> bytes:
    """The remaining bytes of a connection."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    return received


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection; discards what it sent."""
    connection.settimeout(0.01)
    try:
        while connection.recv(1 << 16):
            continue
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def test_every_endpoint_but_the_open_ones_checks_its_scope_first(guarded: str) -> None:
    needed = {
        "GET /v1/detectors": "score",
        "GET /v1/detectors/{name}": "score",
        "PUT /v1/detectors/{name}": "admin",
        "POST /v1/detectors/{name}/score": "score",
        "GET /v1/archives": "archive",
        "POST /v1/archives": "archive",
        "GET /v1/archives/{id}": "archive",
        "DELETE /v1/archives/{id}": "archive",
        "GET /v1/archives/{id}/report": "archive",
        "GET /healthz": "",
        "GET /readyz": "",
    }
    paths = httpx.get(f"{guarded}/openapi.json").json()["paths"]
    operations = {f"{method.upper()} {path}": body for path, item in paths.items() for method, body in item.items()}
    assert set(operations) == set(needed)
    for name, scope in needed.items():
        method, _, path = name.partition(" ")
        assert ("security" in operations[name]) == bool(scope), name

        def status(token: str, method: str = method, path: str = path) -> int:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return httpx.request(method, guarded + path.format(name="x", id="x"), headers=headers).status_code

        known = {"score": SECRET, "archive": OTHER}
        if not scope:
            assert status("") == 200
            continue
        assert status("") == status("unknown-but-long-enough") == 401, name
        assert [status(known[held]) != 403 for held in known] == [held == scope for held in known], name


def test_an_unauthorised_request_is_refused_before_its_body_arrives(guarded: str) -> None:
    for header, expected in (("", b"401"), (f"Authorization: Bearer {SECRET}\r\n", b"403")):
        with connected(guarded) as connection:
            connection.sendall(f"{SLOW_BODY}{header}\r\n{{".encode())
            started = time.monotonic()
            assert connection.recv(100).split()[1] == expected
            assert time.monotonic() - started < 2


def test_slow_bodies_without_a_token_do_not_block_holders_of_tokens(guarded: str) -> None:
    picture = encode(normal_image(1))
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(guarded)) for _ in range(FEW - 2)]
        for connection in slow:
            connection.sendall(f"{SLOW_BODY}\r\n{{".encode())
        answer = httpx.post(guarded + SCORE, files=files(picture), headers=HOLDER)
        assert answer.status_code == 200, answer.text
        end = time.monotonic() + 10
        while not all(map(is_closed, slow)):  # the rest of a refused body is read for a limited time
            assert time.monotonic() < end
            for connection in slow:
                send_or_nothing(connection, b" ")
            time.sleep(0.05)


def test_a_body_that_comes_too_slowly_is_refused(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_GRACE_SECONDS", 0.5)
    head = f"POST {SCORE} HTTP/1.1\r\n{HOST}{JSON}Authorization: Bearer {SECRET}\r\nContent-Length: 1000\r\n\r\n"
    with connected(guarded) as connection:
        connection.sendall(head.encode())
        for _ in range(20):
            send_or_nothing(connection, b" ")
            time.sleep(0.1)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_one_token_leaves_room_for_another(guarded: str) -> None:
    head = f"POST {SCORE} HTTP/1.1\r\n{HOST}{JSON}Authorization: Bearer {SECRET}\r\nContent-Length: 1000\r\n\r\n"
    with connected(guarded) as connection:
        connection.sendall(head.encode())
        end = time.monotonic() + 4
        while (answer := httpx.get(f"{guarded}/v1/detectors", headers=HOLDER)).status_code == 200:
            assert time.monotonic() < end
        assert answer.status_code == 429 and "1 requests of this token" in answer.json()["detail"]
        other = httpx.get(f"{guarded}/v1/archives", headers={"Authorization": f"Bearer {OTHER}"})
        assert other.status_code == 200


def test_one_token_leaves_threads_for_another() -> None:
    lane, go = ThreadLane("wait", 2, 2), threading.Event()

    async def work() -> str:
        waiting = asyncio.create_task(lane.run(go.wait, "a", 1))
        await asyncio.sleep(0)
        with pytest.raises(TooMany, match="1 requests already wait"):
            await lane.run(go.wait, "a", 1)
        found = await lane.run(lambda: "done", "b", 1)
        go.set()
        await waiting
        await lane.run(go.wait, "a", 1)
        return found

    assert asyncio.run(work()) == "done"


def send_or_nothing(connection: socket.socket, data: bytes) -> None:
    """Sends bytes; ignores a connection that the server has closed."""
    try:
        connection.sendall(data)
    except ConnectionError:
        return


def test_half_open_connections_leave_room_and_time_out(guarded: str) -> None:
    with ExitStack() as stack:
        half = [stack.enter_context(connected(guarded)) for _ in range(4 * FEW)]
        for connection in half:
            send_or_nothing(connection, f"GET / HTTP/1.1\r\n{HOST}X-a: ".encode())
        assert httpx.get(f"{guarded}/healthz", timeout=5).status_code == 200
        assert all(map(is_closed, half[: 3 * FEW]))
        assert until_closed(half[-1]).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert httpx.get(f"{guarded}/healthz", timeout=5).status_code == 200


def test_a_silent_connection_is_closed_without_a_response(guarded: str) -> None:
    assert send_and_read(guarded) == b""


def test_an_endless_header_is_refused(guarded: str) -> None:
    for begin in ("GET / HTTP/1.1\r\nX-a: ", "GET /"):
        answer = send_and_read(guarded, begin, b"a" * 70_000)
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert "too large" in json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]
    answer = send_and_read(guarded, "GET / HTTP/1.1\r\n", b"a: b\r\n" * 20_000)
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_a_client_that_does_not_read_responses_is_disconnected(guarded: str) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", int(guarded.rpartition(":")[2])))
        request = f"GET /openapi.json HTTP/1.1\r\n{HOST}\r\n".encode()
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(request)
                time.sleep(0.002)
    assert httpx.get(f"{guarded}/healthz").status_code == 200


def test_uvicorn_in_a_serve_proxy_uses_the_bounded_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    assert bound_connections() == []
    config = uvicorn.Config(NOBODY)
    config.load()
    assert config.http_protocol_class is BoundedProtocol


def test_bytes_in_flight_are_limited_and_released(data_dir: Path) -> None:
    spec = serve_spec(data_dir, limits={**LIMITS, "max_bytes_in_flight": 2_000_000, "request_seconds": 20})
    pictures, later = files(encode(normal_image(1)), b"x" * 900_000), {"429", "retry-after"}
    with running(spec) as url:
        with connected(url) as connection:
            connection.sendall(
                f"POST {SCORE} HTTP/1.1\r\n{HOST}Content-Type: multipart/form-data; boundary=x\r\n".encode()
            )
            connection.sendall(b"Content-Length: 1500000\r\n\r\n--x\r\n")
            end = time.monotonic() + 10
            while (answer := httpx.post(url + SCORE, files=pictures)).status_code == 200:
                assert time.monotonic() < end
            assert {str(answer.status_code), *answer.headers} >= later and "2,000,000 bytes" in answer.json()["detail"]
            assert httpx.post(url + SCORE, files=pictures[:1]).status_code == 200
        end = time.monotonic() + 10
        while httpx.post(url + SCORE, files=pictures).status_code != 200:
            assert time.monotonic() < end


@pytest.mark.parametrize("gone", [False, True], ids=["client waits", "client is gone"])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), ClientDisconnect()], ids=["bug", "disconnect"])
def test_an_error_of_an_endpoint_is_logged_even_if_the_client_is_gone(
    gone: bool, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, logged = list[Any](), list[tuple[Any, ...]]()
    monkeypatch.setattr(limits.log, "exception", lambda *words: logged.append(words))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"} if gone else {"type": "http.request", "body": b"", "more_body": False}

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise error

    async def send(message: Any) -> None:
        sent.append(message)

    gate = Authorization(Tokens(()))
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    asyncio.run(Guard(endpoint, (), gate, LimitSpec())(scope, receive, send))  # type: ignore[arg-type]
    is_bug = isinstance(error, RuntimeError)
    assert logged == ([("%s %s", "GET", "/x")] if is_bug else [])
    assert [message.get("status") for message in sent[:1]] == ([500] if is_bug else [])


OK = "HTTP/1.1 200 OK\r\n"


@contextmanager
def dripping(first: bytes) -> Iterator[tuple[str, list[threading.Event]]]:
    """A web server that sends some bytes and then one per 0.1 s; sets an event for each lost connection."""
    ended: list[threading.Event] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)

        def drip(connection: socket.socket, gone: threading.Event) -> None:
            with connection:
                connection.recv(1000)
                try:
                    connection.sendall(first)
                    while not gone.wait(0.1):
                        connection.sendall(b"x")
                except ConnectionError:
                    gone.set()

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                ended.append(threading.Event())
                threading.Thread(target=drip, args=(connection, ended[-1]), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/pub", ended
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("first", [f"{OK}Content-Length: 90000\r\n\r\n".encode(), f"{OK}\r\n".encode(), b"H", b""])
def test_the_timeout_of_an_image_by_url_is_total(first: bytes) -> None:
    with dripping(first) as (web, ended):
        started = time.monotonic()
        with pytest.raises(MemberError, match=r"its server took more than 0\.4 s") as raised:
            Fetcher(Storage(), 1_000_000, 0.4).read(f"{web}/a.png")
        assert raised.value.status == "unreadable" and time.monotonic() - started < 3
        assert len(ended) == 1 and ended[0].wait(5)


def test_slow_images_by_url_block_no_other_requests(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "WEB_THREADS", 2)
    with dripping(f"{OK}\r\n".encode()) as (web, ended):
        limits = {**LIMITS, "fetch_seconds": 1.5}
        spec = serve_spec(data_dir, limits=limits, allow={"sources": [web, f"{data_dir}/open"]})
        with running(spec) as url, ThreadPoolExecutor(7) as pool:
            slow = {"images": [{"uri": f"{web}/a.png"}]}
            slow_requests = [pool.submit(httpx.post, url + SCORE, json=slow, timeout=20) for _ in range(7)]
            assert httpx.post(url + SCORE, files=files(encode(normal_image(1)))).status_code == 200
            stored = {"images": [{"uri": f"{data_dir}/open/loose/a.png"}]}
            assert httpx.post(url + SCORE, json=stored).status_code == 200
            assert sum(one.done() for one in slow_requests) <= 3
            answers = [one.result() for one in slow_requests]
        assert sorted(one.status_code for one in answers) == [422] * 4 + [429] * 3
        assert all(one.headers["retry-after"] == "1" for one in answers if one.status_code == 429)
        assert len(ended) == 4 and all(gone.wait(5) for gone in ended)


def json_body(text: str, path: str = "/v1/archives", more: str = "") -> str:
    """A request with a JSON body and `Connection: close`."""
    head = f"POST {path} HTTP/1.1\r\n{HOST}Connection: close\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(text)}\r\n\r\n{text}"


RUN = '{"detector": "bottle", "source": {"uri": "/x"}, "sink": {"uri": "/y"}, "max_bad_fraction": %s}'
DEEP = "[" * 100_000
RARE = {
    "deep lists": (json_body(DEEP), (413,)),
    "deep lists of images": (json_body(DEEP, SCORE), (413,)),
    "a long number": (json_body(RUN % ("9" * 5000)), (400, 422)),
    "not a number": (json_body(RUN % "NaN"), (422,)),
    "an endless number": (json_body(RUN % "1e999"), (422,)),
    "half a surrogate pair": (json_body(RUN % '"\\ud800"'), (422,)),
    "gzip": (json_body("{}", SCORE, "Content-Encoding: gzip\r\n"), (415,)),
    "a long length": (f"POST {SCORE} HTTP/1.1\r\n{HOST}Content-Length: {'9' * 19}\r\n\r\n", (400,)),
    "a length of 5,000 digits": (f"POST {SCORE} HTTP/1.1\r\n{HOST}Content-Length: {'9' * 5000}\r\n\r\n", (400,)),
    "two lengths": (f"POST {SCORE} HTTP/1.1\r\n{HOST}Content-Length: 1\r\nContent-Length: 2\r\n\r\n", (400,)),
    "an unknown coding": (f"POST {SCORE} HTTP/1.1\r\n{HOST}Transfer-Encoding: gzip\r\n\r\n", (400, 501)),
    "a broken chunk": (f"POST /v1/archives HTTP/1.1\r\n{HOST}{JSON}Transfer-Encoding: chunked\r\n\r\nzz\r\n", (400,)),
    "not HTTP": ("\x16\x03\x01 no HTTP\r\n\r\n", (400,)),
    "another method": (f"OPTIONS /v1/archives HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n", (405,)),
    "an unknown method": (f"FETCH / HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n", (405,)),
    "a long query": (f"GET /v1/detectors?{'a=b&' * 15_000} HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n", (200,)),
    "a websocket": (
        f"GET /healthz HTTP/1.1\r\n{HOST}Connection: close, Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        (200,),
    ),
}


@pytest.mark.parametrize("name", RARE)
def test_rare_requests_get_one_response_of_one_sentence(open_to_all: str, name: str) -> None:
    sent, statuses = RARE[name]
    started = time.monotonic()
    answer = send_and_read(open_to_all, sent)
    assert time.monotonic() - started < 5
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in statuses and answer.count(b"HTTP/1.1 ") == 1, answer[:300]
    if statuses != (200,):
        detail = json.loads(body)["detail"]
        assert isinstance(detail, str) and 0 < len(detail) < 2000, answer[:300]


def test_requests_in_one_packet_are_answered_in_order(open_to_all: str) -> None:
    two = f"GET /healthz HTTP/1.1\r\n{HOST}\r\nGET /v1/nothing HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n"
    answer = send_and_read(open_to_all, two)
    assert [int(part.split()[0]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 404]


def test_head_is_answered_as_get_without_a_body(open_to_all: str) -> None:
    for path in ("/", "/healthz", "/readyz", "/v1/detectors"):
        head, get = httpx.head(open_to_all + path), httpx.get(open_to_all + path)
        assert head.status_code == get.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == str(len(get.content))


def chunks(*parts: bytes) -> bytes:
    """A chunked body."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


@pytest.mark.parametrize("path", ["/v1/archives", SCORE])
def test_a_body_without_a_length_is_refused_at_the_limit(open_to_all: str, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\n{HOST}Connection: close\r\nContent-Type: application/json\r\n"
    coded = "Transfer-Encoding: chunked\r\n\r\n"
    answer = send_and_read(open_to_all, head, coded, chunks(*[b" " * 100_000] * 21))
    assert answer.startswith(b"HTTP/1.1 413 ") and b"1,048,576 bytes" in answer, answer[:300]
    assert send_and_read(open_to_all, head, coded, chunks(b"{", b"}")).startswith(b"HTTP/1.1 422 ")


def test_expect_100_continue_is_answered_before_the_body(guarded: str) -> None:
    head = f"POST {SCORE} HTTP/1.1\r\n{HOST}{JSON}Content-Length: 2\r\nExpect: 100-continue\r\n"
    with connected(guarded) as connection:
        connection.sendall(f"{head}\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")
    with connected(guarded) as connection:
        connection.sendall(f"{head}Connection: close\r\nAuthorization: Bearer {SECRET}\r\n\r\n".encode())
        status_line = connection.recv(100)
        assert status_line.startswith(b"HTTP/1.1 404 ") or status_line.startswith(b"HTTP/1.1 100 "), status_line
        if status_line.startswith(b"HTTP/1.1 100 "):
            connection.sendall(b"{}")
            assert b"HTTP/1.1 422 " in until_closed(connection)


def form(*parts: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A multipart body with the given part headers, and its own headers."""
    body = b"".join(b"--x\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + b"--x--\r\n"
    return body, {"content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    "parts",
    [
        [('Content-Disposition: form-data; name="a"', b"x")] * 5000,
        [("X-a: " + "a" * 1_500_000, b"x")],
        [("\r\n".join(f"X-{i}: a" for i in range(100_000)), b"x")],
        [('Content-Disposition: form-data; name="' + "a" * 100_000 + '"', b"x")],
        [('Content-Disposition: form-data; name="category"', b"x" * 1_500_000)],
        [('Content-Disposition: form-data; name="images"; filename="' + "a" * 3000 + '"', b"")],
    ],
    ids=["many parts", "a large header", "many headers", "a long name", "a long field", "a long filename"],
)
def test_oversized_forms_are_refused_in_one_sentence(open_to_all: str, parts: Any) -> None:
    body, headers = form(*parts)
    started = time.monotonic()
    answer = httpx.post(open_to_all + SCORE, content=body, headers=headers)
    assert answer.status_code in (400, 413, 422) and isinstance(answer.json()["detail"], str), answer.text[:300]
    assert time.monotonic() - started < 3 and len(answer.text) < 3000
