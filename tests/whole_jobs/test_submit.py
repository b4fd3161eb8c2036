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
    """Yields the dashboard's address."""
    port = free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs run `python` of this environment
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


def told(head: str, job: str, of: str = "") -> Any:
    """What the Jobs API says of a job."""
    answer = httpx.get(f"{head}/api/jobs/{job}{of}", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_head(tmp_path_factory.mktemp("head")) as address:
        yield address


def test_a_submitted_job_is_followed_to_its_exit_code(line: Line, truth: str, head: str, tmp_path: Path) -> None:
    job = line.job("submitted", workers=1)
    ended = run(tmp_path, "submit", job, "--address", head, **WITH_TOKEN)
    message = ended.text()
    assert "Scored 240 images in 12 shards" in message and "ended with exit code 0" in message
    assert "INFO" not in (ended.folder / "stderr").read_text(), message
    assert line.store.secret not in message.replace("test:tester", "") and TOKEN not in message
    same_as_truth(line, "submitted", truth)


def test_the_exit_code_of_a_failing_job_comes_back(line: Line, head: str, tmp_path: Path) -> None:
    job = line.job("refused", workers=1, artifact=line.store.uri("no-such-artifact"))
    ended = start(tmp_path, "submit", job, "--address", head, **WITH_TOKEN)
    assert ended.wait() == 2
    assert "no artifact" in ended.text() and "ended with exit code 2" in ended.text()


def test_no_wait_returns_the_name_of_the_job(line: Line, head: str, tmp_path: Path) -> None:
    job = line.job("later", workers=1, artifact=line.store.uri("no-such-artifact"))
    ended = run(tmp_path, "submit", job, "--address", head, "--no-wait", **WITH_TOKEN)
    name = (ended.folder / "stdout").read_text().strip()
    assert name.startswith("raysubmit_") and "no artifact" not in ended.text()  # its end is not waited for
    wait_until(lambda: told(head, name)["status"] not in ("PENDING", "RUNNING"), PATIENCE, "the job's end")
    assert told(head, name)["driver_exit_code"] == 2, told(head, name)
    assert "no artifact" in told(head, name, "/logs")["logs"]


@pytest.mark.parametrize("environment", [{}, {**WITH_TOKEN, "RAY_AUTH_TOKEN": TOKEN[::-1]}], ids=["none", "wrong"])
def test_without_the_token_it_is_refused(line: Line, head: str, tmp_path: Path, environment: dict[str, str]) -> None:
    ended = start(tmp_path, "submit", line.job("denied"), "--address", head, **environment)
    assert ended.wait() == 1
    assert "RAY_AUTH_TOKEN" in ended.text() and "Traceback" not in ended.text() and TOKEN[::-1] not in ended.text()


def test_where_no_head_is_the_address_is_named(line: Line, tmp_path: Path) -> None:
    ended = start(tmp_path, "submit", line.job("nowhere"), "--address", f"http://127.0.0.1:{free_port()}")
    assert ended.wait() == 1
    assert "no Ray dashboard answers there" in ended.text()
