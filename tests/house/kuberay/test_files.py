"""The Kubernetes files against the schemas of KubeRay's oldest supported version and its newest, and what they promise.

`schemas.py` writes the schemas; they contain what the API server checks, not what the operator checks afterwards.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from raydetect.config import parse_job
from raydetect.config.validation import parse_yaml
from tests.house.kuberay import schemas

ROOT = Path(__file__).parents[3]
SCHEMAS = schemas.stored()
OLDEST = min(SCHEMAS)
MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
TOKEN = {"mode": "token", "secretName": "raydetect-token"}
OPTIONAL = re.compile(r"^( *)# (imagePullSecrets|securityContext|ephemeral): ", re.MULTILINE)


def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


FILES = [path for path in sorted((ROOT / "cluster").glob("*.yaml")) if "apiVersion" in path.read_text()]
BODIES = [(path, body) for path in FILES for body in documents(path)]
RAY = [pytest.param(body, id=f"{path.stem}") for path, body in BODIES if body["apiVersion"] == "ray.io/v1"]
JOBS = [pytest.param(body, id=f"{path.stem}") for path, body in BODIES if body["kind"] == "RayJob"]
each = pytest.mark.parametrize("body", RAY)


def problems(body: dict[str, Any], tag: str) -> list[str]:
    return schemas.problems(body, SCHEMAS[tag])


def cluster_of(body: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = body["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(body)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods_of(body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each group's pod and its container of Ray."""
    for group in groups_of(body):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        yield pod, container


def test_the_schemas_state_their_source_and_licence() -> None:
    assert sorted(SCHEMAS) == ["v1.6.0", "v1.7.0"]
    for tag, schema in SCHEMAS.items():
        assert schema["tag"] == tag and schema["licence"] == "Apache-2.0"
        assert schema["source"] == "https://github.com/ray-project/kuberay"
        assert sorted(schema["kinds"]) == ["RayCluster", "RayJob", "RayService"]
        for kind in schema["kinds"].values():
            Draft202012Validator.check_schema({**kind, "$defs": schema["$defs"]})


@pytest.mark.parametrize("tag", SCHEMAS)
@each
def test_kuberay_accepts_the_file(body: dict[str, Any], tag: str) -> None:
    assert problems(body, tag) == []


@pytest.mark.parametrize("tag", SCHEMAS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kuberay_accepts_the_lines_that_are_commented_out(path: Path, tag: str) -> None:
    text, count = OPTIONAL.subn(r"\1\2: ", path.read_text())
    text = re.sub(r"^ *emptyDir: .*\n(?: *#.*\n)*( *ephemeral:)", r"\1", text, flags=re.MULTILINE)
    bodies = [found for found in yaml.safe_load_all(text) if found]
    assert count and bodies != documents(path)
    for body in bodies:
        if body["apiVersion"] == "ray.io/v1":
            assert problems(body, tag) == []
            assert all(pod["imagePullSecrets"] for pod, _ in pods_of(body))


@pytest.mark.parametrize("tag", SCHEMAS)
def test_kuberay_accepts_the_pod_of_the_cronjob(tag: str) -> None:
    bodies = documents(ROOT / "cluster" / "cronjob-audit.yaml")
    template = next(body for body in bodies if body["kind"] == "CronJob")["spec"]["jobTemplate"]["spec"]["template"]
    body = documents(ROOT / "cluster" / "raycluster.yaml")[0]
    body["spec"]["headGroupSpec"]["template"] = template
    assert problems(body, tag) == []
    template["spec"]["restartPolcy"] = "Never"
    assert any("restartPolcy" in text for text in problems(body, tag))


@pytest.mark.parametrize(
    "wrong",
    [
        {"spec": {"authOption": TOKEN}},
        {"spec": {"authOptions": {"mode": "tokens"}}},
        {"spec": {"authOptions": {**TOKEN, "secret": "raydetect-token"}}},
        {"spec": {"autoscalerOptions": {"idleTimeoutSeconds": "60"}}},
        {"spec": {"rayVersion": 2.6}},
        {"spec": {"headGroupSpec": {"template": {"spec": {"container": []}}}}},
        {"spec": {"headGroupSpec": {"rayStartParams": {"num-cpus": 0}}}},
        {"spec": {"workerGroupSpecs": [{"groupName": "a"}]}},
    ],
    ids=lambda wrong: json.dumps(wrong["spec"])[:40],
)
def test_the_check_notices(wrong: dict[str, Any]) -> None:
    def merged(into: Any, new: Any) -> Any:
        if not (isinstance(into, dict) and isinstance(new, dict)):
            return new
        return {**into, **{key: merged(into.get(key), value) for key, value in new.items()}}

    for tag in SCHEMAS:
        assert problems(merged(documents(ROOT / "cluster" / "raycluster.yaml")[0], wrong), tag)


@each
def test_names_and_groups_are_as_the_operator_wants_them(body: dict[str, Any]) -> None:
    name = body["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= MAX_NAME[body["kind"]]
    for group in groups_of(body):
        assert "resources" not in group or not group["rayStartParams"]
    for group in cluster_of(body)["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@each
def test_the_operator_gives_every_container_the_token(body: dict[str, Any]) -> None:
    cluster = cluster_of(body)
    assert cluster["authOptions"] == TOKEN and cluster["rayVersion"] >= "2.52.0"
    assert body["spec"].get("submissionMode", "K8sJobMode") == "K8sJobMode"  # has a submitter pod, which gets it too
    assert "submitterPodTemplate" not in body["spec"]
    for _, container in pods_of(body):  # variables of the file would win over the operator's
        assert not {entry["name"] for entry in container.get("env", ())} & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


@each
def test_only_clusters_whose_size_may_change_have_an_autoscaler(body: dict[str, Any]) -> None:
    cluster = cluster_of(body)
    changes = any(group["minReplicas"] != group["maxReplicas"] for group in cluster["workerGroupSpecs"])
    assert cluster.get("enableInTreeAutoscaling", False) is changes
    assert ("autoscalerOptions" in cluster) is changes
    assert all("restartPolicy" not in pod for pod, _ in pods_of(body))  # else the operator may refuse the autoscaler


@each
def test_pods_end_gracefully_and_within_their_time(body: dict[str, Any]) -> None:
    for pod, container in pods_of(body):
        command = " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
        waits = [int(seconds) for seconds in re.findall(r"(?:sleep|--grace-period) (\d+)", command)]
        assert "ray stop" in command and waits and sum(waits) + 10 <= pod["terminationGracePeriodSeconds"]


@each
def test_probes_are_left_to_the_operator(body: dict[str, Any]) -> None:
    for _, container in pods_of(body):  # a probe in the file would replace the one that the operator adds
        assert not {"livenessProbe", "readinessProbe", "startupProbe"} & set(container)


@each
def test_the_temporary_folder_of_ray_is_a_bounded_volume(body: dict[str, Any]) -> None:
    for pod, container in pods_of(body):
        (volume,) = (one for one in pod["volumes"] if one["name"] == "ray-logs")  # the operator's name for it
        assert {"name": "ray-logs", "mountPath": "/tmp/ray"} in container["volumeMounts"]
        assert volume["emptyDir"]["sizeLimit"].endswith("Gi")
        assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("body", JOBS)
def test_a_job_finds_its_file_and_enough_workers(body: dict[str, Any]) -> None:
    path = next(path for path, other in BODIES if other is body)
    config = next(other for other in documents(path) if other["kind"] == "ConfigMap")
    cluster = cluster_of(body)
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert head["volumes"][0] == {"name": "jobs", "configMap": {"name": config["metadata"]["name"]}}
    _, command, file = body["spec"]["entrypoint"].split()
    folder, _, name = file.rpartition("/")
    assert head["containers"][0]["volumeMounts"][0] == {"name": "jobs", "mountPath": folder}
    job = parse_job(parse_yaml(config["data"][name], name), name)
    assert job.kind == command
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits, wanted = container["resources"]["limits"], job.resources
    places = int(limits["cpu"]) // wanted.cpus_per_worker
    if wanted.gpus_per_worker:
        places = min(places, int(int(limits["nvidia.com/gpu"]) // wanted.gpus_per_worker))
    assert wanted.num_workers == places * group["maxReplicas"]
    assert body["spec"]["shutdownAfterJobFinishes"] and body["spec"]["backoffLimit"] == 2


def test_the_gpu_job_has_one_worker_for_each_gpu() -> None:
    body = next(body for body in documents(ROOT / "cluster" / "rayjob-gpu.yaml") if body["kind"] == "RayJob")
    (group,) = cluster_of(body)["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1" and group["minReplicas"] == 0
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert "num-gpus" not in group["rayStartParams"]  # the operator takes it from the limits
    head, worker = pods_of(body)
    assert head[1]["image"] == worker[1]["image"] and "-gpu:" in worker[1]["image"]
    assert "nvidia.com/gpu" not in head[1]["resources"]["limits"]


def test_the_pages_name_the_oldest_version() -> None:
    oldest = OLDEST.removeprefix("v").removesuffix(".0")
    for path in FILES:
        if any(body["apiVersion"] == "ray.io/v1" for body in documents(path)):
            assert f"KubeRay {oldest} or newer" in path.read_text(), path
    for page in ("cluster/README.md", "docs/how-to/kubernetes.md"):
        assert f"KubeRay {oldest} or newer" in (ROOT / page).read_text(), page
