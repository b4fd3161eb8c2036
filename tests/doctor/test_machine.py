"""Memory, disks and the cluster's address."""

import socket
from pathlib import Path

import pytest

from raydetect.doctor import machine
from raydetect.doctor.machine import cluster, disk, free_memory, machine_findings


def test_a_disk_is_measured_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = disk("cache", tmp_path / "a" / "b", "Free some.")
    assert found.state == "ok" and found.found.startswith(f"{tmp_path}/a/b: ") and not found.advice
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(machine, "LOW_DISK", 1 << 62)
    assert disk("cache", tmp_path, "Free some.").advice == "Free some."


def test_memory_is_a_number_of_bytes_of_this_machine() -> None:
    assert 1 << 20 < free_memory() < 1 << 50


def test_little_memory_is_a_note_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 10**9)
    found = {finding.topic: finding for finding in machine_findings({})}
    assert found["memory"].state == "note" and "1.0 GB free" in found["memory"].found and found["memory"].advice
    assert found["Ray"].found == "RAY_ADDRESS is not set; jobs start a local Ray"
    assert found["ports"].state == "ok"


def test_the_cluster_of_ray_address_must_answer() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
            assert cluster(address).state == "ok"
    gone = cluster(f"ray://user:hush@127.0.0.1:{port}")
    assert gone.state == "missing" and "cannot be reached" in gone.found and "hush" not in gone.found
    assert cluster("ray://127.0.0.1:nothing").state == "missing" and cluster("auto").state == "ok"


def test_a_small_object_store_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED", tmp_path / "none")
    assert "not there" in {f.topic: f for f in machine_findings({})}[f"{tmp_path}/none"].found
    monkeypatch.setattr(machine, "SHARED", tmp_path)
    monkeypatch.setattr(machine, "LOW_STORE", 1 << 62)
    assert "--shm-size" in {f.topic: f for f in machine_findings({})}[str(tmp_path)].advice
