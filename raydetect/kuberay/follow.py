"""Follows a RayJob: what happens to it, the log of its job, and at last its exit code."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from raydetect.kuberay.api import KubernetesError, Log, Pod

POLL_SECONDS = 2.0
OUTAGE_SECONDS = 300.0  # for which the API may not answer, one request after the other
STOPPED_EXIT_CODE = 130
CODE = re.compile(r"failed with exit code (-?\d+)")  # Ray's sentence about a driver, the only place that has the code
ENDED = ("Complete", "Failed", "ValidationFailed")
MAX_CHARACTERS = 300


class Jobs(Protocol):
    """What following needs of the Kubernetes API; `Api` has it."""

    def status(self, name: str) -> dict[str, Any]:
        """The status of a RayJob."""

    def submitters(self, name: str) -> list[Pod]:
        """The pods that submit it."""

    def read(self, log: Log, wait: bool) -> Iterator[str]:
        """The next lines of a pod's log."""


def follow(jobs: Jobs, name: str, echo: Callable[[str], None], tell: Callable[[str], None]) -> int:
    """Follows a RayJob to its end and returns the exit code of its job.

    Args:
        jobs: the Kubernetes API.
        name: name of the RayJob.
        echo: receives each line of the job's log.
        tell: receives what happens to the RayJob.

    Raises:
        KubernetesError: it is gone, the operator refuses it, or it ended without an exit code; or the API does not
            answer for five minutes, in which case it goes on.
    """
    told, logs = _Told(name, tell), _Logs(jobs, name, echo, tell)
    silent_since = None
    while True:
        try:
            status = jobs.status(name)
            told.status(status)
            has_ended = status.get("jobDeploymentStatus") in ENDED
            logs.show(wait=not has_ended)
        except KubernetesError as error:
            silent_since = silent_since or time.monotonic()
            if not error.is_transient or time.monotonic() - silent_since > OUTAGE_SECONDS:
                raise
        else:
            silent_since = None
            if has_ended:
                return _exit_code(name, status)
        time.sleep(POLL_SECONDS)


class _Told:
    """Tells each change of a RayJob once."""

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        self._name, self._tell = name, tell
        self._state, self._attempts = "", 0

    def status(self, status: dict[str, Any]) -> None:
        state = str(status.get("jobDeploymentStatus") or "waiting for the operator")
        failed = int(status.get("failed") or 0)
        if failed > self._attempts and state not in ENDED:
            self._tell(f"{self._name}: attempt {failed} failed; the operator tries again on a new cluster.")
        if state != self._state:
            self._tell(f"{self._name}: {state}{_reason(status)}")
        self._state, self._attempts = state, max(failed, self._attempts)


class _Logs:
    """Shows the logs of the pods that submit a RayJob, one after the other, each line once."""

    def __init__(self, jobs: Jobs, name: str, echo: Callable[[str], None], tell: Callable[[str], None]) -> None:
        self._jobs, self._name, self._echo, self._tell = jobs, name, echo, tell
        self._logs: dict[str, Log] = {}
        self._done: set[str] = set()
        self._is_refused = False

    def show(self, wait: bool) -> None:
        """Shows what is there, and with `wait` what comes until a minute passes without a line.

        Raises:
            KubernetesError: the API does not answer. What it refuses is told once, and following goes on.
        """
        try:
            for pod in self._jobs.submitters(self._name):
                if pod.has_started and pod.name not in self._done:
                    for line in self._jobs.read(self._logs.setdefault(pod.name, Log(pod.name)), wait):
                        self._echo(line)
                    if pod.has_ended:
                        self._done.add(pod.name)
        except KubernetesError as error:
            if error.is_transient:
                raise
            if not self._is_refused:
                self._tell(f"The log cannot be shown: {error}")
            self._is_refused = True


def _reason(status: dict[str, Any]) -> str:
    reason = status.get("reason")
    return f" ({reason})" if reason else ""


def _exit_code(name: str, status: dict[str, Any]) -> int:
    state, job = status["jobDeploymentStatus"], status.get("jobStatus")
    if state == "Complete" and job == "SUCCEEDED":
        return 0
    if job == "STOPPED":
        return STOPPED_EXIT_CODE
    message = str(status.get("message") or "no message")
    code = CODE.search(message)
    if job == "FAILED" and code:
        number = int(code.group(1))
        return number if number >= 0 else 128 - number  # a signal, as shells report it
    shown = message.splitlines()[0][:MAX_CHARACTERS]
    raise KubernetesError(f"RayJob {name}: {state}{_reason(status)}: {shown}")
