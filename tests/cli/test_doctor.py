"""`raydetect doctor`: its table, its exit codes, and no secret in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from raydetect.cli.main import main
from raydetect.doctor import packages
from raydetect.doctor.finding import Finding


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_machine_that_can_run_jobs_is_exit_code_0(tmp_path: Path) -> None:
    ended = CliRunner().invoke(main, ["doctor", str(tmp_path)])
    assert ended.exit_code == 0, ended.output
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("Python      ok      3.") and lines[-1].startswith("Ready to run jobs; worth a look: ")
    for topic in ("torch", "torchvision", "ray", "faiss", "rasterio", "weights", "memory", "temp", "/dev/shm", "place"):
        assert any(line.startswith(f"{topic:<12}") and line[12:20] in ("ok      ", "note    ") for line in lines), topic
    unbroken = [line for line in lines if len(line) > 80 and "/" not in line]
    assert not unbroken


def test_a_place_that_cannot_be_reached_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-secret")
    ended = CliRunner().invoke(main, ["doctor", "s3://a/b", "--endpoint-url", "http://127.0.0.1:9"])
    assert ended.exit_code == 1 and "place       missing " in ended.stdout, ended.output
    assert "1 of " in ended.stdout and "must be mended before jobs can run" in ended.stdout
    assert "hush" not in ended.output


def test_packages_that_do_not_fit_come_first_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Iterator[Finding]:
        yield Finding("versions", "missing", "torchvision needs torch ==9, and 2 is there", "pip install 'torch==9'")

    monkeypatch.setattr(packages, "package_findings", found)
    ended = CliRunner().invoke(main, ["doctor"])
    assert ended.exit_code == 1
    assert ended.stdout.splitlines()[:2] == [
        "versions    missing torchvision needs torch ==9, and 2 is there",
        "                    -> pip install 'torch==9'",
    ]
    assert "1 of 1 findings must be mended before jobs can run. Run `raydetect doctor` again then" in ended.stdout
    assert "memory" not in ended.stdout


def test_a_wrong_endpoint_is_exit_code_2() -> None:
    for command in (["doctor"], ["init", "s3://a/b"], ["status", "s3://a/b"]):
        ended = CliRunner().invoke(main, [*command, "--endpoint-url", "http://user:hush@host"])
        assert ended.exit_code == 2 and "--endpoint-url: contains a user" in ended.output, ended.output
        assert "hush" not in ended.output
