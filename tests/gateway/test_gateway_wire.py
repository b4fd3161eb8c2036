"""The door from outside, by bytes on sockets: who has no token, who is slow, who never ends, what is rarely sent."""

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
from uvicorn.config import HTTP_PROTOCOLS

from raydetect.distributed.serving.proxy import bound_connections
from raydetect.errors import MemberError
from raydetect.gateway.fetch import Fetcher
from raydetect.gateway.http import app
from raydetect.gateway.http.connections import BoundedProtocol
from raydetect.gateway.http.tokens import read_tokens
from raydetect.storage import Storage
from tests.builders.images import encode, normal_image
from tests.builders.server import LIMITS, NOBODY, SCORE, files, make_place, running, serve_spec

HOST, JSON = "Host: 127.0.0.1\r\n", "Content-Type: application/json\r\n"
SECRET, OTHER = "a-secret-of-line-four-0001", "a-secret-of-line-five-0002"
TOKENS = f"[{{name: a, token: {SECRET}, scopes: [score]}}, {{name: b, token: {OTHER}, scopes: [archive]}}]"
HOLDER = {"Authorization": f"Bearer {SECRET}"}
FEW, SOON = 12, 1.0  # connections, and seconds for a head
SLOW_BODY = f"POST /v1/archives HTTP/1.1\r\n{HOST}{JSON}Content-Length: 1000000\r\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_place`."""
    return make_place(tmp_path_factory.mktemp("wire"))


@pytest.fixture(scope="module")
def guarded(place: Path) -> Iterator[str]:
    """The URL of a server that knows two tokens and takes two requests at a time over few connections."""
    spec = serve_spec(place, limits={**LIMITS, "max_requests": 2})
    tokens = read_tokens(spec, {"RAYDETECT_TOKENS": TOKENS})
    with running(spec, tokens, connections=FEW, head_seconds=SOON, answer_seconds=SOON) as url:
        yield url


@pytest.fixture(scope="module")
def open_to_all(place: Path) -> Iterator[str]:
    """The URL of a server without tokens."""
    with running(serve_spec(place), head_seconds=SOON) as url:
        yield url


def connected(url: str) -> socket.socket:
    """A connection to a server, on which nothing lasts longer than 10 s."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), 10)


def message(url: str, *parts: str | bytes) -> bytes:
    """All that a server answers to some bytes until it closes the connection, or is silent for 10 s."""
    with connected(url) as bounded_protocol:
        for part in parts:
            bounded_protocol.sendall(part if isinstance(part, bytes) else part.encode())
        return until_closed(bounded_protocol)


def until_closed(bounded_protocol: socket.socket) -> bytes:
    """What still comes."""
    found = b""
    while part := bounded_protocol.recv(1 << 16):
        found += part
    return found


def is_closed(bounded_protocol: socket.socket) -> bool:
    """Whether the server has ended a connection, after what it may have said."""
    bounded_protocol.settimeout(0.01)
    try:
        while bounded_protocol.recv(1 << 16):
            continue
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def test_every_endpoint_but_the_open_ones_asks_for_its_scope_before_anything_else(guarded: str) -> None:
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
    words = {f"{method.upper()} {path}": body for path, found in paths.items() for method, body in found.items()}
    assert set(words) == set(needed)
    for name, scope in needed.items():
        method, _, path = name.partition(" ")
        assert ("security" in words[name]) == bool(scope), name

        def status(token: str, method: str = method, path: str = path) -> int:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return httpx.request(method, guarded + path.format(name="x", id="x"), headers=headers).status_code

        known = {"score": SECRET, "archive": OTHER}
        if not scope:
            assert status("") == 200
            continue
        assert status("") == status("unknown-but-long-enough") == 401, name
        assert [status(known[held]) != 403 for held in known] == [held == scope for held in known], name


def test_a_body_is_not_waited_for_when_the_head_has_no_right_to_it(guarded: str) -> None:
    for words, expected in (("", b"401"), (f"Authorization: Bearer {SECRET}\r\n", b"403")):
        with connected(guarded) as bounded_protocol:
            bounded_protocol.sendall(f"{SLOW_BODY}{words}\r\n{{".encode())
            started = time.monotonic()
            assert bounded_protocol.recv(100).split()[1] == expected
            assert time.monotonic() - started < 2


def test_strangers_with_slow_bodies_take_no_place_from_holders_of_tokens(guarded: str) -> None:
    picture = encode(normal_image(1))
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(guarded)) for _ in range(FEW - 2)]
        for bounded_protocol in slow:
            bounded_protocol.sendall(f"{SLOW_BODY}\r\n{{".encode())
        answer = httpx.post(guarded + SCORE, files=files(picture), headers=HOLDER)
        assert answer.status_code == 200, answer.text
        end = time.monotonic() + 10
        while not all(map(is_closed, slow)):  # what is left of a refused body is read for a while, never for ever
            assert time.monotonic() < end
            for bounded_protocol in slow:
                send_or_nothing(bounded_protocol, b" ")
            time.sleep(0.05)


def send_or_nothing(bounded_protocol: socket.socket, data: bytes) -> None:
    """Sends; False when the server has closed the connection."""
    try:
        bounded_protocol.sendall(data)
    except ConnectionError:
        return


def test_half_open_connections_leave_room_and_end(guarded: str) -> None:
    with ExitStack() as stack:
        half = [stack.enter_context(connected(guarded)) for _ in range(4 * FEW)]
        for bounded_protocol in half:
            send_or_nothing(bounded_protocol, f"GET / HTTP/1.1\r\n{HOST}X-a: ".encode())
        assert httpx.get(f"{guarded}/healthz", timeout=5).status_code == 200
        assert all(map(is_closed, half[: 3 * FEW]))
        assert until_closed(half[-1]).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert httpx.get(f"{guarded}/healthz", timeout=5).status_code == 200


def test_a_connection_that_says_nothing_is_ended_without_a_word(guarded: str) -> None:
    assert message(guarded) == b""


def test_a_head_without_end_is_refused(guarded: str) -> None:
    for begin in ("GET / HTTP/1.1\r\nX-a: ", "GET /"):
        answer = message(guarded, begin, b"a" * 70_000)
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert "too large" in json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]
    answer = message(guarded, "GET / HTTP/1.1\r\n", b"a: b\r\n" * 20_000)
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_who_does_not_read_answers_is_cut_off(guarded: str) -> None:
    with socket.socket() as bounded_protocol:
        bounded_protocol.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bounded_protocol.settimeout(10)
        bounded_protocol.connect(("127.0.0.1", int(guarded.rpartition(":")[2])))
        asked = f"GET /openapi.json HTTP/1.1\r\n{HOST}\r\n".encode()
        with pytest.raises(ConnectionError):
            while True:
                bounded_protocol.sendall(asked)
                time.sleep(0.002)
    assert httpx.get(f"{guarded}/healthz").status_code == 200


def test_uvicorn_in_a_proxy_of_serve_takes_the_bounded_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    assert bound_connections() == []
    config = uvicorn.Config(NOBODY)
    config.load()
    assert config.http_protocol_class is BoundedProtocol


def test_bytes_in_flight_are_bounded_and_given_back(place: Path) -> None:
    spec = serve_spec(place, limits={**LIMITS, "max_bytes_in_flight": 2_000_000, "request_seconds": 20})
    pictures, later = files(encode(normal_image(1)), b"x" * 900_000), {"429", "retry-after"}
    with running(spec) as url:
        with connected(url) as bounded_protocol:
            bounded_protocol.sendall(
                f"POST {SCORE} HTTP/1.1\r\n{HOST}Content-Type: multipart/form-data; boundary=x\r\n".encode()
            )
            bounded_protocol.sendall(b"Content-Length: 1500000\r\n\r\n--x\r\n")
            end = time.monotonic() + 10
            while (answer := httpx.post(url + SCORE, files=pictures)).status_code == 200:
                assert time.monotonic() < end
            assert {str(answer.status_code), *answer.headers} >= later and "2,000,000 bytes" in answer.json()["detail"]
            assert httpx.post(url + SCORE, files=pictures[:1]).status_code == 200
        end = time.monotonic() + 10
        while httpx.post(url + SCORE, files=pictures).status_code != 200:
            assert time.monotonic() < end


OK = "HTTP/1.1 200 OK\r\n"


@contextmanager
def dripping(first: bytes) -> Iterator[tuple[str, list[threading.Event]]]:
    """A web server that sends some bytes and then one every tenth of a second; an event for each lost connection."""
    ended: list[threading.Event] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)

        def drip(bounded_protocol: socket.socket, gone: threading.Event) -> None:
            with bounded_protocol:
                bounded_protocol.recv(1000)
                try:
                    bounded_protocol.sendall(first)
                    while not gone.wait(0.1):
                        bounded_protocol.sendall(b"x")
                except ConnectionError:
                    gone.set()

        def accept() -> None:
            while True:
                try:
                    bounded_protocol, _ = listener.accept()
                except OSError:
                    return
                ended.append(threading.Event())
                threading.Thread(target=drip, args=(bounded_protocol, ended[-1]), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/pub", ended
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("first", [f"{OK}Content-Length: 90000\r\n\r\n".encode(), f"{OK}\r\n".encode(), b"H", b""])
def test_a_web_image_has_its_seconds_as_a_whole(first: bytes) -> None:
    with dripping(first) as (web, ended):
        started = time.monotonic()
        with pytest.raises(MemberError, match=r"its server took more than 0\.4 s") as raised:
            Fetcher(Storage(), 1_000_000, 0.4).read(f"{web}/a.png")
        assert raised.value.status == "unreadable" and time.monotonic() - started < 3
        assert len(ended) == 1 and ended[0].wait(5)


def test_slow_web_images_keep_nobody_else_waiting(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "WEB_THREADS", 2)
    with dripping(f"{OK}\r\n".encode()) as (web, ended):
        limits = {**LIMITS, "fetch_seconds": 1.5}
        spec = serve_spec(place, limits=limits, allow={"sources": [web, f"{place}/open"]})
        with running(spec) as url, ThreadPoolExecutor(7) as pool:
            slow = {"images": [{"uri": f"{web}/a.png"}]}
            asked = [pool.submit(httpx.post, url + SCORE, json=slow, timeout=20) for _ in range(7)]
            assert httpx.post(url + SCORE, files=files(encode(normal_image(1)))).status_code == 200
            stored = {"images": [{"uri": f"{place}/open/loose/a.png"}]}
            assert httpx.post(url + SCORE, json=stored).status_code == 200
            assert sum(one.done() for one in asked) <= 3
            answers = [one.result() for one in asked]
        assert sorted(one.status_code for one in answers) == [422] * 4 + [429] * 3
        assert all(one.headers["retry-after"] == "1" for one in answers if one.status_code == 429)
        assert len(ended) == 4 and all(gone.wait(5) for gone in ended)


def json_body(text: str, path: str = "/v1/archives", more: str = "") -> str:
    """A request with a JSON body, after which the connection is closed."""
    head = f"POST {path} HTTP/1.1\r\n{HOST}Connection: close\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(text)}\r\n\r\n{text}"


RUN = '{"detector": "bottle", "source": {"uri": "/x"}, "sink": {"uri": "/y"}, "max_bad_fraction": %s}'
DEEP = "[" * 100_000
RARE = {
    "deep lists": (json_body(DEEP), (400, 422)),
    "deep lists of images": (json_body(DEEP, SCORE), (400, 422)),
    "a long number": (json_body(RUN % ("9" * 5000)), (400, 422)),
    "no number": (json_body(RUN % "NaN"), (422,)),
    "an endless number": (json_body(RUN % "1e999"), (422,)),
    "half a letter": (json_body(RUN % '"\\ud800"'), (422,)),
    "gzip": (json_body("{}", SCORE, "Content-Encoding: gzip\r\n"), (415,)),
    "a long length": (f"POST {SCORE} HTTP/1.1\r\n{HOST}Content-Length: {'9' * 19}\r\n\r\n", (400,)),
    "a length of 5,000 digits": (f"POST {SCORE} HTTP/1.1\r\n{HOST}Content-Length: {'9' * 5000}\r\n\r\n", (400,)),
    "two lengths": (f"POST {SCORE} HTTP/1.1\r\n{HOST}Content-Length: 1\r\nContent-Length: 2\r\n\r\n", (400,)),
    "an unknown coding": (f"POST {SCORE} HTTP/1.1\r\n{HOST}Transfer-Encoding: gzip\r\n\r\n", (400, 501)),
    "a broken chunk": (f"POST /v1/archives HTTP/1.1\r\n{HOST}{JSON}Transfer-Encoding: chunked\r\n\r\nzz\r\n", (400,)),
    "no HTTP": ("\x16\x03\x01 no HTTP\r\n\r\n", (400,)),
    "another method": (f"OPTIONS /v1/archives HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n", (405,)),
    "a method of nobody": (f"FETCH / HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n", (405,)),
    "a long query": (f"GET /v1/detectors?{'a=b&' * 15_000} HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n", (200,)),
    "a websocket": (
        f"GET /healthz HTTP/1.1\r\n{HOST}Connection: close, Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        (200,),
    ),
}


@pytest.mark.parametrize("name", RARE)
def test_what_is_rarely_sent_has_one_answer_of_one_sentence(open_to_all: str, name: str) -> None:
    sent, statuses = RARE[name]
    started = time.monotonic()
    answer = message(open_to_all, sent)
    assert time.monotonic() - started < 5
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in statuses and answer.count(b"HTTP/1.1 ") == 1, answer[:300]
    if statuses != (200,):
        detail = json.loads(body)["detail"]
        assert isinstance(detail, str) and 0 < len(detail) < 2000, answer[:300]


def test_requests_in_one_packet_are_answered_in_order(open_to_all: str) -> None:
    two = f"GET /healthz HTTP/1.1\r\n{HOST}\r\nGET /v1/nothing HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n"
    answer = message(open_to_all, two)
    assert [int(part.split()[0]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 404]


def test_head_is_answered_as_get_without_a_body(open_to_all: str) -> None:
    for path in ("/", "/healthz", "/readyz", "/v1/detectors"):
        told, got = httpx.head(open_to_all + path), httpx.get(open_to_all + path)
        assert told.status_code == got.status_code == 200 and told.content == b""
        assert told.headers["content-length"] == str(len(got.content))


def chunks(*parts: bytes) -> bytes:
    """A chunked body."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


@pytest.mark.parametrize("path", ["/v1/archives", SCORE])
def test_a_body_that_does_not_say_its_length_ends_at_the_limit(open_to_all: str, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\n{HOST}Connection: close\r\nContent-Type: application/json\r\n"
    coded = "Transfer-Encoding: chunked\r\n\r\n"
    answer = message(open_to_all, head, coded, chunks(*[b" " * 100_000] * 21))
    assert answer.startswith(b"HTTP/1.1 413 ") and b"2,000,000 bytes" in answer, answer[:300]
    assert message(open_to_all, head, coded, chunks(b"{", b"}")).startswith(b"HTTP/1.1 422 ")


def test_a_client_that_asks_whether_to_go_on_is_told_before_it_sends(guarded: str) -> None:
    words = f"POST {SCORE} HTTP/1.1\r\n{HOST}{JSON}Content-Length: 2\r\nExpect: 100-continue\r\n"
    with connected(guarded) as bounded_protocol:
        bounded_protocol.sendall(f"{words}\r\n".encode())
        assert bounded_protocol.recv(100).startswith(b"HTTP/1.1 401 ")
    with connected(guarded) as bounded_protocol:
        bounded_protocol.sendall(f"{words}Connection: close\r\nAuthorization: Bearer {SECRET}\r\n\r\n".encode())
        path = bounded_protocol.recv(100)
        assert path.startswith(b"HTTP/1.1 404 ") or path.startswith(b"HTTP/1.1 100 "), path
        if path.startswith(b"HTTP/1.1 100 "):
            bounded_protocol.sendall(b"{}")
            assert b"HTTP/1.1 422 " in until_closed(bounded_protocol)


def form(*parts: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A multipart body of parts with headers as they are, and its headers."""
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
def test_forms_of_odd_sizes_are_refused_in_one_sentence(open_to_all: str, parts: Any) -> None:
    body, headers = form(*parts)
    started = time.monotonic()
    answer = httpx.post(open_to_all + SCORE, content=body, headers=headers)
    assert answer.status_code in (400, 413, 422) and isinstance(answer.json()["detail"], str), answer.text[:300]
    assert time.monotonic() - started < 3 and len(answer.text) < 3000
