"""Submits a job file to a cluster with Ray Jobs, follows its log and returns its exit code."""

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from raydetect.distributed.ray_errors import ClusterError, translate

ENTRYPOINT = "python -m raydetect {kind} job.yaml"
STOPPED_EXIT_CODE = 130
NOT_YET, AGENT_SECONDS = "No available agent", 60.0
CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # Ray sets them to INFO


def submit(address: str, values: dict[str, Any]) -> tuple[JobSubmissionClient, str]:
    """Submits a validated job and returns its client and ID.

    The job file is uploaded as the job's working directory; raydetect must be installed in the cluster's image.

    Args:
        address: URL of the cluster's dashboard, `http://head:8265`.
        values: the job file's plain values, with overrides applied.

    Raises:
        ClusterError: the cluster cannot be reached or rejects the token.
    """
    try:
        client = JobSubmissionClient(address)
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        with tempfile.TemporaryDirectory(prefix="raydetect-") as folder:
            (Path(folder) / "job.yaml").write_text(yaml.safe_dump(values))
            job = _submit_when_ready(client, ENTRYPOINT.format(kind=values["kind"]), folder)
    except Exception as error:
        raise _translate(error, address) from None
    return client, job


def _submit_when_ready(client: JobSubmissionClient, entrypoint: str, folder: str) -> str:
    """Submits and returns the job's ID; retries while the agent of a newly started head is not up."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder}))
        except RuntimeError as error:
            if NOT_YET not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def follow(client: JobSubmissionClient, job: str, echo: Callable[[str], None]) -> int:
    """Streams the job's log and returns its exit code.

    Raises:
        ClusterError: the job never started, or its driver was lost.
    """
    asyncio.run(_tail(client, job, echo))
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED_EXIT_CODE
    if info.driver_exit_code is None:
        raise ClusterError(f"job {job}: did not finish ({info.message}). See its log on the cluster.")
    return int(info.driver_exit_code)


async def _tail(client: JobSubmissionClient, job: str, echo: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job):
        echo(text)


def _translate(error: Exception, address: str) -> Exception:
    text = str(error)
    if "connect" in text.lower() and "auth" not in text.lower():
        return ClusterError(f"{address}: no Ray dashboard answers there. Check --address (http://HOST:8265).")
    return translate(error, address)
