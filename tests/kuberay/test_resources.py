"""The RayJob of a job file: overrides, sizes, refusals, and what KubeRay's schema says about it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from raydetect.config import parse_job
from raydetect.errors import SpecError
from raydetect.kuberay.resources import Overrides, build, check_name, name_of, read_template
from tests.house.kuberay.schemas import problems, stored

ROOT = Path(__file__).parents[2]
SCORE = {
    "kind": "score",
    "source": {"uri": "s3://line4/2026-11-22/*.tar"},
    "artifact": "s3://models/line4",
    "sink": {"uri": "s3://results/line4/2026-11-22"},
    "resources": {"num_workers": 8, "cpus_per_worker": 2},
}
AUDIT = {**SCORE, "kind": "audit", "alarm_when": ["bad: flagged_rate_low > 0.02"], "night": "2026-11-22"}


def made(
    values: dict[str, Any], template: Path | None = None, **overrides: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    return build("one", parse_job(values, "job"), values, read_template(template), Overrides(**overrides))


def with_resources(**resources: Any) -> dict[str, Any]:
    return {**SCORE, "resources": resources}


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def limits(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = groups(job)[1]["template"]["spec"]["containers"][0]["resources"]["limits"]
    return found


@pytest.mark.parametrize("tag", ["v1.6.0", "v1.7.0"])
@pytest.mark.parametrize("template", [None, ROOT / "cluster" / "rayjob-gpu.yaml"], ids=["packaged", "gpu"])
@pytest.mark.parametrize("values", [SCORE, AUDIT], ids=["score", "audit"])
def test_kuberay_accepts_what_is_built(values: dict[str, Any], template: Path | None, tag: str) -> None:
    everything = {
        "image": "r/i:1",
        "workers": 9,
        "gpus": 2,
        "token_secret": "t",
        "storage_secret": "s",
        "pull_secret": "p",
    }
    for overrides in ({}, everything):
        job, _ = made(values, template, **overrides)
        assert problems(job, stored()[tag]) == []


def test_the_job_file_is_mounted_where_the_entrypoint_reads_it() -> None:
    job, config = made(SCORE)
    assert yaml.safe_load(config["data"]["job.yaml"]) == SCORE
    assert job["metadata"]["name"] == "one" and job["spec"]["entrypoint"] == "raydetect score /jobs/job.yaml"
    head = groups(job)[0]["template"]["spec"]
    assert [one for one in head["volumes"] if one["name"] == "jobs"] == [
        {"name": "jobs", "configMap": {"name": config["metadata"]["name"]}}
    ]
    assert {"name": "jobs", "mountPath": "/jobs"} in head["containers"][0]["volumeMounts"]
    assert {one["name"] for one in head["volumes"]} == {"jobs", "ray-logs"}
    names = {made(SCORE)[1]["metadata"]["name"] for _ in range(3)}
    assert len(names) == 3 and all(name.startswith("one-") for name in names)  # a leftover is never in the way


def test_overrides_reach_every_node_and_the_pod_that_submits() -> None:
    job, _ = made(SCORE, image="r/i:1", token_secret="t", storage_secret="s", pull_secret="p")
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "t"}
    for group in groups(job):
        pod = group["template"]["spec"]
        assert pod["containers"][0]["image"] == "r/i:1" and pod["imagePullSecrets"] == [{"name": "p"}]
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "s"}}]  # not optional: a typo must show
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    assert submitter["imagePullSecrets"] == [{"name": "p"}] and submitter["containers"][0]["image"] == "r/i:1"
    assert "command" not in submitter["containers"][0]  # else the operator does not add its own
    assert "submitterPodTemplate" not in made(SCORE)[0]["spec"]
    assert read_template(None)["metadata"]["name"] == "raydetect-score"  # the template itself is unchanged


@pytest.mark.parametrize(("workers", "cpus", "pods"), [(8, 2, 4), (9, 2, 5), (1, 1, 1), (3, 3, 3), (4, 4, 4)])
def test_as_many_pods_as_the_job_needs(workers: int, cpus: int, pods: int) -> None:
    job, _ = made(with_resources(num_workers=workers, cpus_per_worker=cpus))
    group = groups(job)[1]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (pods, pods, pods)


def test_parts_of_a_bank_need_places_too() -> None:
    job, _ = made(with_resources(num_workers=4, cpus_per_worker=2, bank_shards=3))
    assert groups(job)[1]["maxReplicas"] == 4  # 7 actors, 2 in each pod


def test_gpus_are_asked_for_and_tolerated() -> None:
    wanted = with_resources(num_workers=4, cpus_per_worker=1, gpus_per_worker=1)
    job, _ = made(wanted, gpus=2)
    group = groups(job)[1]
    assert limits(job)["nvidia.com/gpu"] == "2" and group["maxReplicas"] == 2
    assert group["template"]["spec"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    half, _ = made(with_resources(num_workers=4, cpus_per_worker=1, gpus_per_worker=0.5), gpus=1)
    assert groups(half)[1]["maxReplicas"] == 2
    none, _ = made(SCORE, ROOT / "cluster" / "rayjob-gpu.yaml", gpus=0)
    assert "nvidia.com/gpu" not in limits(none) and not groups(none)[1]["template"]["spec"]["tolerations"]
    with pytest.raises(SpecError, match=r"needs 1 GPUs, and a pod has 0\. Set --gpus"):
        made(wanted)


def test_an_autoscaled_template_stays_autoscaled() -> None:
    wanted = with_resources(num_workers=3, cpus_per_worker=6, gpus_per_worker=1)
    job, _ = made(wanted, ROOT / "cluster" / "rayjob-gpu.yaml")
    group = groups(job)[1]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 3)


def test_a_cluster_that_is_too_small_is_refused() -> None:
    with pytest.raises(SpecError, match=r"--workers 3: the job's 8 workers need 4 pods, each with room for 2\."):
        made(SCORE, workers=3)
    with pytest.raises(SpecError, match=r"cpus_per_worker: 5 CPUs for each worker, and a pod has 4\."):
        made(with_resources(num_workers=1, cpus_per_worker=5))


def test_an_alarm_is_not_tried_again() -> None:
    assert made(AUDIT)[0]["spec"]["backoffLimit"] == 0 and made(SCORE)[0]["spec"]["backoffLimit"] == 2


def test_credentials_do_not_get_into_a_configmap() -> None:
    with pytest.raises(SpecError, match="--storage-secret") as refused:
        made({**SCORE, "storage": {"key": "CANARY", "secret": "CANARY"}})
    assert "CANARY" not in str(refused.value)


def test_other_kinds_and_huge_files_are_refused() -> None:
    serve = {"kind": "serve", "detectors": {"line4": {"artifact": "s3://models/line4"}}}
    with pytest.raises(SpecError, match="fit, score and audit, and this is serve"):
        made(serve)
    uris = [f"s3://line4/{number:08d}.tar" for number in range(60_000)]
    with pytest.raises(SpecError, match=r"has \d{7} bytes; a ConfigMap holds 1000000"):
        made({**SCORE, "source": {"uri": uris}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("kind: ConfigMap", "Name a file with one RayJob"),
        ("kind: RayJob\n---\nkind: Service", "Name a file with one RayJob"),
        ("kind: RayJob\nspec: {clusterSelector: {ray.io/cluster: a}}", "has no rayClusterSpec"),
        ("- 1", "Name a file with one RayJob"),
    ],
)
def test_a_wrong_template_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SpecError, match=message) as refused:
        read_template(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(SpecError, match=r"absent\.yaml"):
        read_template(tmp_path / "absent.yaml")


def test_a_template_with_several_groups_states_their_sizes(tmp_path: Path) -> None:
    template = read_template(None)
    template["spec"]["rayClusterSpec"]["workerGroupSpecs"] *= 2
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(template))
    job, _ = made(SCORE, tmp_path / "two.yaml", image="r/i:1")
    assert [group["maxReplicas"] for group in groups(job)[1:]] == [4, 4]
    with pytest.raises(SpecError, match="has 2 groups of workers"):
        made(SCORE, tmp_path / "two.yaml", workers=9)


def test_names() -> None:
    assert name_of(Path("jobs/Line 4_score.yaml"), "score") == "raydetect-line-4-score"
    assert name_of(Path("___.yaml"), "fit") == "raydetect-fit"
    assert len(name_of(Path("x" * 99), "fit")) == 47
    for name in ("a", "a-1", "x" * 47):
        check_name(name)
    for name in ("", "1a", "A", "a-", "a_b", "x" * 48):
        with pytest.raises(SpecError, match="at most 47"):
            check_name(name)
