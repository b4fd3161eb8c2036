"""Access control: tokens, scopes, prefixes, host names and limits."""

import asyncio
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raydetect.errors import SpecError
from raydetect.gateway import allowed_uris
from raydetect.gateway.allowed_uris import NotAllowed, Prefixes, is_allowed_address
from raydetect.gateway.http.tokens import is_loopback, read_tokens
from raydetect.gateway.runs import archive_runs
from tests.builders.images import encode, normal_image
from tests.builders.server import SCORE, client, files, make_place, run, serve_spec

BAD_URIS = (
    "s3://line4/daylight/x",
    "s3://line4/day/../x",
    "s3://line4/day/x\n",
    "https://me@images.example/a/b",
    "https://images.example/a/b?x=1",
    "https://images.example.evil/a/b",
    "https://images.example:8/a/b",
)
BEHIND_TLS = {"X-Forwarded-Proto": "https"}
SECRET, OTHER = "a-secret-of-line-four-0001", "a-secret-of-line-five-0002"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_place`."""
    return make_place(tmp_path_factory.mktemp("gateway"))


def test_tokens_have_scopes_and_are_never_shown(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(
        f"- {{name: line4, token: {SECRET}, scopes: [score]}}\n- {{name: night, token: {OTHER}, scopes: [archive]}}\n"
    )
    spec = serve_spec(data_dir, tokens_file=str(path))
    tokens = read_tokens(spec)
    assert SECRET not in repr(tokens)

    def bearer(token: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    async def work() -> list[Any]:
        async with client(spec, tokens) as c:
            return [
                await c.get("/v1/detectors"),
                await c.get("/v1/detectors", headers=bearer(SECRET[:-1])),
                await c.get("/v1/detectors", headers={"Authorization": f"Basic {SECRET}"}),
                await c.get("/v1/detectors", headers=bearer(SECRET)),
                await c.get("/v1/archives", headers=bearer(SECRET)),
                await c.get("/v1/archives", headers=bearer(OTHER)),
                await c.put("/v1/detectors/bottle", json={"artifact": "x"}, headers=bearer(OTHER)),
                await c.get("/healthz"),
                await c.get("/"),
            ]

    answers = run(work())
    assert [answer.status_code for answer in answers] == [401, 401, 401, 200, 403, 200, 403, 200, 200]
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert SECRET not in caplog.text and all(SECRET not in answer.text for answer in answers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, token: short, scopes: [score]}", "can be guessed"),
        ("- {name: a, token: long-enough-to-be-a-token, scopes: [all]}", "scopes"),
        ("- {name: a, scopes: [score]}", "either token or sha256"),
        ("[]", "is not a list"),
        ("{", "not valid YAML"),
    ],
)
def test_wrong_tokens_files_are_refused(data_dir: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message) as raised:
        read_tokens(serve_spec(data_dir, tokens_file=str(path)))
    assert "long-enough" not in str(raised.value) and "short" not in str(raised.value)


def test_listening_beyond_loopback_needs_tokens(data_dir: Path) -> None:
    with pytest.raises(SpecError, match="without tokens"):
        read_tokens(serve_spec(data_dir, host="0.0.0.0"), {})
    assert is_loopback("127.0.0.1") and is_loopback("::1") and not is_loopback("10.0.0.1")


def test_pages_of_other_sites_and_other_names_are_refused(data_dir: Path) -> None:
    async def work() -> list[Any]:
        async with client(serve_spec(data_dir)) as c:
            return [
                await c.get("/v1/detectors", headers={"Host": "evil.example"}),
                await c.get("/v1/detectors", headers={"Origin": "http://evil.example"}),
                await c.get("/v1/detectors", headers={"Origin": "https://127.0.0.1:8000"}),
                await c.get("/v1/detectors", headers={"Origin": "ftp://127.0.0.1:8000"}),
                await c.get("/v1/detectors", headers={"Origin": "null"}),
                await c.get("/v1/detectors", headers={"Origin": "http://127.0.0.1:8000"}),
                await c.get("/v1/detectors", headers={"Origin": "https://127.0.0.1:8000", **BEHIND_TLS}),
            ]

    assert [answer.status_code for answer in run(work())] == [421, 403, 403, 403, 403, 200, 200]


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "0.0.0.0", "224.0.0.1", "fd00:ec2::254"]
)
def test_metadata_and_link_local_addresses_are_refused(address: str) -> None:
    assert not is_allowed_address(address)
    assert is_allowed_address("93.184.216.34") and is_allowed_address("127.0.0.1")


def test_a_host_that_resolves_to_a_refused_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("169.254.169.254", 80))]
    monkeypatch.setattr(allowed_uris.socket, "getaddrinfo", lambda *_, **__: addresses)
    with pytest.raises(NotAllowed, match="does not connect"):
        allowed_uris.resolved("images.example", 80)


def test_prefixes_end_at_a_folder() -> None:
    prefixes = Prefixes.of(["s3://line4/day", "https://Images.example/a"])
    assert prefixes.check("s3://line4/day/x.tar", "source.uri") == "s3://line4/day/x.tar"
    assert prefixes.check("s3://line4//day/./x.tar", "source.uri") == "s3://line4/day/x.tar"
    assert prefixes.check("https://images.EXAMPLE/a/b.png", "source.uri") == "https://images.example/a/b.png"
    for bad in BAD_URIS:
        with pytest.raises(NotAllowed):
            prefixes.check(bad, "source.uri")


def test_images_by_uri_are_read_below_allowed_prefixes_only(data_dir: Path) -> None:
    def body(*uris: str) -> dict[str, Any]:
        return {"images": [{"uri": uri} for uri in uris]}

    async def work() -> list[Any]:
        async with client(serve_spec(data_dir)) as c:
            bodies = [
                body(f"{data_dir}/open/loose/a.png", f"file://{data_dir}/open/loose/missing.png"),
                body(f"{data_dir}/open/../secret.png"),
                body(f"{data_dir}/open/link.png"),
                body("s3://elsewhere/a.png"),
                body("http://169.254.169.254/latest"),
                body(f"zip://x::{data_dir}/open/a.zip"),
                body("http://127.0.0.1:1/images/%2e%2e/a"),
                {"images": [{"uri": f"{data_dir}/open/loose/a.png", "colour": 1}]},
                {"images": []},
            ]
            return [await c.post(SCORE, json=each) for each in bodies]

    first, *refused, unknown, none = run(work())
    assert first.status_code == 200, first.text
    assert [entry["status"] for entry in first.json()["results"]] == ["ok", "unreadable"]
    assert [answer.status_code for answer in refused] == [403] * 6, [answer.text for answer in refused]
    for answer in refused:
        assert str(data_dir / "secret") not in answer.text.replace(f"{data_dir}/open/../secret", "")
    assert unknown.status_code == 422 and "colour" in unknown.json()["detail"]
    assert none.status_code == 422


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:99999/a",
        "http://127.0.0.1:-1/a",
        "http://127.0.0.1:port/a",
        "http://127.0.0.1:1;/a",
        "http://127.0.0.1:\uff11/a",
        "http://[x]/a",
        "http://a\u2100b/a",
        "http://\u4e2d.example/a",
    ],
)
def test_text_that_is_no_url_is_refused_wherever_it_is_sent(data_dir: Path, url: str) -> None:
    def run_of(source: str, sink: str) -> dict[str, Any]:
        return {"detector": "bottle", "source": {"uri": source}, "sink": {"uri": sink}}

    async def work() -> list[Any]:
        run = f"/v1/archives/{archive_runs.run_id(url)}"
        async with client(serve_spec(data_dir)) as c:
            return [
                await c.post(SCORE, json={"images": [{"uri": url}]}),
                await c.post("/v1/archives", json=run_of(url, f"{data_dir}/results/x")),
                await c.post("/v1/archives", json=run_of(f"{data_dir}/open/loose", url)),
                await c.put("/v1/detectors/bottle", json={"artifact": url}),
                await c.get(run),
                await c.get(f"{run}/report"),
                await c.delete(run),
            ]

    answers = run(work())
    assert [answer.status_code for answer in answers] == [422] * 7, [answer.text for answer in answers]
    assert all("is not a valid URL" in answer.json()["detail"] for answer in answers)
    with pytest.raises(SpecError, match="is not a valid URL"):
        Prefixes.of([url])


def test_images_by_uri_share_the_body_limit_and_a_pipe_is_refused(data_dir: Path) -> None:
    folder = data_dir / "open/large"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encode(normal_image(7)) + bytes(900_000))
    os.mkfifo(folder / "pipe.png")

    async def work() -> list[Any]:
        async with client(serve_spec(data_dir)) as c:
            uris = [f"{folder}/{name}" for name in ("0.png", "1.png", "2.png")]
            three = await c.post(SCORE, json={"images": [{"uri": uri} for uri in uris]})
            two = await c.post(SCORE, json={"images": [{"uri": uri} for uri in uris[:2]]})
            pipe = await c.post(SCORE, json={"images": [{"uri": f"{folder}/pipe.png"}]})
            return [three, two, pipe]

    three, two, pipe = run(work())
    assert three.status_code == 422 and "more than 2,000,000 bytes" in three.json()["detail"]
    assert two.status_code == 200, two.text
    assert pipe.status_code == 422 and pipe.json()["results"][0]["error"] == "it is not a file. Name one."


def test_bytes_in_flight_hold_at_least_one_body(data_dir: Path) -> None:
    with pytest.raises(SpecError, match="max_bytes_in_flight is less than max_body_bytes"):
        serve_spec(data_dir, limits={"max_body_bytes": 3, "max_bytes_in_flight": 2})
    assert serve_spec(data_dir, limits={"max_body_bytes": 3}).limits.bytes_in_flight == 12


def test_too_many_requests_get_429_and_retry_after(data_dir: Path) -> None:
    spec = serve_spec(data_dir, limits={"max_requests": 2, "request_seconds": 30})
    picture = encode(normal_image(1))

    async def work() -> list[Any]:
        async with client(spec) as c:
            return list(await asyncio.gather(*(c.post(SCORE, files=files(picture)) for _ in range(8))))

    answers = run(work())
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)


class Web(BaseHTTPRequestHandler):
    """An image, a redirect to it, a file that is too large, and a truncated response."""

    def do_GET(self) -> None:
        image = encode(normal_image(7))
        body = {
            "/images/a.png": image,
            "/images/%C3%A4%20b;c%25.png": image,
            "/images/large.png": b"x" * 1_000_001,
            "/images/cut.png": image[:99],
        }.get(self.path)
        self.send_response(200 if body else 302 if self.path == "/images/moved.png" else 404)
        self.send_header("Location", "/images/a.png")
        self.send_header("Content-Length", str(len(image) if self.path == "/images/cut.png" else len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def test_images_by_url_are_read_and_redirects_are_not_followed(data_dir: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        web = f"http://127.0.0.1:{server.server_port}/images"
        allowed = {"sources": [web, f"{data_dir}/open", "http://169.254.169.254/"]}
        names = ("a.png", "moved.png", "missing.png", "large.png", "cut.png", "ä b;c%.png")

        async def work() -> list[Any]:
            async with client(serve_spec(data_dir, allow=allowed)) as c:
                local = await c.post(SCORE, json={"images": [{"uri": f"{data_dir}/open/loose/a.png"}]})
                read = await c.post(SCORE, json={"images": [{"uri": f"{web}/{name}"} for name in names]})
                metadata = await c.post(SCORE, json={"images": [{"uri": "http://169.254.169.254/latest"}]})
                return [local, read, metadata]

        local, read, metadata = run(work())
    finally:
        server.shutdown()
        server.server_close()
    results = read.json()["results"]
    assert [one["status"] for one in results] == [
        "ok",
        "unreadable",
        "unreadable",
        "too_many_bytes",
        "unreadable",
        "ok",
    ]
    assert results[0]["image_score"] == results[5]["image_score"] == local.json()["results"][0]["image_score"]
    assert metadata.status_code == 403 and "does not connect" in metadata.json()["detail"]
