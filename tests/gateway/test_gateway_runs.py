"""Archive runs over HTTP in one process: rows, progress, cancelling, and priority of single images."""

import asyncio
import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from raydetect.config import ScoreSpec, parse_job
from raydetect.gateway.runs.archive_runs import run_id
from raydetect.local import jobs
from raydetect.planning.plan import plan_score
from raydetect.scoring.device_queue import DeviceQueue
from raydetect.storage import Storage
from tests.builders.archives import normal_files, pack
from tests.builders.images import encode, normal_image
from tests.builders.results import make_results, names_of
from tests.builders.server import client, make_place, run, serve_spec
from tests.whole_jobs.runs import rows_of


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_place`."""
    return make_place(tmp_path_factory.mktemp("gateway"))


def test_links_that_lead_outside_allowed_folders_are_left_out_of_runs(data_dir: Path) -> None:
    source, outside = data_dir / "open/linked", data_dir / "outside"
    for folder in (source / "a", outside):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(encode(normal_image(3)))
    pack(f"file://{outside}/tars", ".tar", normal_files(4), 1)
    tar = next((outside / "tars").iterdir())
    (source / "a/2.png").symlink_to(outside / "1.png")
    (source / "a/3.png").symlink_to(data_dir / "open/loose/a.png")  # elsewhere, but allowed
    (source / "b.tar").symlink_to(tar)
    (source / "c").symlink_to(outside)
    (data_dir / "open/only").mkdir()
    (data_dir / "open/only/1.png").symlink_to(outside / "1.png")

    async def work() -> list[Any]:
        answers = []
        async with client(serve_spec(data_dir)) as c:
            for number, uri in enumerate((source, f"{source}/*/*.png", data_dir / "open/only", f"{source}/c/*.png")):
                sink = {"uri": f"{data_dir}/results/linked-{number}"}
                body = {"detector": "bottle", "source": {"uri": str(uri)}, "sink": sink}
                started = await c.post("/v1/archives", json=body)
                answers.append(started)
                end = time.monotonic() + 30
                while started.status_code == 202 and time.monotonic() < end:
                    if (await c.get(f"/v1/archives/{started.json()['id']}")).json()["state"] != "running":
                        break
                    await asyncio.sleep(0.05)
        return answers

    whole, pattern, only, named = run(work())
    assert [answer.status_code for answer in (whole, pattern, only, named)] == [202, 202, 422, 403]
    assert "linked_outside (1.png)" in only.json()["detail"]
    for number, left_out in enumerate(({"a/2.png", "b.tar", "c"}, {"a/2.png"})):
        uri = f"file://{data_dir}/results/linked-{number}"
        assert {row["image_uri"].rpartition("/")[2] for row in rows_of(uri, Storage())} == {"1.png", "3.png"}
        counted = json.loads(Storage().read(f"{uri}/manifest.json"))["left_out"]["linked_outside"]
        assert counted["count"] == len(left_out) and set(counted["names"]) == left_out


def test_an_archive_run_gives_the_rows_of_a_job_and_can_be_requested_again(data_dir: Path) -> None:
    body = {
        "detector": "bottle",
        "source": {"uri": f"{data_dir}/open/mixed"},
        "sink": {"uri": f"{data_dir}/results/night", "heatmaps": "all"},
        "chunk_images": 2,
    }

    async def work() -> list[Any]:
        async with client(serve_spec(data_dir)) as c:
            started = await c.post("/v1/archives", json=body)
            assert started.status_code == 202, started.text
            where = f"/v1/archives/{started.json()['id']}"
            end = time.monotonic() + 60
            while (run_state := (await c.get(where)).json())["state"] == "running" and time.monotonic() < end:
                await asyncio.sleep(0.05)
            again = await c.post("/v1/archives", json=body)
            while (await c.get(where)).json()["state"] == "running":
                await asyncio.sleep(0.05)
            other = await c.post("/v1/archives", json={**body, "chunk_images": 3})
            listed = await c.get("/v1/archives")
            outside = await c.post("/v1/archives", json={**body, "sink": {"uri": f"{data_dir}/elsewhere"}})
            source = await c.post("/v1/archives", json={**body, "source": {"uri": f"{data_dir}/normal"}})
            web = {"uri": "http://127.0.0.1:1/images/a.tar"}
            redirected = await c.post("/v1/archives", json={**body, "source": web})
            unknown = await c.post("/v1/archives", json={**body, "detector": "x"})
            storage = {"uri": f"{data_dir}/open/mixed", "storage": {"endpoint_url": "http://169.254.169.254"}}
            keys = await c.post("/v1/archives", json={**body, "source": storage})
            nothing = await c.get("/v1/archives/abc")
            report = await c.get(f"{where}/report")
            assert report.status_code == 200 and report.headers["content-type"].startswith("text/html")
            assert "bottle (" in report.text and "No image" not in report.text
            assert (await c.get("/v1/archives/abc/report")).status_code == 404
            ended = await c.delete(where)
            return [run_state, again, other, listed, outside, source, redirected, unknown, keys, nothing, ended]

    run_state, again, other, listed, *refused = run(work())
    assert (
        run_state["state"] == "finished"
        and run_state["images"] == 12
        and run_state["shards_done"] == run_state["shards"] == 3
    )
    assert again.status_code == 202
    assert other.status_code == 409 and "chunk_images" in other.json()["detail"]
    assert [entry["uri"] for entry in listed.json()["runs"]] == [f"file://{data_dir}/results/night"]
    assert [answer.status_code for answer in refused] == [403, 403, 403, 404, 422, 404, 404], [a.text for a in refused]
    served = rows_of(f"file://{data_dir}/results/night", Storage())
    spec = serve_spec(data_dir)
    job = parse_job(
        {
            "kind": "score",
            "source": {"uri": f"{data_dir}/open/mixed", "max_pixels": spec.limits.max_pixels},
            "artifact": f"{data_dir}/models/one",
            "sink": {"uri": f"{data_dir}/truth2", "heatmaps": "all"},
            "flag": {"alpha": 0.1},
            "batch_size": 4,
            "chunk_images": 2,
        },
        "score",
    )
    assert isinstance(job, ScoreSpec)
    jobs.score(plan_score(job), lambda *_: None)
    assert served == rows_of(f"file://{data_dir}/truth2", Storage())


def test_a_report_shows_no_image_outside_allowed_prefixes(data_dir: Path) -> None:
    names = names_of(6)
    make_results(f"file://{data_dir}/results/strange", names)
    shown = sum(len(shard) - 1 for shard in names)  # the last member of each shard is not an image

    async def work() -> str:
        async with client(serve_spec(data_dir)) as c:
            return (await c.get(f"/v1/archives/{run_id(f'file://{data_dir}/results/strange/results')}/report")).text

    page = run(work())
    assert page.count("reading images from there is not allowed") == shown > 0 and "Report of strange/results" in page


def test_a_cancelled_run_can_be_resumed(data_dir: Path) -> None:
    pack(f"file://{data_dir}/open/long", ".tar", normal_files(120, start=900), 6)
    body = {
        "detector": "bottle",
        "source": {"uri": f"{data_dir}/open/long"},
        "sink": {"uri": f"{data_dir}/results/long", "heatmaps": "none"},
        "chunk_images": 4,
    }

    async def until(c: httpx.AsyncClient, where: str, *states: str) -> dict[str, Any]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            run_state: dict[str, Any] = (await c.get(where)).json()
            if run_state["state"] in states:
                return run_state
            await asyncio.sleep(0.02)
        raise AssertionError(run_state)

    async def work() -> list[dict[str, Any]]:
        async with client(serve_spec(data_dir)) as c:
            started = (await c.post("/v1/archives", json=body)).json()
            where = f"/v1/archives/{started['id']}"
            assert (await c.delete(where)).status_code == 200
            cancelled = await until(c, where, "cancelled")
        async with client(serve_spec(data_dir)) as c:  # another server finds it by its ledger
            stopped = (await c.get(where)).json()
            await c.post("/v1/archives", json=body)
            return [cancelled, stopped, await until(c, where, "finished")]

    cancelled, stopped, finished = run(work())
    assert cancelled["images"] < 120 and stopped["state"] == "stopped"
    assert finished["images"] == 120
    assert len(rows_of(f"file://{data_dir}/results/long", Storage())) == 120


def test_too_many_runs_get_429(data_dir: Path) -> None:
    if not (data_dir / "open/long").exists():
        pack(f"file://{data_dir}/open/long", ".tar", normal_files(120, start=900), 6)
    body = {"detector": "bottle", "source": {"uri": f"{data_dir}/open/long"}, "chunk_images": 4}

    async def work() -> list[httpx.Response]:
        async with client(serve_spec(data_dir, limits={"max_runs": 1})) as c:
            started = await c.post("/v1/archives", json={**body, "sink": {"uri": f"{data_dir}/results/first"}})
            same = await c.post("/v1/archives", json={**body, "sink": {"uri": f"{data_dir}/results/first"}})
            other = await c.post("/v1/archives", json={**body, "sink": {"uri": f"{data_dir}/results/second"}})
            where = f"/v1/archives/{started.json()['id']}"
            await c.delete(where)
            while (await c.get(where)).json()["state"] == "running":
                await asyncio.sleep(0.02)
            return [started, same, other]

    started, same, other = run(work())
    assert (started.status_code, same.status_code, other.status_code) == (202, 202, 429), other.text
    assert started.json()["id"] == same.json()["id"] and other.headers["retry-after"] == "1"


def test_single_images_have_priority_over_archives() -> None:
    device, order, started = DeviceQueue("cpu"), list[str](), threading.Event()
    futures = [device.bulk(lambda: started.wait(10))]
    submits = ((device.bulk, "bulk"), (device.bulk, "bulk"), (device.online, "online"), (device.online, "online"))
    for submit, name in submits:
        futures.append(submit(partial(order.append, name)))  # type: ignore[arg-type]
    started.set()
    for future in futures:
        future.result(10)
    assert order == ["online", "online", "bulk", "bulk"]


def test_an_error_on_the_device_reaches_whoever_sent_the_work() -> None:
    device = DeviceQueue("cpu")
    with pytest.raises(ZeroDivisionError):
        device.bulk(lambda: 1 // 0).result(10)
    assert device.online(lambda: 3).result(10) == 3
