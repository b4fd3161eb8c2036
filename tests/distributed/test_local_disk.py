"""What a user is told when the disk of a local Ray refuses."""

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from raydetect.distributed import local_disk
from raydetect.distributed.ray_errors import ClusterError, translate


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(ClusterError) as caught:
        act()
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_a_folder_in_which_ray_cannot_write_is_named_before_ray_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    local_disk.require_ray_folder()
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(local_disk, "MIN_FREE_BYTES", 1 << 60)
        message = refusal(local_disk.require_ray_folder)
    assert message.startswith(f"{tmp_path}: Ray needs ") and "MiB are free. Free some space there, or set" in message
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file" / "x"))
    message = refusal(local_disk.require_ray_folder)
    assert message.startswith(f"{tmp_path}/file/x: Ray cannot write there (not a directory).") and "RAY_TMP" in message


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (
            OSError("failed: AF_UNIX path length cannot exceed 107 bytes: /x"),
            "has too long a path for sockets. Set RAY_TMPDIR",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "a disk of Ray is full. Free some space in its temporary"),
        (ray.exceptions.OutOfDiskError("Local disk is full"), "(/the/place on this machine), or set RAY_TMPDIR"),
    ],
)
def test_what_ray_raises_about_its_disk_is_one_sentence(
    raised: Exception, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/the/place")
    message = str(translate(raised, None))
    assert expected in message and "Error" not in message and message.startswith("the local Ray: ")


def test_empty_message_logs_of_ended_processes_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "raydetect-ray-1.log").touch()
    (tmp_path / "raydetect-ray-2.log").write_text("Ray says something")
    held, path = local_disk.open_message_log()
    again, _ = local_disk.open_message_log()
    with held, again:
        assert {file.name for file in tmp_path.iterdir()} == {"raydetect-ray-2.log", path.name}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    message = refusal(local_disk.open_message_log)
    assert message.startswith(f"{tmp_path}/nowhere: cannot hold the messages of Ray (no such file or directory).")
