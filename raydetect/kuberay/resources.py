"""The RayJob and the ConfigMap of a job file, from a template with overrides."""

import copy
import re
import secrets
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from raydetect.config import AuditSpec, FitSpec, JobSpec, ResourceSpec, ScoreSpec, without_credentials
from raydetect.config.yaml_text import read_text
from raydetect.errors import SpecError

FOLDER, FILE, VOLUME = "/jobs", "job.yaml", "jobs"
GPU = "nvidia.com/gpu"
MAX_NAME = 47  # of a RayJob; the operator refuses longer ones
MAX_FILE_BYTES = 1_000_000  # etcd refuses objects of more than 1 MiB
LABELS = {"app.kubernetes.io/managed-by": "raydetect"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What a command changes in its template.

    Args:
        image: image of all nodes; None keeps the template's.
        workers: number of worker pods; None derives it from the job.
        gpus: GPUs of a worker pod; None keeps the template's.
        token_secret: Secret with the cluster's token under the key `auth_token`.
        storage_secret: Secret whose keys become environment variables of all nodes.
        pull_secret: Secret for the registry of the image.
    """

    image: str | None = None
    workers: int | None = None
    gpus: int | None = None
    token_secret: str | None = None
    storage_secret: str | None = None
    pull_secret: str | None = None


def name_of(job: Path, kind: str) -> str:
    """A name for a job's RayJob, from its file: the same for the same file."""
    words = re.sub(r"[^a-z0-9]+", "-", job.stem.lower()).strip("-")
    return f"raydetect-{words or kind}"[:MAX_NAME].rstrip("-")


def check_name(name: str) -> None:
    """Raises an error for a name that the operator would refuse.

    Raises:
        SpecError: it is no DNS label that starts with a letter, or has more than 47 characters.
    """
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise SpecError(
            f"--name {name}: a RayJob's name has at most {MAX_NAME} small letters, digits and hyphens, starts with a "
            "letter and does not end with a hyphen. Choose another one."
        )


def read_template(path: Path | None) -> dict[str, Any]:
    """The RayJob of a file, or of the package if none is named.

    Raises:
        SpecError: the file cannot be read, or does not have one RayJob with a cluster of its own, besides ConfigMaps.
    """
    if path is None:
        text = (resources.files("raydetect.kuberay") / "rayjob.yaml").read_text()
    else:
        text = read_text(path, "template")
    where = "--template" if path is None else f"--template {path}"
    try:
        found = [one for one in yaml.safe_load_all(text) if one]
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: is not YAML ({str(error).splitlines()[0]}). Correct it.") from None
    kinds = [one.get("kind") if isinstance(one, dict) else type(one).__name__ for one in found]
    if kinds.count("RayJob") != 1 or set(kinds) - {"RayJob", "ConfigMap"}:
        raise SpecError(f"{where}: contains {kinds}. Name a file with one RayJob, and ConfigMaps at most besides it.")
    template: dict[str, Any] = found[kinds.index("RayJob")]
    try:
        for group in _groups(template):
            group["template"]["spec"]["containers"][0]["image"]
    except (KeyError, IndexError, TypeError):
        raise SpecError(f"{where}: its RayJob has no rayClusterSpec whose head and workers have images.") from None
    return template


def build(
    name: str, spec: JobSpec, values: dict[str, Any], template: dict[str, Any], overrides: Overrides
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The RayJob and the ConfigMap with its job file, as plain values.

    Args:
        name: name of the RayJob.
        spec: the validated job.
        values: the job file's plain values.
        template: a RayJob of `read_template`; is not changed.
        overrides: what to change in it.

    Raises:
        SpecError: the job cannot run so: its kind, credentials in its file, or too few pods or GPUs.
    """
    if not isinstance(spec, FitSpec | ScoreSpec | AuditSpec):
        raise SpecError(f"--kuberay: runs jobs of the kinds fit, score and audit, and this is {spec.kind}.")
    job = copy.deepcopy(template)
    config: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-{secrets.token_hex(4)}", "labels": LABELS},
        "data": {FILE: _file(values)},
    }
    job["metadata"] = {**job.get("metadata", {}), "name": name}
    job["metadata"]["labels"] = {**job["metadata"].get("labels", {}), **LABELS}
    job["metadata"].pop("namespace", None)
    job["spec"]["entrypoint"] = f"raydetect {spec.kind} {FOLDER}/{FILE}"
    if isinstance(spec, AuditSpec):
        job["spec"]["backoffLimit"] = 0  # an alarm is no failure that another attempt would mend
    _mount(job, config["metadata"]["name"])
    _override(job, overrides)
    _size(job, spec.resources, overrides)
    return job, config


def _file(values: dict[str, Any]) -> str:
    if without_credentials(values) != values:
        raise SpecError(
            "--kuberay: the job file contains credentials, and everybody who may list ConfigMaps could read them. Put "
            "them into a Secret as environment variables, and name it with --storage-secret."
        )
    text = yaml.safe_dump(values, sort_keys=False)
    if len(text.encode()) > MAX_FILE_BYTES:
        raise SpecError(f"--kuberay: the job file has {len(text.encode())} bytes; a ConfigMap holds {MAX_FILE_BYTES}.")
    return text


def _groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _mount(job: dict[str, Any], config: str) -> None:
    """Mounts the job file in the head's pod, where the driver of the job runs."""
    pod = _groups(job)[0]["template"]["spec"]
    container = pod["containers"][0]
    volumes = [one for one in pod.get("volumes", ()) if one["name"] != VOLUME]
    mounts = [one for one in container.get("volumeMounts", ()) if one["name"] != VOLUME]
    pod["volumes"] = [{"name": VOLUME, "configMap": {"name": config}}, *volumes]
    container["volumeMounts"] = [{"name": VOLUME, "mountPath": FOLDER}, *mounts]


def _override(job: dict[str, Any], overrides: Overrides) -> None:
    if overrides.token_secret:
        job["spec"]["rayClusterSpec"]["authOptions"] = {"mode": "token", "secretName": overrides.token_secret}
    for group in _groups(job):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        if overrides.image:
            container["image"] = overrides.image
        if overrides.storage_secret:
            container["envFrom"] = [{"secretRef": {"name": overrides.storage_secret}}]
        if overrides.pull_secret:
            pod["imagePullSecrets"] = [{"name": overrides.pull_secret}]
    if overrides.pull_secret:
        _submitter_pulls(job, overrides.pull_secret)


def _submitter_pulls(job: dict[str, Any], secret: str) -> None:
    """The pod that submits has the head's image, but no pull secrets unless its template states them."""
    given = job["spec"].get("submitterPodTemplate")
    container = {
        "name": "ray-job-submitter",
        "image": _groups(job)[0]["template"]["spec"]["containers"][0]["image"],
        "resources": {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    }
    template = given or {"spec": {"restartPolicy": "Never", "containers": [container]}}
    template["spec"]["imagePullSecrets"] = [{"name": secret}]
    job["spec"]["submitterPodTemplate"] = template


def _size(job: dict[str, Any], wanted: ResourceSpec, overrides: Overrides) -> None:
    """Sets the number of worker pods and their GPUs, and refuses a cluster on which the job would wait for ever."""
    _, *groups = _groups(job)
    if len(groups) != 1:
        if overrides.workers is not None or overrides.gpus is not None:
            raise SpecError(
                f"--workers, --gpus: the template has {len(groups)} groups of workers. State their sizes in it."
            )
        return
    (group,) = groups
    pod = group["template"]["spec"]
    if overrides.gpus is not None:
        _set_gpus(pod, overrides.gpus)
    places = _places(pod["containers"][0].get("resources", {}).get("limits", {}), wanted)
    needed = None if places is None else -(-wanted.num_actors // places)
    workers = overrides.workers if overrides.workers is not None else needed
    if workers is None:
        return
    if needed is not None and workers < needed:
        raise SpecError(
            f"--workers {workers}: the job's {wanted.num_actors} workers need {needed} pods, each with room for "
            f"{places}. Raise --workers, or lower resources.num_workers."
        )
    autoscaled = job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    least = min(group.get("minReplicas", 0), workers) if autoscaled else workers
    group.update(replicas=least, minReplicas=least, maxReplicas=workers)


def _set_gpus(pod: dict[str, Any], gpus: int) -> None:
    stated = pod["containers"][0].setdefault("resources", {})
    for key in ("requests", "limits"):
        amounts = stated.setdefault(key, {})
        amounts.pop(GPU, None)
        if gpus:
            amounts[GPU] = str(gpus)
    others = [one for one in pod.get("tolerations", ()) if one.get("key") != GPU]
    pod["tolerations"] = [*others, {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}] if gpus else others


def _places(limits: dict[str, Any], wanted: ResourceSpec) -> int | None:
    """How many workers of a job fit into a pod; None if the pod states no CPUs.

    Raises:
        SpecError: none fits.
    """
    gpus = int(limits.get(GPU, 0))
    if wanted.gpus_per_worker and gpus < wanted.gpus_per_worker:
        raise SpecError(
            f"--gpus: a worker of the job needs {wanted.gpus_per_worker:g} GPUs, and a pod has {gpus}. Set "
            "--gpus, or a --template with GPUs."
        )
    if "cpu" not in limits:
        return None
    text = str(limits["cpu"])
    cpus = int(float(text[:-1]) / 1000 if text.endswith("m") else float(text))
    places = cpus // wanted.cpus_per_worker
    if not places:
        raise SpecError(
            f"resources.cpus_per_worker: {wanted.cpus_per_worker} CPUs for each worker, and a pod has {cpus}. Lower "
            "it, or name a --template with larger pods."
        )
    return min(places, int(gpus / wanted.gpus_per_worker)) if wanted.gpus_per_worker else places
