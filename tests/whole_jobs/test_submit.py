"""`raydetect submit` to a head with the Jobs API and token authentication."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.objectstore import free_port
from tests.whole_jobs.conftest import Line
from tests.whole_jobs.runs import PATIENCE, descendants, end, run, start, wait_until
from tests.whole_jobs.test_same_rows import same_as_truth

TOKEN = "token-of-the-tests-0123456789abcdef0123456789abcdef"
WITH_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@contextmanager
def running_head(folder: Path) -> Iterator[str]:
    """Runs a head in another process; yields the dashboard's address."""
    port = free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # so that jobs run this environment's `python`
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.whole_jobs.head", str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env={**os.environ, **WITH_TOKEN, "PATH": path},
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n", (folder / "head.log").read_text()
        yield f"http://127.0.0.1:{port}"
        below = list(descendants(process.pid))
        process.stdin.close()
        process.wait(timeout=60)
        end(below)
    finally:
        process.kill()
        log.close()


def job_info(head: str, job: str, path: str = "") -> Any:
    """Queries the Jobs API for a job."""
    response = httpx.get(f"{head}/api/jobs/{job}{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_head(tmp_path_factory.mktemp("head")) as address:
        yield address


def test_submit_follows_a_job_to_its_exit_code(line: Line, truth: str, head: str, tmp_path: Path) -> None:
    job = line.job("submitted", workers=1)
    ended = run(tmp_path, "submit", job, "--address", head, **WITH_TOKEN)
    message = ended.text()
    assert "Scored 240 images in 12 shards" in message and "ended with exit code 0" in message
    assert "INFO" not in (ended.folder / "stderr").read_text(), message
    assert line.store.secret not in message.replace("test:tester", "") and TOKEN not in message
    same_as_truth(line, "submitted", truth)


def test_the_exit_code_of_a_failing_job_is_returned(line: Line, head: str, tmp_path: Path) -> None:
    job = line.job("refused", workers=1, artifact=line.store.uri("no-such-artifact"))
    result = start(tmp_path, "submit", job, "--address", head, **WITH_TOKEN)
    assert result.wait() == 2
    assert "no artifact" in result.text() and "ended with exit code 2" in result.text()


def test_no_wait_prints_the_job_name(line: Line, head: str, tmp_path: Path) -> None:
    job = line.job("later", workers=1, artifact=line.store.uri("no-such-artifact"))
    result = run(tmp_path, "submit", job, "--address", head, "--no-wait", **WITH_TOKEN)
    name = (result.folder / "stdout").read_text().strip()
    assert name.startswith("raysubmit_") and "no artifact" not in result.text()  # returned before the job ended
    wait_until(lambda: job_info(head, name)["status"] not in ("PENDING", "RUNNING"), PATIENCE, "the job's end")
    assert job_info(head, name)["driver_exit_code"] == 2, job_info(head, name)
    assert "no artifact" in job_info(head, name, "/logs")["logs"]


@pytest.mark.parametrize("environment", [{}, {**WITH_TOKEN, "RAY_AUTH_TOKEN": TOKEN[::-1]}], ids=["none", "wrong"])
def test_submit_is_refused_without_the_token(
    line: Line, head: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    result = start(tmp_path, "submit", line.job("denied"), "--address", head, **environment)
    assert result.wait() == 1
    assert "RAY_AUTH_TOKEN" in result.text() and "Traceback" not in result.text() and TOKEN[::-1] not in result.text()


def test_an_address_without_a_head_is_reported(line: Line, tmp_path: Path) -> None:
    result = start(tmp_path, "submit", line.job("nowhere"), "--address", f"http://127.0.0.1:{free_port()}")
    assert result.wait() == 1
    assert "no Ray dashboard answers there" in result.text()
