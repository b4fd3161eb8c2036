"""The few requests to the Kubernetes API that a RayJob needs, by the official client, with errors as one sentence."""

import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from raydetect.errors import RaydetectError, SpecError

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
ANSWER_SECONDS = (10.0, 60.0)  # to connect, and between two bytes of an answer
MARGIN_SECONDS = 5  # of a log that is read again; lines that came before are left out by their timestamps
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
Moment = tuple[datetime, str]  # to the second, and the nanoseconds, which a datetime does not hold
TRANSIENT = (429, 500, 502, 503, 504)
RIGHTS = "create and get of rayjobs.ray.io, create of configmaps, list of pods and get of pods/log"


class KubernetesError(RaydetectError):
    """The Kubernetes API cannot be reached or refuses a request, or a RayJob did not run.

    Args:
        message: one sentence.
        is_transient: the same request may succeed later.
    """

    def __init__(self, message: str, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that submits a RayJob: its name, and whether its container has started and ended."""

    name: str
    has_started: bool
    has_ended: bool


@dataclass(slots=True)
class Log:
    """How far the log of a pod has been read.

    Args:
        pod: the pod's name.
        last: moment of the last line; None = nothing has been read.
        heard: when that line came, by the monotonic clock; None = nothing has been read.
    """

    pod: str
    last: Moment | None = None
    heard: float | None = None


class Api:
    """Requests about one namespace.

    Args:
        context: context of the kubeconfig; None = its current one, or the service account of the pod this runs in.
        namespace: None = the context's.

    Raises:
        SpecError: the client is not installed, or no configuration or context of that name is there.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        try:
            from kubernetes import client, config
        except ImportError:
            raise SpecError("--kuberay: needs Kubernetes' client. Run pip install 'raydetect[kubernetes]'.") from None
        file = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
        in_pod = context is None and not any(Path(path).exists() for path in file.split(os.pathsep))
        settings = client.Configuration()
        settings.retries = False
        try:
            if in_pod:
                config.load_incluster_config(client_configuration=settings)
                home = (SERVICE_ACCOUNT / "namespace").read_text().strip()
            else:
                config.load_kube_config(file, context=context, client_configuration=settings)
                contexts, current = config.list_kube_config_contexts(file)
                used = next((one for one in contexts if one["name"] == context), current)
                home = used["context"].get("namespace") or "default"
        except (config.ConfigException, OSError) as error:
            raise SpecError(f"--kuberay: no way to a cluster ({error}). Set KUBECONFIG, or --context.") from None
        connection = client.ApiClient(settings)
        self.namespace = namespace or home
        self._host = settings.host
        self._client = client
        self._rayjobs, self._core = client.CustomObjectsApi(connection), client.CoreV1Api(connection)

    def create(self, job: dict[str, Any], config: dict[str, Any]) -> None:
        """Creates a RayJob, and its ConfigMap as its property, so that both are deleted together.

        Unknown fields are refused: else an operator's old schema would silently drop them, the token's Secret too.

        Raises:
            KubernetesError: there is a RayJob of that name, or the API refuses one of them; neither is left then.
        """
        name = job["metadata"]["name"]
        try:
            with self._translated(f"RayJob {name}"):
                created = self._rayjobs.create_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, job,
                    field_validation="Strict", _request_timeout=ANSWER_SECONDS,
                )  # fmt: skip
        except AlreadyThere:
            raise self._conflict(name) from None
        owner = self._client.V1OwnerReference(
            api_version=f"{GROUP}/{VERSION}", kind="RayJob", name=name, uid=created["metadata"]["uid"], controller=True
        )
        meta = self._client.V1ObjectMeta(**config["metadata"], owner_references=[owner])
        body = self._client.V1ConfigMap(api_version="v1", kind="ConfigMap", metadata=meta, data=config["data"])
        try:
            with self._translated(f"ConfigMap {config['metadata']['name']}"):
                self._core.create_namespaced_config_map(self.namespace, body, _request_timeout=ANSWER_SECONDS)
        except BaseException:
            self._delete(name)
            raise

    def _conflict(self, name: str) -> KubernetesError:
        state = self.status(name).get("jobDeploymentStatus") or "waiting for the operator"
        return KubernetesError(
            f"RayJob {name}: is in the namespace {self.namespace} already ({state}). Choose another --name, or remove "
            f"it, with its pods and log: kubectl delete rayjob {name} -n {self.namespace}"
        )

    def _delete(self, name: str) -> None:
        with self._translated(f"RayJob {name}"):
            self._rayjobs.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=ANSWER_SECONDS
            )

    def status(self, name: str) -> dict[str, Any]:
        """The status of a RayJob, empty if the operator has not seen it yet.

        Raises:
            KubernetesError: it is gone, or the API does not answer.
        """
        with self._translated(f"RayJob {name}"):
            found = self._rayjobs.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=ANSWER_SECONDS
            )
        status: dict[str, Any] = found.get("status") or {}
        return status

    def submitters(self, name: str) -> list[Pod]:
        """The pods that submit a RayJob and follow its log, oldest first.

        Raises:
            KubernetesError: the API does not answer.
        """
        with self._translated("pods"):
            found = self._core.list_namespaced_pod(
                self.namespace, label_selector=f"job-name={name}", _request_timeout=ANSWER_SECONDS
            )
        pods = sorted(found.items, key=lambda pod: str(pod.metadata.creation_timestamp))
        phases = [(pod.metadata.name, pod.status.phase or "Pending") for pod in pods]
        return [Pod(name, phase != "Pending", phase in ("Succeeded", "Failed")) for name, phase in phases]

    def read(self, log: Log, wait: bool) -> Iterator[str]:
        """The next lines of a pod's log, and with `wait` those to come, until a minute passes without one.

        A broken connection is no end: the next call goes on after the last line, which its timestamp tells.

        Raises:
            KubernetesError: the API refuses, or does not answer.
        """
        since = None if log.heard is None else math.ceil(time.monotonic() - log.heard) + MARGIN_SECONDS
        with self._translated(f"log of pod {log.pod}"):
            answer = self._core.read_namespaced_pod_log(
                log.pod, self.namespace, follow=wait, timestamps=True, since_seconds=since,
                _preload_content=False, _request_timeout=ANSWER_SECONDS,
            )  # fmt: skip
            known = log.last
            for line in _lines(answer):
                stamp, _, text = line.partition(" ")
                moment = _moment(stamp)
                if moment is None:
                    yield line  # of the kubelet, about the log
                    continue
                log.heard = time.monotonic()
                if known is None or moment > known:
                    log.last = moment
                    yield text

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Translates errors of the client; none of their headers, in which tokens are, gets into a message."""
        from urllib3.exceptions import HTTPError

        try:
            yield
        except self._client.ApiException as error:
            raise self._refusal(what, error) from None
        except HTTPError as error:
            raise KubernetesError(
                f"{self._host}: no Kubernetes API answers there ({type(error).__name__}). Check the kubeconfig and "
                "--context.",
                is_transient=True,
            ) from None

    def _refusal(self, what: str, error: Any) -> KubernetesError:
        where = f"{what} in the namespace {self.namespace}"
        said = _said(error)
        if error.status == 401:
            return KubernetesError(f"{self._host}: refuses the credentials of the kubeconfig. Log in again.")
        if error.status == 403:
            return KubernetesError(f"{where}: not allowed ({said}). Ask for the rights to {RIGHTS}.")
        if error.status == 404 and "the server could not find the requested resource" in said:
            return KubernetesError(f"{where}: the cluster knows no RayJobs. Install KubeRay 1.6 or newer there.")
        if error.status == 404:
            return KubernetesError(f"{where}: not found ({said}).")
        if error.status == 409:
            return AlreadyThere(f"{where}: there is one already.")
        if error.status in (400, 422):
            return KubernetesError(
                f"{where}: refused ({said}). KubeRay before 1.6 does not know every field; else correct the template."
            )
        return KubernetesError(f"{where}: {error.status} ({said}).", error.status in TRANSIENT)


class AlreadyThere(KubernetesError):
    """There is a resource of that name."""


def _lines(answer: Any) -> Iterator[str]:
    """The whole lines of a stream; ends where it ends, or when nothing comes for a while."""
    from urllib3.exceptions import ReadTimeoutError

    rest = b""
    try:
        for piece in answer.stream(1024, decode_content=True):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
    except ReadTimeoutError:
        return
    finally:
        answer.close()


def _moment(stamp: str) -> Moment | None:
    """A timestamp of a log as a value to compare; None if it is none."""
    try:
        fraction = re.search(r"\.(\d+)", stamp)
        return datetime.fromisoformat(stamp).replace(microsecond=0), fraction.group(1).ljust(9, "0") if fraction else ""
    except ValueError:
        return None


def _said(error: Any) -> str:
    """The sentence of an answer of the API, without its headers."""
    try:
        return str(json.loads(error.body)["message"]).strip()
    except (ValueError, KeyError, TypeError):
        return str(error.body or error.reason or "no message").strip()[:200]
