"""Where a local Ray and its messages lie on this machine's disks, and what is told when these refuse."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from ray._common.utils import get_default_system_temp_dir

from raydetect.errors import RaydetectError
from raydetect.storage import disk_reason

LEAST_FREE_BYTES = 32 << 20  # for logs and sockets; with less, Ray waits half a minute and says nothing of the disk
FULL = ("OutOfDiskError", "No space left on device", "Disk quota exceeded")
TOO_LONG = "AF_UNIX path length"
LOGS = "raydetect-ray-*.log"


class ClusterError(RaydetectError):
    """The cluster cannot be reached, refuses the token, or broke down."""


def require_ray_folder() -> None:
    """Refuses to start a local Ray where it could not write.

    Raises:
        ClusterError: its folder cannot be written or is full; says which, and by what to choose another.
    """
    place = Path(get_default_system_temp_dir())
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix="raydetect-", dir=place) as file:
            file.write(b"0" * 4096)
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise ClusterError(f"{place}: Ray cannot write there ({disk_reason(error)}). {_elsewhere(place)}") from None
    if free < LEAST_FREE_BYTES:
        raise ClusterError(
            f"{place}: Ray needs {LEAST_FREE_BYTES >> 20} MiB there, and {free / (1 << 20):.1f} MiB are free. "
            f"{_elsewhere(place)}"
        )


def disk_text(text: str) -> str | None:
    """What Ray's message about a disk means, in a sentence; None when it is about something else."""
    place = Path(get_default_system_temp_dir())
    if TOO_LONG in text:
        return f"{place}: is too long a path for Ray's sockets. Set RAY_TMPDIR to a short one, such as /tmp."
    if any(word in text for word in FULL):
        return f"a disk of Ray is full (on this machine {place}). {_elsewhere(place)} Start the same command again."
    return None


def _elsewhere(place: Path) -> str:
    return f"Free some space, or set RAY_TMPDIR to another folder than {place}."


def messages_file() -> tuple[IO[bytes], Path]:
    """A new file for native messages of Ray, in the temporary folder, held by this process; empty ones of others go.

    Raises:
        ClusterError: it cannot be made.
    """
    try:
        folder = Path(tempfile.gettempdir())
        for log in folder.glob(LOGS):
            _remove_if_left(log)
        path = folder / f"raydetect-ray-{os.getpid()}.log"
        file = path.open("ab")
    except OSError as error:
        place = os.environ.get("TMPDIR", "the temporary folder")
        raise ClusterError(
            f"{place}: cannot hold the messages of Ray ({disk_reason(error)}). Free some space there, or set TMPDIR."
        ) from None
    with suppress(OSError):  # a disk without locks
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file, path


def _remove_if_left(log: Path) -> None:
    """Removes an empty file whose process is gone: that would hold its lock."""
    with suppress(OSError), log.open("rb+") as file:
        if not log.stat().st_size:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.unlink()
