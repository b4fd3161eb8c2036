"""Requests that once stalled the server or filled its memory, sent to a server in a process of its own."""

import base64
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.builders.attacked import HOLDER, SECOND, Attacked, attacked
from tests.builders.server import SCORE, make_place
from tests.gateway.test_gateway_wire import dripping

RUNS = "/v1/archives"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_place`."""
    return make_place(tmp_path_factory.mktemp("attacks"))


@pytest.fixture(scope="module")
def server(data_dir: Path) -> Iterator[Attacked]:
    """A server with tokens, and bodies of up to 10 MB."""
    limits = {"max_image_bytes": 1_000_000, "max_body_bytes": 10_000_000}
    with attacked(data_dir, limits=limits) as found:
        yield found


def run_of(uri: Any) -> bytes:
    """The body of an archive run."""
    return json.dumps({"detector": "bottle", "source": {"uri": uri}, "sink": {"uri": "/x"}}).encode()


LISTS = b"[" + b"[]," * 3_300_000 + b"[]]"
BODIES: dict[str, tuple[str, bytes, set[int]]] = {
    "10 MB of lists": (RUNS, LISTS, {413}),
    "1 MB of lists": (RUNS, LISTS[:1_000_000], {413}),
    "1 MB of lists to score": (SCORE, LISTS[:1_000_000], {413}),
    "a million URIs that are integers": (RUNS, run_of([1] * 1_000_000), {413}),
    "URIs that are integers": (RUNS, run_of([1] * 3_900), {422}),
    "200,000 URIs": (RUNS, run_of(["/open/x.png"] * 200_000), {413}),
    "1,001 URIs": (RUNS, run_of(["/x"] * 1_001), {422}),
    "a URI of 500,000 folders": (RUNS, run_of("/a" * 500_000), {422}),
    "two million images": (SCORE, json.dumps({"images": [{}] * 2_000_000}).encode(), {413}),
    "images without a URI": (SCORE, json.dumps({"images": [{}] * 1_900}).encode(), {422}),
    "many keys": (RUNS, json.dumps({str(i): 0 for i in range(3_900)}).encode(), {422}),
    "deep objects": (RUNS, b'{"a":' * 3_900 + b"1" + b"}" * 3_900, {422}),
    "a long number": (RUNS, b'{"chunk_images":' + b"9" * 1_000_000 + b"}", {422}),
}


@pytest.mark.parametrize("name", BODIES)
def test_no_json_body_delays_others_or_takes_memory(server: Attacked, name: str) -> None:
    path, body, statuses = BODIES[name]

    def send(_: int) -> httpx.Response:
        return httpx.post(server.url + path, content=body, headers={**JSON, **HOLDER}, timeout=60)

    with ThreadPoolExecutor(4) as pool:
        idle_mb = server.idle_mb()
        answers, slowest, bound = server.health_seconds(lambda: list(pool.map(send, range(4))))
    assert {answer.status_code for answer in answers} == statuses, answers[0].text
    assert all(len(answer.json()["detail"]) < 3000 for answer in answers)
    assert slowest <= bound, f"/healthz took {slowest:.2f} s"
    assert server.memory_mb("VmHWM") <= idle_mb + 64


def test_a_body_without_a_token_is_not_read(server: Attacked) -> None:
    def attack() -> httpx.Response:
        return httpx.post(server.url + RUNS, content=LISTS, headers=JSON, timeout=60)

    idle_mb = server.idle_mb()
    answer, slowest, bound = server.health_seconds(attack)
    assert answer.status_code == 401 and slowest <= bound
    assert server.memory_mb("VmHWM") <= idle_mb + 16


def test_slow_images_by_url_do_not_delay_others_or_the_end(data_dir: Path) -> None:
    with dripping(b"HTTP/1.1 200 OK\r\n\r\n") as (web, _), ThreadPoolExecutor(24) as pool:
        allow = {"sources": [web, f"{data_dir}/open"]}
        with attacked(data_dir, allow=allow, limits={"fetch_seconds": 4}) as server:

            def post(headers: dict[str, str], *uris: str) -> httpx.Response:
                body = {"images": [{"uri": uri} for uri in uris]}
                return httpx.post(server.url + SCORE, json=body, headers=headers, timeout=100)

            slow = [pool.submit(post, HOLDER, *[f"{web}/{i}.png" for i in range(64)]) for _ in range(24)]
            while sum(one.done() for one in slow) < 16:  # beyond the share of one token
                time.sleep(0.05)
            assert {one.result().status_code for one in slow if one.done()} == {429}
            assert post(SECOND, f"{data_dir}/open/loose/a.png").status_code == 200
            assert post(SECOND, f"{web}/0.png").json()["results"][0]["status"] == "unreadable"
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(45) == 0  # 10 s for requests in flight and 4 s for one image
            assert {one.result().status_code for one in slow} == {429, 503}


def test_a_long_run_id_is_no_run(server: Attacked) -> None:
    name = base64.urlsafe_b64encode(b"file:///" + b"a/" * 15_000).decode().rstrip("=")
    answer, slowest, bound = server.health_seconds(lambda: httpx.get(f"{server.url}{RUNS}/{name}", headers=HOLDER))
    assert answer.status_code == 404 and slowest <= bound
