"""Ray Jobs: submits a job file to a cluster, follows its log, and returns its exit code."""

import asyncio
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from raydetect.distributed.session import ClusterError, translate

ENTRYPOINT = "python -m raydetect {kind} job.yaml"
STOPPED_EXIT_CODE = 130


def submit(address: str, values: dict[str, Any]) -> tuple[JobSubmissionClient, str]:
    """Submits a checked job and returns its client and id.

    The job file travels as the job's working directory; the cluster's image has raydetect installed.

    Args:
        address: of the cluster's dashboard, `http://head:8265`.
        values: the job file's plain values, overrides applied.

    Raises:
        ClusterError: it cannot be reached or refuses the token.
    """
    try:
        client = JobSubmissionClient(address)
        logging.getLogger("ray").setLevel(logging.ERROR)  # after the client, which sets it to INFO
        with tempfile.TemporaryDirectory(prefix="raydetect-") as folder:
            (Path(folder) / "job.yaml").write_text(yaml.safe_dump(values))
            job = client.submit_job(
                entrypoint=ENTRYPOINT.format(kind=values["kind"]), runtime_env={"working_dir": folder}
            )
    except Exception as error:
        raise _refused(error, address) from None
    return client, str(job)


def follow(client: JobSubmissionClient, job: str, echo: Callable[[str], None]) -> int:
    """Prints the job's log as it grows, and returns its exit code.

    Raises:
        ClusterError: the job never ran, or its driver was lost.
    """
    asyncio.run(_tail(client, job, echo))
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED_EXIT_CODE
    if info.driver_exit_code is None:
        raise ClusterError(f"job {job}: did not run to an end ({info.message}). Look at its log on the cluster.")
    return int(info.driver_exit_code)


async def _tail(client: JobSubmissionClient, job: str, echo: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job):
        echo(text)


def _refused(error: Exception, address: str) -> Exception:
    text = str(error)
    if "connect" in text.lower() and "auth" not in text.lower():
        return ClusterError(f"{address}: no Ray dashboard answers there. Check --address (http://HOST:8265).")
    return translate(error, address)
