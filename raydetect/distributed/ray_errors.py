"""What Ray raises, as one of our errors: the deliberate one inside it, whole, or one sentence about the cluster.

Ray wraps errors of other processes, each of its libraries in its own way, and passes some on as text alone. Whatever
asks Ray something does so inside `translated`, which is the one place that knows these ways.
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
LETTERS = 300
TOO_LONG = "AF_UNIX path length"
DISK_FULL = ("OutOfDiskError", "No space left on device", "Disk quota exceeded")


class ClusterError(RaydetectError):
    """The cluster cannot be reached, refuses the token, or broke down."""


@contextmanager
def translated(target: str | None) -> Iterator[None]:
    """Errors of the block leave it as `translate` has them.

    Args:
        target: address of the cluster, for messages; None = the local Ray.

    Raises:
        RaydetectError: whatever went wrong.
    """
    try:
        yield
    except Exception as error:
        found = translate(error, target)
        if found is error:
            raise
        raise found from error


def translate(error: BaseException, target: str | None) -> RaydetectError:
    """Ray's exception as ours."""
    return deliberate(error) or _of_cluster(error, target or "the local Ray")


def deliberate(error: BaseException) -> RaydetectError | None:
    """The deliberate error that an exception is, or that it was raised from, in whatever wrapping."""
    found = list(_inside(error))
    for inner in found:
        # Ray makes errors that are of two classes, its own and ours, and whose text is a traceback.
        if isinstance(inner, RaydetectError) and not isinstance(inner, RayTaskError):
            return inner
    for inner in found:
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
    """The error and all that it holds, the outer ones first."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        held = [getattr(one, name, None) for name in LINKS]
        held += (getattr(one, "worker_failures", None) or {}).values()  # of Ray Train, by rank
        held += getattr(one, "exceptions", ())  # of a group
        waiting += [inner for inner in held if isinstance(inner, BaseException)]


def _of_cluster(error: BaseException, place: str) -> ClusterError:
    found = list(_inside(error))
    text = str(found[-1] if isinstance(found[-1], Exception) else error)
    if any(REFUSED.search(str(inner)) for inner in found):
        return ClusterError(
            f"{place}: refused the connection (authentication). Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's token."
        )
    if any(isinstance(inner, exceptions.OutOfMemoryError) for inner in found):
        return ClusterError(
            f"{place}: a node ran out of memory, and a worker was ended. Lower resources.num_workers, batch_size or "
            "chunk_bytes, or give nodes more memory, and start the same job again."
        )
    if any(isinstance(inner, LOST) for inner in found):
        return ClusterError(f"{place}: a worker or its node was lost ({_name(error)}). Start the same job again.")
    said = _of_disk(f"{_name(inner)}: {inner}" for inner in found)
    if said is not None:
        return ClusterError(f"{place}: {said}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1][:LETTERS] if lines else "it says nothing more"
    return ClusterError(f"{place}: {_name(error)}: {said}. Look at the logs of Ray.")


def _of_disk(texts: Iterable[str]) -> str | None:
    """What a message about a disk means and what to do; None when the error is about something else."""
    found = " ".join(texts)
    if TOO_LONG in found:
        return "its temporary folder has too long a path for sockets. Set RAY_TMPDIR to a short one, such as /tmp."
    if any(word in found for word in DISK_FULL):
        return (
            f"a disk of Ray is full. Free some space in its temporary folder ({get_default_system_temp_dir()} on this "
            "machine), or set RAY_TMPDIR to another folder, and start the same command again."
        )
    return None


def _name(error: BaseException) -> str:
    return type(error).__name__
