"""Translates Ray's exceptions to raydetect errors: the original error inside, or one sentence about the cluster.

Ray's libraries wrap errors of other processes in different ways, some as text only. All calls to Ray run inside
`translated`, the only place that handles these differences.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ray import exceptions
from ray._common.utils import get_default_system_temp_dir
from ray.exceptions import RayTaskError

from raydetect.errors import RaydetectError, error_kind

REFUSED = re.compile(r"authentication token|token authentication|unauthenticated|unauthorized|code 401", re.IGNORECASE)
LAST_LINE = re.compile(r"^\s*raydetect\.[a-z_.]*\.([A-Za-z]+): (.+)$", re.MULTILINE)  # of a traceback
LINKS = ("cause", "__cause__", "controller_failure", "health_check_failure", "_base_exc", "__context__")
LOST = (
    exceptions.RayActorError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.WorkerCrashedError,
    exceptions.ObjectLostError,
)
MAX_CHARACTERS = 300
TOO_LONG = "AF_UNIX path length"
DISK_FULL = ("OutOfDiskError", "No space left on device", "Disk quota exceeded")


class ClusterError(RaydetectError):
    """The cluster cannot be reached, refuses the token, or failed."""


@contextmanager
def translated(target: str | None) -> Iterator[None]:
    """Translates exceptions of the block with `translate`.

    Args:
        target: address of the cluster, for messages; None = the local Ray.

    Raises:
        RaydetectError: the translated exception.
    """
    try:
        yield
    except Exception as error:
        translation = translate(error, target)
        if translation is error:
            raise
        raise translation from error


def translate(error: BaseException, target: str | None) -> RaydetectError:
    """Returns an exception of Ray as a raydetect error."""
    return deliberate(error) or _of_cluster(error, target or "the local Ray")


def deliberate(error: BaseException) -> RaydetectError | None:
    """Returns the raydetect error that an exception is or wraps; None if there is none."""
    chain = list(_inside(error))
    for inner in chain:
        # Ray creates errors that inherit from its own class and ours, with a traceback as text.
        if isinstance(inner, RaydetectError) and not isinstance(inner, RayTaskError):
            return inner
    for inner in chain:
        for name, message in reversed(LAST_LINE.findall(str(inner))):
            kind = error_kind(name)
            if kind is not None:
                return _of_text(kind, message)
    return None


def _of_text(kind: type[RaydetectError], message: str) -> RaydetectError:
    error = kind.__new__(kind)
    RaydetectError.__init__(error, message)
    return error


def _inside(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and all errors that it wraps, outermost first."""
    pending, seen = [error], set[int]()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        linked = [getattr(current, name, None) for name in LINKS]
        linked += (getattr(current, "worker_failures", None) or {}).values()  # Ray Train, by rank
        linked += getattr(current, "exceptions", ())  # exception groups
        pending += [inner for inner in linked if isinstance(inner, BaseException)]


def _of_cluster(error: BaseException, target: str) -> ClusterError:
    chain = list(_inside(error))
    text = str(chain[-1] if isinstance(chain[-1], Exception) else error)
    if any(REFUSED.search(str(inner)) for inner in chain):
        return ClusterError(
            f"{target}: refused the connection (authentication). Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's token."
        )
    if any(isinstance(inner, exceptions.OutOfMemoryError) for inner in chain):
        return ClusterError(
            f"{target}: a node ran out of memory, and a worker was killed. Lower resources.num_workers, batch_size or "
            "chunk_bytes, or give nodes more memory, and start the same job again."
        )
    if any(isinstance(inner, LOST) for inner in chain):
        return ClusterError(f"{target}: a worker or its node was lost ({_name(error)}). Start the same job again.")
    disk = _of_disk(f"{_name(inner)}: {inner}" for inner in chain)
    if disk is not None:
        return ClusterError(f"{target}: {disk}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = lines[-1][:MAX_CHARACTERS] if lines else "no message"
    return ClusterError(f"{target}: {_name(error)}: {message}. Check the logs of Ray.")


def _of_disk(texts: Iterable[str]) -> str | None:
    """What a message about a disk means and what to do; None when the error is about something else."""
    text = " ".join(texts)
    if TOO_LONG in text:
        return "its temporary folder has too long a path for sockets. Set RAY_TMPDIR to a short one, such as /tmp."
    if any(phrase in text for phrase in DISK_FULL):
        return (
            f"a disk of Ray is full. Free some space in its temporary folder ({get_default_system_temp_dir()} on this "
            "machine), or set RAY_TMPDIR to another folder, and start the same command again."
        )
    return None


def _name(error: BaseException) -> str:
    return type(error).__name__
