"""`raydetect submit --kuberay` against a small Kubernetes API: creation, following, exit codes, leaving, refusals."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from raydetect.cli.main import main
from raydetect.kuberay import follow
from tests.builders.commands import interruptible
from tests.kuberay.fake_api import NAMESPACE, TOKEN, Cluster, Step, serving
from tests.kuberay.test_resources import SCORE

IMAGE = ("--image", "registry.example.com/raydetect:1")
FAILED = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\nError: x"
START = (
    Step({}),
    Step({"jobDeploymentStatus": "Initializing"}, {"one-a": "Pending"}),
    Step({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, {"one-a": "Running"}),
)
DONE = {"one-a": "Succeeded"}
COMPLETE = Step({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, DONE)
LINES = [f"line {number} of the job's log, with dots: ..." for number in range(40)]


def failed(code: int) -> Step:
    status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
    return Step({**status, "message": FAILED.format(code), "failed": 3}, DONE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(SCORE))
    return path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    known = Cluster(steps=[*START, COMPLETE], logs={"one-a": LINES, "one-b": ["second attempt"]})
    with serving(known, tmp_path) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield known


def submit(job: Path, *words: str) -> Result:
    result = CliRunner().invoke(main, ["submit", str(job), "--kuberay", "--name", "one", *words])
    assert TOKEN not in result.output and TOKEN not in str(result.exception)
    return result


def test_a_job_is_created_followed_and_its_code_returned(job: Path, cluster: Cluster) -> None:
    result = submit(job, *IMAGE, "--namespace", NAMESPACE)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == LINES
    states = [line for line in result.stderr.splitlines() if line.startswith("one: ")]
    assert states == [f"one: {s}" for s in ("waiting for the operator", "Initializing", "Running", "Complete")]
    assert "Created RayJob one in the namespace vision." in result.stderr and "exit code 0" in result.stderr
    rayjob = cluster.rayjobs["one"]
    assert rayjob["spec"]["entrypoint"] == "raydetect score /jobs/job.yaml"
    ((name, config),) = cluster.configs.items()
    assert yaml.safe_load(config["data"]["job.yaml"]) == SCORE
    (owner,) = config["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("RayJob", "one", "uid-one")
    pod = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == name and TOKEN not in repr((rayjob, config))


@pytest.mark.parametrize("code", [1, 2, 3, 4, 77])
def test_a_failed_job_gives_its_code(job: Path, cluster: Cluster, code: int) -> None:
    cluster.steps = [*START, failed(code)]
    result = submit(job, *IMAGE)
    assert result.exit_code == code and f"one ended with exit code {code}." in result.stderr
    assert "one: Failed (AppFailed)" in result.stderr


def test_signals_and_stopped_jobs_have_the_codes_of_shells(job: Path, cluster: Cluster) -> None:
    cluster.steps = [failed(-9)]
    assert submit(job, *IMAGE).exit_code == 137
    cluster.rayjobs.clear()
    cluster.steps = [Step({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"})]
    assert submit(job, *IMAGE).exit_code == 130


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"jobDeploymentStatus": "ValidationFailed", "message": "name too long"}, "ValidationFailed: name too long"),
        (
            {
                "jobDeploymentStatus": "Failed",
                "reason": "DeadlineExceeded",
                "message": "passed\nfar",
                "jobStatus": "RUNNING",
            },
            "Failed (DeadlineExceeded): passed",
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "SubmissionFailed"}, "Failed (SubmissionFailed): no message"),
    ],
    ids=["validation", "deadline", "submission"],
)
def test_an_end_without_a_code_is_a_sentence(job: Path, cluster: Cluster, status: dict[str, Any], said: str) -> None:
    cluster.steps = [Step(status)]
    result = submit(job, *IMAGE)
    assert result.exit_code == 1 and f"Error: RayJob one: {said}\n" in result.stderr


def test_another_attempt_is_told_and_its_log_shown(job: Path, cluster: Cluster) -> None:
    again = {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "failed": 1}
    second = Step({"jobDeploymentStatus": "Running", "failed": 1}, {"one-b": "Running"})
    end = Step({**COMPLETE.status, "failed": 1}, {"one-b": "Succeeded"})
    cluster.steps = [*START, Step(again), Step({"failed": 1}), second, end]
    result = submit(job, *IMAGE)
    assert result.exit_code == 0 and result.stderr.count("attempt 1 failed; the operator tries again") == 1
    assert result.stdout.splitlines() == [*LINES, "second attempt"]


def test_broken_connections_lose_and_repeat_no_line(job: Path, cluster: Cluster) -> None:
    cluster.breaks, cluster.outages = 1, 2
    result = submit(job, *IMAGE)
    assert result.exit_code == 0 and result.stdout.splitlines() == LINES
    logs = [request for request in cluster.requests if "/log?" in request]
    assert len(logs) >= 2 and "sinceSeconds" not in logs[0] and "sinceSeconds=" in logs[1]


def test_timestamps_are_compared_as_moments() -> None:
    from raydetect.kuberay.api import _moment

    assert _moment("failed") is None and _moment("") is None
    stamps = ["2026-11-22T02:00:00.009Z", "2026-11-22T02:00:00.01Z", "2026-11-22T04:00:00.0100000001+02:00"]
    moments = [_moment(stamp) for stamp in (*stamps, "2026-11-22T02:00:01Z")]
    assert all(one is not None and two is not None and one < two for one, two in itertools.pairwise(moments))


def test_an_api_that_stays_away_ends_following_only(
    job: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.outages = 10**6
    monkeypatch.setattr(follow, "OUTAGE_SECONDS", 0.2)
    result = submit(job, *IMAGE)
    assert result.exit_code == 1 and "503" in result.stderr and "one" in cluster.rayjobs


def test_without_the_right_to_read_logs_the_status_is_followed(job: Path, cluster: Cluster) -> None:
    cluster.refused = {"GET pods": 403}
    cluster.steps = [*START, failed(3)]
    result = submit(job, *IMAGE)
    assert result.exit_code == 3 and result.stderr.count("The log cannot be shown: pods") == 1
    assert "Ask for the rights to" in result.stderr and not result.stdout


def test_no_wait_prints_the_name(job: Path, cluster: Cluster) -> None:
    result = submit(job, *IMAGE, "--no-wait")
    assert (result.exit_code, result.stdout, cluster.looks) == (0, "one\n", 0)


def test_a_job_of_that_name_is_left_alone(job: Path, cluster: Cluster) -> None:
    assert submit(job, *IMAGE).exit_code == 0
    before = (dict(cluster.rayjobs), dict(cluster.configs))
    result = submit(job, *IMAGE)
    assert result.exit_code == 1 and (cluster.rayjobs, cluster.configs) == before
    assert "RayJob one: is in the namespace vision already (Complete)." in result.stderr
    assert "kubectl delete rayjob one -n vision" in result.stderr


@pytest.mark.parametrize(
    ("refused", "schema", "said"),
    [
        ({"POST rayjobs": 403}, "v1.6.0", "not allowed (rayjobs is forbidden: User cannot do it). Ask for the rights"),
        ({"POST configmaps": 403}, "v1.6.0", "not allowed (configmaps is forbidden"),
        ({"POST rayjobs": 401}, "v1.6.0", "refuses the credentials of the kubeconfig"),
        ({}, "v1.5.1", "'secretName' was unexpected)). KubeRay before 1.6 does not know every field"),
    ],
    ids=["rayjob", "configmap", "credentials", "old operator"],
)
def test_refusals_are_sentences_and_leave_nothing(
    job: Path, cluster: Cluster, refused: dict[str, int], schema: str, said: str
) -> None:
    cluster.refused, cluster.schema = refused, schema
    result = submit(job, *IMAGE)
    assert result.exit_code == 1 and said in result.stderr, result.stderr
    assert not cluster.rayjobs and not cluster.configs


def test_a_job_that_is_deleted_meanwhile(job: Path, cluster: Cluster) -> None:
    cluster.refused = {"GET one": 404}
    result = submit(job, *IMAGE)
    assert result.exit_code == 1 and "RayJob one in the namespace vision: not found" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kuberay"], "--image: name the image"),
        ([], "--address, --kuberay: state one"),
        (["--kuberay", "--address", "http://head:8265"], "--address, --kuberay: state one"),
        (["--address", "http://head:8265", "--token-secret", "t"], "--token-secret: works with --kuberay only"),
        (["--kuberay", *IMAGE, "--name", "One"], "--name One: a RayJob's name has at most 47"),
        (["--kuberay", *IMAGE, "--context", "other"], "no way to a cluster"),
        (["--kuberay", *IMAGE, "--set", "kind=scor"], "kind 'scor' is unknown"),
    ],
)
def test_wrong_options_are_found_before_anything_is_created(
    job: Path, cluster: Cluster, words: list[str], said: str
) -> None:
    result = CliRunner().invoke(main, ["submit", str(job), *words])
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert not cluster.requests


def test_without_a_cluster_or_with_one_that_does_not_answer(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    result = submit(job, *IMAGE)
    assert result.exit_code == 2 and "Set KUBECONFIG, or --context." in result.stderr
    with serving(Cluster(), tmp_path) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    result = submit(job, *IMAGE)
    assert result.exit_code == 1 and "no Kubernetes API answers there" in result.stderr


def test_interrupting_leaves_the_job_and_says_how_to_go_on(job: Path, cluster: Cluster, tmp_path: Path) -> None:
    cluster.steps = list(START)
    command = [sys.executable, "-m", "raydetect", "submit", str(job), "--kuberay", "--name", "one", *IMAGE]
    with (tmp_path / "out").open("w") as out, interruptible():
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ})
    try:
        deadline = time.monotonic() + 60
        while LINES[-1] not in (tmp_path / "out").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
    text = (tmp_path / "out").read_text()
    assert "Detached; RayJob one goes on." in text and "kubectl logs -f job/one -n vision" in text
    assert "one" in cluster.rayjobs and not re.search("Traceback|" + TOKEN, text)


def test_without_the_client_the_extra_is_named(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    result = submit(job, *IMAGE)
    assert result.exit_code == 2 and "pip install 'raydetect[kubernetes]'" in result.stderr
