"""The folders on this machine's disks in which a local Ray writes, checked before Ray is started."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from ray._common.utils import get_default_system_temp_dir

from raydetect.distributed.ray_errors import ClusterError
from raydetect.storage import disk_reason

MIN_FREE_BYTES = 32 << 20  # for logs and sockets; with less, Ray waits for half a minute and does not name the disk
LOGS = "raydetect-ray-*.log"


def require_ray_folder() -> None:
    """Checks that a local Ray can write its files.

    Raises:
        ClusterError: its temporary folder cannot be written or is full.
    """
    folder = Path(get_default_system_temp_dir())
    advice = "Free some space there, or set RAY_TMPDIR to another folder."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix="raydetect-", dir=folder) as file:
            file.write(b"0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ClusterError(f"{folder}: Ray cannot write there ({disk_reason(error)}). {advice}") from None
    if free < MIN_FREE_BYTES:
        needed, left = MIN_FREE_BYTES >> 20, free / (1 << 20)
        raise ClusterError(f"{folder}: Ray needs {needed} MiB there, and {left:.1f} MiB are free. {advice}")


def open_message_log() -> tuple[IO[bytes], Path]:
    """Opens `raydetect-ray-PID.log` in the temporary folder and locks it; deletes empty ones of ended processes.

    Raises:
        ClusterError: it cannot be written.
    """
    try:
        folder = Path(tempfile.gettempdir())
        for log in folder.glob(LOGS):
            _remove_leftover(log)
        path = folder / f"raydetect-ray-{os.getpid()}.log"
        file = path.open("ab")
    except OSError as error:
        place = tempfile.tempdir or os.environ.get("TMPDIR", "the temporary folder")
        raise ClusterError(
            f"{place}: cannot hold the messages of Ray ({disk_reason(error)}). Free some space there, or set TMPDIR to "
            "another folder."
        ) from None
    with suppress(OSError):  # a disk without locks
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file, path


def _remove_leftover(log: Path) -> None:
    """Deletes an empty log that no process locks."""
    with suppress(OSError), log.open("rb+") as file:
        if not log.stat().st_size:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.unlink()
