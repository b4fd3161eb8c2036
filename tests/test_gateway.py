"""The endpoints in one process: scores, refusals, tokens, what may be named, archive runs."""

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from raydetect import local
from raydetect.errors import SpecError
from raydetect.gateway import allow
from raydetect.gateway.allow import NotAllowed, Prefixes, is_public_enough
from raydetect.gateway.app import build_app
from raydetect.gateway.tokens import Tokens, is_loopback, read_tokens
from raydetect.plan import plan_score
from raydetect.serve_local import LocalDesk
from raydetect.spec import ScoreSpec, ServeSpec, parse_job
from raydetect.storage import Storage
from raydetect.worker.turns import Turns
from tests.made.archives import mixed_files, normal_files, pack
from tests.made.images import defect_image, encode, normal_image
from tests.made.server import NOBODY, fit_small, serve_spec
from tests.together.runs import rows_of

BAD_URIS = (
    "s3://line4/daylight/x",
    "s3://line4/day/../x",
    "s3://line4/day/x\n",
    "https://me@images.example/a/b",
    "https://images.example/a/b?x=1",
    "https://images.example.evil/a/b",
    "https://images.example:8/a/b",
)
SECRET, OTHER = "a-secret-of-line-four-0001", "a-secret-of-line-five-0002"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two artifacts, an archive and loose images."""
    folder = tmp_path_factory.mktemp("gateway")
    fit_small(folder, "one")
    fit_small(folder, "two", seed=1)
    (folder / "open/loose").mkdir()
    (folder / "open/loose/a.png").write_bytes(encode(normal_image(7)))
    (folder / "secret.png").write_bytes(encode(normal_image(8)))
    (folder / "open/link.png").symlink_to(folder / "secret.png")
    return folder


@asynccontextmanager
async def client(spec: ServeSpec, tokens: Tokens = NOBODY) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to the application without a socket."""
    app = build_app(spec, tokens, LocalDesk(spec))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as made:
        yield made


def files(*pictures: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Parts of a multipart form."""
    return [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(pictures)]


async def chunked() -> AsyncIterator[bytes]:
    """A body that does not say how long it is."""
    for _ in range(21):
        yield b" " * 100_000


SCORE = "/v1/detectors/bottle/score"


def run(work: Any) -> Any:
    """The result of a coroutine."""
    return asyncio.run(work)


def test_scores_are_those_of_a_job_and_heatmaps_come_inline_or_by_uri(place: Path) -> None:
    spec = serve_spec(place)
    names = [name for name, _ in mixed_files(6, 2, masks=False)]
    pictures = [data for _, data in mixed_files(6, 2, masks=False)]
    job = parse_job(
        {
            "kind": "score",
            "source": {"uri": f"{place}/open/mixed"},
            "artifact": f"{place}/models/one",
            "sink": {"uri": f"{place}/truth", "heatmaps": "all"},
            "flag": {"alpha": 0.1},
            "batch_size": 4,
        },
        "score",
    )
    assert isinstance(job, ScoreSpec)
    local.score(plan_score(job), lambda *_: None)
    rows = {row["key"].partition("#")[2]: row for row in rows_of(f"file://{place}/truth", Storage())}

    async def work() -> tuple[Any, Any]:
        async with client(spec) as c:
            inline = await c.post(SCORE, files=files(*pictures), data={"heatmaps": "all"})
            stored = await c.post(SCORE, files=files(*pictures), data={"heatmaps": "flagged", "store_heatmaps": "true"})
            return inline, stored

    inline, stored = run(work())
    assert inline.status_code == stored.status_code == 200, inline.text
    results = inline.json()["results"]
    assert len(results) == len(names)
    for name, found, kept in zip(names, results, stored.json()["results"], strict=True):
        row = rows[name]
        assert found["image_score"] == pytest.approx(row["image_score"], rel=1e-6)
        assert (found["p_value"], found["flagged"]) == (row["p_value"], row["flagged"])
        assert (found["width"], found["height"], found["artifact"]) == (row["width"], row["height"], row["artifact"])
        picture = Image.open(io.BytesIO(base64.b64decode(found["heatmap_png"])))
        assert picture.size == (row["width"], row["height"])
        assert (kept["heatmap_uri"] is not None) == kept["flagged"] and kept["heatmap_png"] is None
        if kept["flagged"]:
            assert Storage().read(kept["heatmap_uri"]) == base64.b64decode(found["heatmap_png"])


def test_a_bad_image_among_good_ones_is_an_entry_and_all_bad_is_422(place: Path) -> None:
    good = [encode(normal_image(i)) for i in range(9)]
    broken = good[0][: len(good[0]) // 2]
    bomb = io.BytesIO()
    Image.new("1", (3000, 3000)).save(bomb, "PNG")

    async def work() -> list[Any]:
        async with client(serve_spec(place)) as c:
            mixed = await c.post(SCORE, files=files(*good, broken))
            bad = await c.post(SCORE, files=files(broken, b"", b"text", bomb.getvalue()))
            return [mixed, bad]

    mixed, bad = run(work())
    assert mixed.status_code == 200
    assert [entry["status"] for entry in mixed.json()["results"]] == ["ok"] * 9 + ["corrupt"]
    last = mixed.json()["results"][-1]
    assert last["image_score"] is None and last["flagged"] is None and "decoded" in last["error"]
    assert bad.status_code == 422 and "none of 4 images" in bad.json()["detail"]
    statuses = [entry["status"] for entry in bad.json()["results"]]
    assert statuses == ["corrupt", "empty", "not_an_image", "too_many_pixels"]


def test_images_by_uri_are_read_within_what_is_allowed(place: Path) -> None:
    def body(*uris: str) -> dict[str, Any]:
        return {"images": [{"uri": uri} for uri in uris]}

    async def work() -> list[Any]:
        async with client(serve_spec(place)) as c:
            bodies = [
                body(f"{place}/open/loose/a.png", f"file://{place}/open/loose/missing.png"),
                body(f"{place}/open/../secret.png"),
                body(f"{place}/open/link.png"),
                body("s3://elsewhere/a.png"),
                body("http://169.254.169.254/latest"),
                body(f"zip://x::{place}/open/a.zip"),
                body("http://127.0.0.1:1/images/%2e%2e/a"),
                {"images": [{"uri": f"{place}/open/loose/a.png", "colour": 1}]},
                {"images": []},
            ]
            return [await c.post(SCORE, json=each) for each in bodies]

    first, *refused, unknown, none = run(work())
    assert first.status_code == 200, first.text
    assert [entry["status"] for entry in first.json()["results"]] == ["ok", "unreadable"]
    assert [answer.status_code for answer in refused] == [403] * 6, [answer.text for answer in refused]
    for answer in refused:
        assert str(place / "secret") not in answer.text.replace(f"{place}/open/../secret", "")
    assert unknown.status_code == 422 and "colour" in unknown.json()["detail"]
    assert none.status_code == 422


def test_unknown_names_and_forms_are_told(place: Path) -> None:
    picture = encode(normal_image(1))

    async def work() -> list[Any]:
        async with client(serve_spec(place)) as c:
            return [
                await c.post("/v1/detectors/botle/score", files=files(picture)),
                await c.get("/v1/detectors/botle"),
                await c.post(SCORE, files=files(picture), data={"heatmap": "all"}),
                await c.post(SCORE, files=files(picture), data={"heatmaps": "some"}),
                await c.post(SCORE, data={"images": "no file"}, files=[("x", ("x", b""))]),
                await c.post(SCORE, content=b"x", headers={"content-type": "image/png"}),
                await c.post(SCORE, content=b"{", headers={"content-type": "application/json"}),
                await c.post(SCORE, content=b"x", headers={"content-type": "multipart/form-data"}),
                await c.post(SCORE, files=files(*[picture] * 13)),
                await c.post(SCORE, content=b"x" * 2_100_000, headers={"content-type": "application/json"}),
                await c.post(SCORE, content=chunked(), headers={"content-type": "application/json"}),
                await c.get("/v1/nothing"),
            ]

    answers = run(work())
    statuses = [answer.status_code for answer in answers]
    assert statuses == [404, 404, 422, 422, 422, 415, 422, 400, 400, 413, 413, 404], [a.text for a in answers]
    assert "Did you mean 'bottle'?" in answers[0].json()["detail"]
    assert all(isinstance(answer.json()["detail"], str) for answer in answers)


def test_tokens_have_scopes_and_are_never_told(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(
        f"- {{name: line4, token: {SECRET}, scopes: [score]}}\n- {{name: night, token: {OTHER}, scopes: [archive]}}\n"
    )
    spec = serve_spec(place, tokens_file=str(path))
    tokens = read_tokens(spec)
    assert SECRET not in repr(tokens)

    def bearer(word: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {word}"}

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
        ("[]", "holds no list"),
        ("{", "not valid YAML"),
    ],
)
def test_wrong_tokens_files_are_refused(place: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message) as raised:
        read_tokens(serve_spec(place, tokens_file=str(path)))
    assert "long-enough" not in str(raised.value) and "short" not in str(raised.value)


def test_listening_beyond_loopback_needs_tokens(place: Path) -> None:
    with pytest.raises(SpecError, match="without tokens"):
        read_tokens(serve_spec(place, host="0.0.0.0"), {})
    assert is_loopback("127.0.0.1") and is_loopback("::1") and not is_loopback("10.0.0.1")


def test_pages_of_other_sites_and_other_names_are_refused(place: Path) -> None:
    async def work() -> list[Any]:
        async with client(serve_spec(place)) as c:
            return [
                await c.get("/v1/detectors", headers={"Host": "evil.example"}),
                await c.get("/v1/detectors", headers={"Origin": "http://evil.example"}),
                await c.get("/v1/detectors", headers={"Origin": "http://127.0.0.1:8000"}),
            ]

    assert [answer.status_code for answer in run(work())] == [421, 403, 200]


def test_too_many_requests_are_told_to_come_later(place: Path) -> None:
    spec = serve_spec(place, limits={"max_requests": 2, "request_seconds": 30})
    picture = encode(normal_image(1))

    async def work() -> list[Any]:
        async with client(spec) as c:
            return list(await asyncio.gather(*(c.post(SCORE, files=files(picture)) for _ in range(8))))

    answers = run(work())
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)


def test_a_new_version_replaces_the_old_and_every_answer_says_which(place: Path) -> None:
    picture = encode(defect_image(1, "blob")[0])

    async def work() -> list[Any]:
        async with client(serve_spec(place)) as c:
            before = await c.post(SCORE, files=files(picture))
            outside = await c.put("/v1/detectors/bottle", json={"artifact": f"{place}/elsewhere"})
            missing = await c.put("/v1/detectors/bottle", json={"artifact": f"{place}/models/none"})
            changed = await c.put("/v1/detectors/bottle", json={"artifact": f"{place}/models/two"})
            after = await c.post(SCORE, files=files(picture))
            return [before, outside, missing, changed, after]

    before, outside, missing, changed, after = run(work())
    assert [a.status_code for a in (before, outside, missing, changed, after)] == [200, 403, 422, 200, 200], (
        missing.text
    )
    assert before.json()["artifact"] != after.json()["artifact"] == changed.json()["artifact"]
    assert after.json()["results"][0]["artifact"] == after.json()["artifact"]
    assert before.json()["results"][0]["image_score"] != after.json()["results"][0]["image_score"]


def test_an_archive_run_gives_the_rows_of_a_job_and_can_be_asked_for_again(place: Path) -> None:
    body = {
        "detector": "bottle",
        "source": {"uri": f"{place}/open/mixed"},
        "sink": {"uri": f"{place}/results/night", "heatmaps": "all"},
        "chunk_images": 2,
    }

    async def work() -> list[Any]:
        async with client(serve_spec(place)) as c:
            begun = await c.post("/v1/archives", json=body)
            assert begun.status_code == 202, begun.text
            where = f"/v1/archives/{begun.json()['id']}"
            end = time.monotonic() + 60
            while (told := (await c.get(where)).json())["state"] == "running" and time.monotonic() < end:
                await asyncio.sleep(0.05)
            again = await c.post("/v1/archives", json=body)
            while (await c.get(where)).json()["state"] == "running":
                await asyncio.sleep(0.05)
            other = await c.post("/v1/archives", json={**body, "chunk_images": 3})
            listed = await c.get("/v1/archives")
            outside = await c.post("/v1/archives", json={**body, "sink": {"uri": f"{place}/elsewhere"}})
            source = await c.post("/v1/archives", json={**body, "source": {"uri": f"{place}/normal"}})
            unknown = await c.post("/v1/archives", json={**body, "detector": "x"})
            storage = {"uri": f"{place}/open/mixed", "storage": {"endpoint_url": "http://169.254.169.254"}}
            keys = await c.post("/v1/archives", json={**body, "source": storage})
            nothing = await c.get("/v1/archives/abc")
            ended = await c.delete(where)
            return [told, again, other, listed, outside, source, unknown, keys, nothing, ended]

    told, again, other, listed, *refused = run(work())
    assert told["state"] == "finished" and told["images"] == 12 and told["shards_done"] == told["shards"] == 3
    assert again.status_code == 202
    assert other.status_code == 409 and "chunk_images" in other.json()["detail"]
    assert [entry["uri"] for entry in listed.json()["runs"]] == [f"file://{place}/results/night"]
    assert [answer.status_code for answer in refused] == [403, 403, 404, 422, 404, 404], [a.text for a in refused]
    served = rows_of(f"file://{place}/results/night", Storage())
    spec = serve_spec(place)
    job = parse_job(
        {
            "kind": "score",
            "source": {"uri": f"{place}/open/mixed", "max_pixels": spec.limits.max_pixels},
            "artifact": f"{place}/models/one",
            "sink": {"uri": f"{place}/truth2", "heatmaps": "all"},
            "flag": {"alpha": 0.1},
            "batch_size": 4,
            "chunk_images": 2,
        },
        "score",
    )
    assert isinstance(job, ScoreSpec)
    local.score(plan_score(job), lambda *_: None)
    assert served == rows_of(f"file://{place}/truth2", Storage())


def test_a_run_is_cancelled_and_goes_on(place: Path) -> None:
    pack(f"file://{place}/open/long", ".tar", normal_files(120, start=900), 6)
    body = {
        "detector": "bottle",
        "source": {"uri": f"{place}/open/long"},
        "sink": {"uri": f"{place}/results/long", "heatmaps": "none"},
        "chunk_images": 4,
    }

    async def until(c: httpx.AsyncClient, where: str, *states: str) -> dict[str, Any]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            told: dict[str, Any] = (await c.get(where)).json()
            if told["state"] in states:
                return told
            await asyncio.sleep(0.02)
        raise AssertionError(told)

    async def work() -> list[dict[str, Any]]:
        async with client(serve_spec(place)) as c:
            begun = (await c.post("/v1/archives", json=body)).json()
            where = f"/v1/archives/{begun['id']}"
            assert (await c.delete(where)).status_code == 200
            cancelled = await until(c, where, "cancelled")
        async with client(serve_spec(place)) as c:  # another server knows it by its ledger
            stopped = (await c.get(where)).json()
            await c.post("/v1/archives", json=body)
            return [cancelled, stopped, await until(c, where, "finished")]

    cancelled, stopped, finished = run(work())
    assert cancelled["images"] < 120 and stopped["state"] == "stopped"
    assert finished["images"] == 120
    assert len(rows_of(f"file://{place}/results/long", Storage())) == 120


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "0.0.0.0", "224.0.0.1", "fd00:ec2::254"]
)
def test_addresses_of_metadata_and_links_are_refused(address: str) -> None:
    assert not is_public_enough(address)
    assert is_public_enough("93.184.216.34") and is_public_enough("127.0.0.1")


def test_a_name_that_leads_to_a_refused_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("169.254.169.254", 80))]
    monkeypatch.setattr(allow.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(NotAllowed, match="does not connect"):
        allow.resolved("images.example", 80)


def test_prefixes_end_at_a_folder() -> None:
    prefixes = Prefixes.of(["s3://line4/day", "https://Images.example/a"])
    assert prefixes.check("s3://line4/day/x.tar", "source.uri") == "s3://line4/day/x.tar"
    assert prefixes.check("s3://line4//day/./x.tar", "source.uri") == "s3://line4/day/x.tar"
    assert prefixes.check("https://images.EXAMPLE/a/b.png", "source.uri") == "https://images.example/a/b.png"
    for bad in BAD_URIS:
        with pytest.raises(NotAllowed):
            prefixes.check(bad, "source.uri")


def test_people_go_before_archives() -> None:
    import threading

    turns, order = Turns(), list[str]()
    turns.online.__enter__()

    def bulk() -> None:
        with turns.bulk:
            order.append("bulk")

    def online() -> None:
        with turns.online:
            order.append("online")

    threads = [threading.Thread(target=work) for work in (bulk, bulk, online, online)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    turns.give()
    for thread in threads:
        thread.join()
    assert order == ["online", "online", "bulk", "bulk"]


def test_the_document_describes_every_endpoint(place: Path) -> None:
    async def work() -> Any:
        async with client(serve_spec(place)) as c:
            return (await c.get("/openapi.json")).json()

    document = run(work())
    assert set(document["paths"]) == {
        "/healthz", "/readyz", "/v1/detectors", "/v1/detectors/{name}", "/v1/detectors/{name}/score", "/v1/archives",
        "/v1/archives/{id}",
    }  # fmt: skip
    bodies = document["paths"]["/v1/detectors/{name}/score"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"application/json", "multipart/form-data"}


@pytest.fixture(autouse=True)
def _some_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
