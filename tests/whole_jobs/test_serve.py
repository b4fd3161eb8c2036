"""The endpoints on Ray Serve: same scores as jobs, archive runs on replicas, lost replicas, new versions."""

import base64
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
import yaml

from raydetect.records import OK
from raydetect.sinks.ledger import Ledger
from tests.objectstore import free_port
from tests.whole_jobs.conftest import Line, Whole
from tests.whole_jobs.runs import PATIENCE, QUIET_NODE, processes_of, rows_of, run, run_here, start, wait_until
from tests.whole_jobs.served import PICTURES, Endpoints, asking, metrics_of, replicas, without_repeats


@pytest.fixture(scope="module")
def endpoints(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """The line's detector, served by two replicas on a single-node cluster."""
    from ray.cluster_utils import Cluster

    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    store = line.store
    values = {
        "kind": "serve",
        "detectors": {"widget": {"artifact": store.uri("artifact"), "flag": {"alpha": 0.1}}},
        "storage": store.settings,
        "port": port,
        "batch_size": 4,
        "allow": {"sources": [store.uri("mixed")], "sinks": [store.uri()], "artifacts": [store.uri()]},
        "resources": {"num_workers": 2, "cpus_per_worker": 1},
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(values))
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
    node = {**QUIET_NODE, "num_cpus": 2, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=node)
    try:
        message = run(folder, "serve", str(folder / "serve.yaml"), "--address", cluster.address).text()
        assert f"Serving widget at http://127.0.0.1:{port}" in message and "the endpoints keep running there" in message
        yield Endpoints(line, f"http://127.0.0.1:{port}", cluster.address, metrics_of(message), folder / "serve.yaml")
    finally:
        os.environ.pop("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S")
        cluster.shutdown()


def test_scores_and_heatmaps_equal_those_of_jobs(endpoints: Endpoints, truth: str) -> None:
    store = endpoints.line.store
    rows = {row["key"].partition("#")[2]: row for row in rows_of(truth, store.storage)}
    listed = [(name, data) for name, data in PICTURES if name in rows]
    assert len(listed) == len(PICTURES)
    response = endpoints.score(*(data for _, data in listed), heatmaps="all")
    assert response.status_code == 200, response.text
    options = store.storage.fsspec_options(truth)
    for (name, _), found in zip(listed, response.json()["results"], strict=True):
        row = rows[name]
        assert found["image_score"] == pytest.approx(row["image_score"], rel=1e-6)
        assert (found["p_value"], found["flagged"], found["artifact"]) == (
            row["p_value"], row["flagged"], row["artifact"],
        )  # fmt: skip
        member, _, container = row["heatmap_uri"].partition("::")
        with fsspec.open(f"{member}::{truth}{container}", s3=options) as picture:
            assert picture.read() == base64.b64decode(found["heatmap_png"])


def test_a_killed_job_on_replicas_resumes_with_equal_rows(endpoints: Endpoints, truth: str, tmp_path: Path) -> None:
    line = endpoints.line
    job, ledger = line.job("warm", engine="serve"), Ledger(line.store.uri("warm"), line.store.storage)
    running = start(tmp_path, "score", job, "--address", endpoints.address)
    wait_until(lambda: ledger.committed() or running.process.poll() is not None, PATIENCE, "the first commit")
    running.kill()
    assert ledger.manifest() is None and 0 < len(ledger.committed()) < 12, running.text()
    again = run(tmp_path / "again", "score", job, "--address", endpoints.address)
    assert "of 12 shards are committed already" in again.text()
    assert rows_of(line.store.uri("warm"), line.store.storage) == rows_of(truth, line.store.storage)


def test_an_archive_of_every_format_has_no_lost_or_duplicate_rows(
    endpoints: Endpoints, whole: Whole, tmp_path: Path
) -> None:
    run(tmp_path, "score", whole.job("whole-warm", engine="serve"), "--address", endpoints.address)
    assert whole.facts("whole-warm") == whole.expected


def test_an_archive_run_survives_a_killed_replica_with_equal_rows(endpoints: Endpoints, truth: str) -> None:
    store = endpoints.line.store
    run_url = endpoints.run(endpoints.archive("over-http"))

    def state() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(run_url, timeout=PATIENCE).json()
        return found

    wait_until(lambda: state()["shards_done"] > 0, PATIENCE, "the first commit")
    os.kill(replicas()[0], signal.SIGKILL)
    wait_until(lambda: state()["state"] != "running", PATIENCE, "the end of the run")
    assert state()["state"] == "finished", state()
    assert rows_of(store.uri("over-http"), store.storage) == rows_of(truth, store.storage)


def test_an_archive_run_resumes_after_all_of_serve_is_killed(endpoints: Endpoints, truth: str) -> None:
    store, body = endpoints.line.store, endpoints.archive("after-all")
    run_url = endpoints.run(body)
    ledger = Ledger(store.uri("after-all"), store.storage)
    wait_until(ledger.committed, PATIENCE, "the first commit")
    for pid in processes_of(b"ray::ServeReplica:raydetect:", os.getpid()):
        os.kill(pid, signal.SIGKILL)
    assert ledger.manifest() is None

    def started() -> bool:
        with suppress(httpx.TransportError):
            return httpx.post(f"{endpoints.url}/v1/archives", json=body, timeout=PATIENCE).status_code == 202
        return False

    wait_until(started, PATIENCE, "the return of the endpoints")
    wait_until(
        lambda: httpx.get(run_url, timeout=PATIENCE).json()["state"] == "finished", PATIENCE, "the end of the run"
    )
    assert rows_of(store.uri("after-all"), store.storage) == rows_of(truth, store.storage)


def test_a_replica_killed_under_load_causes_no_wrong_scores(endpoints: Endpoints) -> None:
    wait_until(lambda: len(replicas()) == 2, PATIENCE, "two replicas")
    data = [picture for _, picture in PICTURES[:4]]
    expected = [endpoints.score(picture).json()["results"][0]["image_score"] for picture in data]
    statuses: Counter[int] = Counter()

    def ask(number: int) -> None:
        response = endpoints.score(data[number % 4])
        statuses[response.status_code] += 1
        if response.status_code == 200:
            entry = response.json()["results"][0]
            assert entry["status"] == OK and entry["image_score"] == pytest.approx(expected[number % 4], rel=1e-6)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(ask, number) for number in range(200)]
        wait_until(lambda: statuses[200] > 20, PATIENCE, "some answers")
        os.kill(replicas()[0], signal.SIGKILL)
        for future in futures:
            future.result()
    print(f"responses by status: {dict(statuses)}")
    assert sum(statuses.values()) == 200 and set(statuses) <= {200, 503} and statuses[200] >= 150


def test_metrics_are_exported_to_prometheus(endpoints: Endpoints) -> None:
    endpoints.score(PICTURES[0][1], b"no image")

    def samples() -> set[str]:
        return set(re.findall(r"^(ray_raydetect_\w+\{.*) [1-9]", httpx.get(endpoints.metrics).text, re.MULTILINE))

    def exported(name: str, *labels: str) -> bool:
        return any(line.startswith(name) and all(label in line for label in labels) for line in samples())

    wait_until(
        lambda: exported("ray_raydetect_images", 'status="bad"', 'kind="online"'),
        PATIENCE,
        "a bad image in the metrics",
    )
    assert exported("ray_raydetect_images", 'status="ok"', 'kind="online"')
    for name in ("ray_raydetect_batch_images", "ray_raydetect_queue_ms", "ray_raydetect_score_ms"):
        assert exported(f"{name}_bucket", 'le="+Inf"'), samples()


def test_new_versions_roll_out_without_dropped_requests(endpoints: Endpoints, tmp_path: Path) -> None:
    line, url = endpoints.line, f"{endpoints.url}/v1/detectors/widget"
    fit = yaml.safe_load((line.folder / "fit.yaml").read_text()) | {"artifact": line.store.uri("newer"), "seed": 1}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(fit))
    run_here("fit", str(tmp_path / "fit.yaml"))
    old = httpx.get(url, timeout=PATIENCE).json()["artifact"]
    with asking(endpoints) as seen:
        changed = httpx.put(url, json={"artifact": line.store.uri("newer")}, timeout=PATIENCE)
        assert changed.status_code == 200, changed.text
        new = changed.json()["artifact"]
        wait_until(lambda: seen[-1][1] == new, PATIENCE, "answers of the new version")
    assert without_repeats(seen) == [(200, old), (200, new)]
    # running the command again deploys the first version with new replicas and a new ingress
    with asking(endpoints) as seen:
        run(tmp_path, "serve", str(endpoints.job), "--set", "batch_wait_seconds=0.01", "--address", endpoints.address)
        wait_until(lambda: seen[-1][1] == old, PATIENCE, "answers of the first version")
    assert without_repeats(seen) == [(200, new), (200, old)]
