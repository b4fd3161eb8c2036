"""Archives over HTTP in one process: the rows of a job, progress, cancelling, and people before archives."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from raydetect.config import ScoreSpec, parse_job
from raydetect.gateway.runs.archive_runs import run_id
from raydetect.local import jobs
from raydetect.planning.plan import plan_score
from raydetect.scoring.priority import PriorityLock
from raydetect.storage import Storage
from tests.builders.archives import normal_files, pack
from tests.builders.images import encode, normal_image
from tests.builders.results import make_results, names_of
from tests.builders.server import client, make_place, run, serve_spec
from tests.whole_jobs.runs import rows_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_place`."""
    return make_place(tmp_path_factory.mktemp("gateway"))


def test_links_out_of_the_allowed_folders_are_left_out_of_runs(place: Path) -> None:
    source, outside = place / "open/linked", place / "outside"
    for folder in (source / "a", outside):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(encode(normal_image(3)))
    pack(f"file://{outside}/tars", ".tar", normal_files(4), 1)
    tar = next((outside / "tars").iterdir())
    (source / "a/2.png").symlink_to(outside / "1.png")
    (source / "a/3.png").symlink_to(place / "open/loose/a.png")  # elsewhere, but allowed
    (source / "b.tar").symlink_to(tar)
    (source / "c").symlink_to(outside)
    (place / "open/only").mkdir()
    (place / "open/only/1.png").symlink_to(outside / "1.png")

    async def work() -> list[Any]:
        found = []
        async with client(serve_spec(place)) as c:
            for number, uri in enumerate((source, f"{source}/*/*.png", place / "open/only", f"{source}/c/*.png")):
                sink = {"uri": f"{place}/results/linked-{number}"}
                words = {"detector": "bottle", "source": {"uri": str(uri)}, "sink": sink}
                started = await c.post("/v1/archives", json=words)
                found.append(started)
                end = time.monotonic() + 30
                while started.status_code == 202 and time.monotonic() < end:
                    if (await c.get(f"/v1/archives/{started.json()['id']}")).json()["state"] != "running":
                        break
                    await asyncio.sleep(0.05)
        return found

    whole, pattern, only, named = run(work())
    assert [answer.status_code for answer in (whole, pattern, only, named)] == [202, 202, 422, 403]
    assert "linked_outside (1.png)" in only.json()["detail"]
    for number, left_out in enumerate(({"a/2.png", "b.tar", "c"}, {"a/2.png"})):
        uri = f"file://{place}/results/linked-{number}"
        assert {row["image_uri"].rpartition("/")[2] for row in rows_of(uri, Storage())} == {"1.png", "3.png"}
        told = json.loads(Storage().read(f"{uri}/manifest.json"))["left_out"]["linked_outside"]
        assert told["count"] == len(left_out) and set(told["names"]) == left_out


def test_an_archive_run_gives_the_rows_of_a_job_and_can_be_asked_for_again(place: Path) -> None:
    body = {
        "detector": "bottle",
        "source": {"uri": f"{place}/open/mixed"},
        "sink": {"uri": f"{place}/results/night", "heatmaps": "all"},
        "chunk_images": 2,
    }

    async def work() -> list[Any]:
        async with client(serve_spec(place)) as c:
            started = await c.post("/v1/archives", json=body)
            assert started.status_code == 202, started.text
            where = f"/v1/archives/{started.json()['id']}"
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
            web = {"uri": "http://127.0.0.1:1/images/a.tar"}
            redirected = await c.post("/v1/archives", json={**body, "source": web})
            unknown = await c.post("/v1/archives", json={**body, "detector": "x"})
            storage = {"uri": f"{place}/open/mixed", "storage": {"endpoint_url": "http://169.254.169.254"}}
            keys = await c.post("/v1/archives", json={**body, "source": storage})
            nothing = await c.get("/v1/archives/abc")
            report = await c.get(f"{where}/report")
            assert report.status_code == 200 and report.headers["content-type"].startswith("text/html")
            assert "bottle (" in report.text and "No image" not in report.text
            assert (await c.get("/v1/archives/abc/report")).status_code == 404
            ended = await c.delete(where)
            return [told, again, other, listed, outside, source, redirected, unknown, keys, nothing, ended]

    told, again, other, listed, *refused = run(work())
    assert told["state"] == "finished" and told["images"] == 12 and told["shards_done"] == told["shards"] == 3
    assert again.status_code == 202
    assert other.status_code == 409 and "chunk_images" in other.json()["detail"]
    assert [entry["uri"] for entry in listed.json()["runs"]] == [f"file://{place}/results/night"]
    assert [answer.status_code for answer in refused] == [403, 403, 403, 404, 422, 404, 404], [a.text for a in refused]
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
    jobs.score(plan_score(job), lambda *_: None)
    assert served == rows_of(f"file://{place}/truth2", Storage())


def test_a_report_shows_no_image_from_outside_of_what_may_be_read(place: Path) -> None:
    names = names_of(6)
    make_results(f"file://{place}/results/strange", names)
    shown = sum(len(shard) - 1 for shard in names)  # the last of each shard is no image

    async def work() -> str:
        async with client(serve_spec(place)) as c:
            return (await c.get(f"/v1/archives/{run_id(f'file://{place}/results/strange/results')}/report")).text

    page = run(work())
    assert page.count("reading images from there is not allowed") == shown > 0 and "Report of strange/results" in page


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
            started = (await c.post("/v1/archives", json=body)).json()
            where = f"/v1/archives/{started['id']}"
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


def test_more_runs_than_the_server_takes_come_later(place: Path) -> None:
    if not (place / "open/long").exists():
        pack(f"file://{place}/open/long", ".tar", normal_files(120, start=900), 6)
    body = {"detector": "bottle", "source": {"uri": f"{place}/open/long"}, "chunk_images": 4}

    async def work() -> list[httpx.Response]:
        async with client(serve_spec(place, limits={"max_runs": 1})) as c:
            started = await c.post("/v1/archives", json={**body, "sink": {"uri": f"{place}/results/first"}})
            same = await c.post("/v1/archives", json={**body, "sink": {"uri": f"{place}/results/first"}})
            other = await c.post("/v1/archives", json={**body, "sink": {"uri": f"{place}/results/second"}})
            where = f"/v1/archives/{started.json()['id']}"
            await c.delete(where)
            while (await c.get(where)).json()["state"] == "running":
                await asyncio.sleep(0.02)
            return [started, same, other]

    started, same, other = run(work())
    assert (started.status_code, same.status_code, other.status_code) == (202, 202, 429), other.text
    assert started.json()["id"] == same.json()["id"] and other.headers["retry-after"] == "1"


def test_people_go_before_archives() -> None:
    turns, order = PriorityLock(), list[str]()
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
