"""`raydetect serve --local` as people run it: asked by curl, killed in the middle of an archive, started again."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner

from raydetect.cli.main import main
from raydetect.config import ScoreSpec, parse_job
from raydetect.local import jobs
from raydetect.planning.plan import plan_score
from raydetect.storage import Storage
from tests.builders.archives import normal_files, pack
from tests.builders.server import make_place
from tests.objectstore import free_port
from tests.whole_jobs.runs import Run, end_started, rows_of, start, wait_until

SECRET = "a-secret-of-the-command-01"
PATIENCE = 60
IMAGES, SHARDS = 240, 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_place`, and an archive of IMAGES images."""
    folder = make_place(tmp_path_factory.mktemp("command"))
    pack(f"file://{folder}/open/long", ".tar", normal_files(IMAGES, start=900), SHARDS)
    return folder


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    end_started()


def started(place: Path, folder: Path) -> tuple[Run, str]:
    """A server that answers, and its URL."""
    port = free_port()
    values = {
        "kind": "serve",
        "detectors": {"bottle": {"artifact": f"{place}/models/one", "flag": {"alpha": 0.1}}},
        "port": port,
        "allow": {"sources": [f"{place}/open"], "sinks": [f"{place}/results"]},
        "batch_size": 4,
    }
    folder.mkdir(exist_ok=True)
    (folder / "serve.yaml").write_text(yaml.safe_dump(values))
    tokens = f"[{{name: line4, token: {SECRET}, scopes: [score, archive]}}]"
    running = start(folder, "serve", str(folder / "serve.yaml"), "--local", RAYDETECT_TOKENS=tokens)

    def answers() -> bool:
        assert running.process.poll() is None, running.text()
        return "Tokens: 1" in running.text()

    wait_until(answers, PATIENCE, "the start of the server")
    return running, f"http://127.0.0.1:{port}"


def curl(*arguments: str) -> tuple[int, Any]:
    """Status and JSON body."""
    message = subprocess.run(
        ["curl", "--silent", "--show-error", "--write-out", "\n%{http_code}", *arguments],
        capture_output=True, check=True, text=True, timeout=PATIENCE,
    ).stdout  # fmt: skip
    body, _, status = message.rpartition("\n")
    return int(status), json.loads(body)


def test_curl_scores_and_the_server_ends_when_told(place: Path, tmp_path: Path) -> None:
    running, url = started(place, tmp_path)
    token, where = ("--header", f"Authorization: Bearer {SECRET}"), f"{url}/v1/detectors/bottle/score"
    loose = place / "open/loose/a.png"
    form = ("--form", f"images=@{loose}", "--form", f"images=@{tmp_path}/serve.yaml", "--form", "heatmaps=all")
    status, sent = curl(*token, *form, where)
    assert status == 200 and [one["status"] for one in sent["results"]] == ["ok", "not_an_image"]
    assert sent["results"][0]["name"] == "a.png" and sent["results"][0]["heatmap_png"]
    body = json.dumps({"images": [{"uri": str(loose)}]})
    status, named = curl(*token, "--header", "Content-Type: application/json", "--data", body, where)
    assert status == 200 and named["results"][0]["image_score"] == sent["results"][0]["image_score"]
    assert curl(*form, where)[0] == 401
    status, missing = curl(*token, f"{url}/v1/detectors/botle")
    assert status == 404 and "Did you mean 'bottle'?" in missing["detail"]
    assert curl(f"{url}/healthz")[0] == 200 and curl(f"{url}/readyz")[0] == 200
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.wait(PATIENCE) == 0 and "Stopped." in running.text() and SECRET not in running.text()


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"detectors": {"bottle": {"artifact": "{place}/models/none"}}}, "no artifact: "),
        ({"detectors": {"bottle": {"artifact": "{place}/models/one", "flag": {"alpha": 0.001}}}}, "alpha"),
        ({"host": "0.0.0.0"}, "beyond loopback without tokens"),
        ({"allow": {"sources": ["zip://a::b"]}}, "zip://a::b"),
        ({"tokens_file": "{place}/none.yaml"}, "tokens_file"),
        ({"batchsize": 4}, "Did you mean 'batch_size'?"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    place: Path, tmp_path: Path, changes: dict[str, Any], mistake: str
) -> None:
    values = {"kind": "serve", "detectors": {"bottle": {"artifact": "{place}/models/one", "flag": {"alpha": 0.1}}}}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}).replace("{place}", str(place)))
    for arguments in (["check", str(path)], ["serve", str(path), "--local"]):
        ended = CliRunner().invoke(main, arguments)
        message = ended.output + ended.stderr
        assert ended.exit_code == 2 and mistake in " ".join(message.split()) and "Traceback" not in message, message


def test_a_job_for_endpoints_needs_endpoints_and_a_server_a_free_port(place: Path, tmp_path: Path) -> None:
    job = {
        "kind": "score",
        "source": {"uri": f"{place}/open/mixed"},
        "artifact": f"{place}/models/one",
        "sink": {"uri": f"{place}/nowhere"},
        "flag": {"alpha": 0.1},
        "engine": "serve",
    }
    (tmp_path / "score.yaml").write_text(yaml.safe_dump(job))
    ended = CliRunner().invoke(main, ["score", str(tmp_path / "score.yaml")])
    assert ended.exit_code == 2 and "Set --address" in ended.stderr
    assert not (place / "nowhere/run.json").exists()
    values = {"kind": "serve", "detectors": {"bottle": {"artifact": f"{place}/models/one", "flag": {"alpha": 0.1}}}}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        path = tmp_path / "serve.yaml"
        path.write_text(yaml.safe_dump({**values, "port": taken.getsockname()[1]}))
        for arguments in ([], ["--local"]):
            ended = CliRunner().invoke(main, ["serve", str(path), *arguments])
            assert ended.exit_code == 2 and "cannot be listened on" in ended.stderr, ended.output


def test_a_server_killed_in_the_middle_of_an_archive_goes_on_with_equal_rows(place: Path, tmp_path: Path) -> None:
    archive = {"uri": f"{place}/open/long"}
    settings = {
        "detector": "bottle",
        "source": archive,
        "sink": {"uri": f"{place}/results/killed", "heatmaps": "all"},
        "chunk_images": 5,
    }
    headers = {"Authorization": f"Bearer {SECRET}"}
    running, url = started(place, tmp_path / "first")
    where = httpx.post(f"{url}/v1/archives", json=settings, headers=headers).raise_for_status().json()["id"]

    def told(url: str) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{url}/v1/archives/{where}", headers=headers).raise_for_status().json()
        return found

    wait_until(lambda: told(url)["shards_done"] > 0, PATIENCE, "the first commit")
    running.kill()
    running, url = started(place, tmp_path / "again")
    stopped = told(url)
    assert stopped["state"] == "stopped" and 0 < stopped["shards_done"] < SHARDS
    httpx.post(f"{url}/v1/archives", json=settings, headers=headers).raise_for_status()
    wait_until(lambda: told(url)["state"] != "running", PATIENCE, "the end of the run")
    assert told(url)["state"] == "finished" and told(url)["statuses"] == {"ok": IMAGES}
    running.kill()
    job = {
        "kind": "score",
        "source": {**archive, "max_pixels": 100_000_000},
        "artifact": f"{place}/models/one",
        "sink": {"uri": f"{place}/truth", "heatmaps": "all"},
        "flag": {"alpha": 0.1},
        "batch_size": 4,
        "chunk_images": 5,
    }
    spec = parse_job(job, "score")
    assert isinstance(spec, ScoreSpec)
    jobs.score(plan_score(spec), lambda *_: None)
    assert rows_of(f"file://{place}/results/killed", Storage()) == rows_of(f"file://{place}/truth", Storage())
