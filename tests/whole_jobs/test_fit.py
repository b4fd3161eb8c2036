"""Fits give the same artifact in one process, on several Ray Train workers, and after losing workers and nodes."""

import csv
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raydetect.artifacts.fleet import read_index, read_records
from raydetect.artifacts.record import ArtifactRecord, read_record
from raydetect.artifacts.store import load_artifact
from raydetect.errors import StorageError
from tests.builders.archives import normal_files, pack, tar_bytes
from tests.objectstore import ObjectStore
from tests.whole_jobs.conftest import Line
from tests.whole_jobs.runs import (
    PATIENCE,
    Run,
    processes_of,
    refused_on,
    rows_of,
    run_here,
    run_on,
    start,
    two_nodes,
    wait_for_slots,
    wait_until,
    write_job,
)

PATCHCORE = {"backbone": "resnet18", "weights": "random", "image_size": [96, 96], "coreset_sampling_ratio": 0.05}
STFPM = {
    "backbone": "resnet18", "weights": "random", "image_size": [64, 64], "epochs": 10, "batch_size": 16,
    "learning_rate": 0.02,
}  # fmt: skip


def fit_job(line: Line, name: str, workers: int, algorithm: str = "patchcore", **changes: Any) -> str:
    """Writes a fit job whose artifact is `name` in the bucket."""
    params = PATCHCORE if algorithm == "patchcore" else STFPM
    values = {
        "kind": "fit",
        "source": {"uri": line.store.uri("normal")},
        "detector": {"name": algorithm, "params": params},
        "artifact": line.store.uri(name),
        "storage": line.store.settings,
        "calibration": {"holdout_ratio": 0.25},
        "resources": {"num_workers": workers, "cpus_per_worker": 1},
        **changes,
    }
    return write_job(line.folder / f"{name}.yaml", values)


def record_of(line: Line, name: str) -> ArtifactRecord:
    """The record of a fitted artifact."""
    return read_record(line.store.uri(name), line.store.storage)


def same_fit(a: ArtifactRecord, b: ArtifactRecord) -> None:
    """Checks that bank, backbone and calibration are bit-identical."""
    assert a.body["tensors"]["sha256"] == b.body["tensors"]["sha256"]
    assert a.body["calibration"] == b.body["calibration"]
    assert a.body["images"] == b.body["images"]
    if "coreset" in a.body:
        assert a.body["coreset"] == b.body["coreset"]


def train_workers() -> list[int]:
    """Ray Train worker processes started by this process, which started the cluster."""
    return processes_of(b"RayTrainWorker", os.getpid())


def started(running: Run, phase: str) -> None:
    """Waits until a phase shows on standard error."""

    def printed() -> bool:
        assert running.process.poll() is None, running.text()
        return f"{phase}: " in (running.folder / "stderr").read_text()

    wait_until(printed, PATIENCE, f"the phase {phase}")


@pytest.fixture(scope="module")
def alone(line: Line) -> ArtifactRecord:
    """PatchCore fitted in one process on 240 images."""
    pack(line.store.uri("normal240"), ".tar", normal_files(240), 6, line.store.storage)
    job = fit_job(line, "alone", 1, source={"uri": line.store.uri("normal240")})
    run_here("fit", job)
    return record_of(line, "alone")


def test_fit_survives_the_loss_of_a_node(line: Line, alone: ArtifactRecord, tmp_path: Path) -> None:
    job = fit_job(line, "node", 2, source={"uri": line.store.uri("normal240")})
    with two_nodes() as (cluster, second):
        running = start(tmp_path, "fit", job, "--address", cluster.address, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="20")
        started(running, "collect")
        cluster.remove_node(second, allow_graceful=False)
        code = running.wait(400)
    assert code == 0, running.text()
    same_fit(record_of(line, "node"), alone)
    assert record_of(line, "node").body["workers"] == 1


def test_extending_a_bank_and_interrupting_it_leaves_no_artifact(
    line: Line, alone: ArtifactRecord, cluster: str, tmp_path: Path
) -> None:
    """Its CPUs must be freed at once: the fit with four workers below uses the same cluster."""
    pack(line.store.uri("calibration"), ".tar", normal_files(15, start=700), 2, line.store.storage)
    job = fit_job(line, "more", 2, calibration={"source": {"uri": line.store.uri("calibration")}})
    options = ("--extend", line.store.uri("alone"))
    running = start(tmp_path, "fit", job, *options, "--address", cluster)
    started(running, "read")
    running.process.send_signal(signal.SIGINT)
    assert running.wait(90) == 130
    assert "Traceback" not in running.text()
    with pytest.raises(StorageError):
        list(line.store.storage.list(line.store.uri("more")))

    run_here("fit", job, *options)
    body = record_of(line, "more").body
    assert body["images"] == {"fitted": 40, "held_out": 15, "labelled_anomalous_left_out": 0, "bad": 0}
    assert [entry["digest"] for entry in body["lineage"]] == [alone.digest]
    assert body["coreset"]["of"] == alone.body["coreset"]["of"] + 40 * 144


def test_a_broken_shard_fails_the_job_with_one_sentence(line: Line, cluster: str) -> None:
    whole = tar_bytes(normal_files(12))
    line.store.storage.write(line.store.uri("broken/part-0.tar"), whole)
    line.store.storage.write(line.store.uri("broken/part-1.tar"), whole[: len(whole) // 2])
    source = {"uri": line.store.uri("broken"), "on_bad_shard": "fail"}
    jobs = {"fit": fit_job(line, "unfitted", 2, source=source), "score": line.job("unscored", source=source)}
    for kind, job in jobs.items():
        message = refused_on(cluster, kind, job)
        last = message.splitlines()[-1]
        assert "part-1.tar: broken after" in last and "on_bad_shard: record" in last, message
        others = [line for line in message.splitlines() if not line.startswith("start Ray")]
        assert not any("Traceback" in line or "Ray" in line for line in others), message


def test_a_training_goes_on_to_the_same_bits_after_a_kill(line: Line, cluster: str, tmp_path: Path) -> None:
    """One and two workers: tests/fitting/test_train.py in float64, test_all_detectors.py in float32 through Ray."""
    settings = {"checkpoint_epochs": 2}
    run_here("fit", fit_job(line, "whole", 1, "stfpm", **settings))
    job = fit_job(line, "trained", 1, "stfpm", **settings)
    running = start(tmp_path / "killed", "fit", job, "--address", cluster)
    storage, uri = line.store.storage, line.store.uri("trained")

    def checkpointed() -> bool:
        assert running.process.poll() is None, running.text()
        return storage.exists(uri) and any("/training-" in file.uri for file in storage.list(uri))

    wait_until(checkpointed, PATIENCE, "the first checkpoint")
    os.kill(train_workers()[0], signal.SIGKILL)
    assert running.wait() == 0, running.text()
    whole, resumed = (load_artifact(line.store.uri(n), storage) for n in ("whole", "trained"))
    assert resumed.record.body["resumed_epochs"] >= 2 and whole.record.body["resumed_epochs"] == 0
    assert resumed.record.body["losses"] == whole.record.body["losses"]
    assert all(torch.equal(v, whole.detector.tensors()[n]) for n, v in resumed.detector.tensors().items())
    assert len(list(storage.list(uri))) == 2  # the checkpoints are deleted
    done = re.findall(r"train: (\d+) of (\d+) batches", (running.folder / "stderr").read_text())
    assert done and max(int(count) for count, _ in done) == int(
        done[-1][1]
    )  # progress of the lost attempt is not counted twice


def test_a_fleet_is_fitted_in_parallel_and_routes_images(line: Line, cluster: str) -> None:
    store = line.store
    files = [(f"{kind}/train/good/{name[-8:]}", data) for kind in ("left", "right") for name, data in normal_files(16)]
    pack(store.uri("pairs"), ".tar", files, 3, store.storage)
    pack(store.uri("night"), ".tar", [*files[:4], ("odd/train/good/x.png", files[0][1]), *files[-4:]], 2, store.storage)
    source = {"uri": store.uri("pairs"), "pattern": "{category}/train/{defect}/{name}.png"}
    settings = {"source": source, "per_category": True}
    message = run_on(cluster, "fit", fit_job(line, "fleet2", 2, **settings))
    assert "for each of 2 categories on 24 images by 2 workers" in message
    run_here("fit", fit_job(line, "fleet1", 1, **settings))
    two, one = (read_records(read_index(store.uri(n), store.storage), store.storage) for n in ("fleet2", "fleet1"))
    assert list(two) == list(one) == ["left", "right"]
    for category, member in two.items():
        same_fit(member, one[category])
    job = line.job(
        "fleet-night", workers=1, source={**source, "uri": store.uri("night")}, artifact=store.uri("fleet2"),
        flag={"alpha": 0.25}, max_bad_fraction=0.2,
    )  # fmt: skip
    run_here("score", job)
    statuses = Counter((row["category"], row["status"]) for row in rows_of(store.uri("fleet-night"), store.storage))
    assert statuses == {("left", "ok"): 4, ("right", "ok"): 4, ("odd", "unknown_category"): 1}


def test_one_detector_of_all_categories_is_fitted_together_and_calibrated_for_each(line: Line, cluster: str) -> None:
    store = line.store
    files = [(f"{kind}/{name[-8:]}", data) for kind in ("left", "right") for name, data in normal_files(16)]
    pack(store.uri("both"), ".tar", files, 3, store.storage)
    source = {"uri": store.uri("both"), "pattern": "{category}/{name}.png"}
    settings = {"source": source, "per_category": "calibration"}
    message = run_on(cluster, "fit", fit_job(line, "shared2", 2, **settings))
    assert "Fitted patchcore on 24 images of 2 categories by 2 workers" in message
    run_here("fit", fit_job(line, "shared1", 1, **settings))
    two, one = (read_index(store.uri(name), store.storage) for name in ("shared2", "shared1"))
    assert two.is_shared and two.body["tensors"] == one.body["tensors"] and two.body["images"] == one.body["images"]
    members, others = (read_records(index, store.storage) for index in (two, one))
    assert list(members) == list(others) == ["left", "right"]
    for category, member in members.items():
        same_fit(member, others[category])
        assert member.body["images"]["held_out"] == 4
    found = []
    for name, run in (("shared-there", partial(run_on, cluster)), ("shared-here", run_here)):
        run("score", line.job(name, source=source, artifact=store.uri("shared2"), flag={"alpha": 0.25}))
        names = ("key", "category", "image_score", "p_value", "threshold", "flagged", "artifact")
        found.append([[row[name] for name in names] for row in rows_of(store.uri(name), store.storage)])
    assert found[0] == found[1] and len(found[0]) == 32


def test_bottle_has_the_same_bank_on_one_two_and_four_workers_even_if_one_is_killed(
    object_store: ObjectStore, cluster: str, real_data: Path, real_weights: Path, tmp_path: Path
) -> None:
    store = replace(object_store)
    with (real_data / "mvtec_bottle_256" / "manifest.csv").open() as file:
        paths = [row["path"] for row in csv.DictReader(file) if row["split"] == "train"]
    files = [(path, (real_data / "mvtec_bottle_256" / path).read_bytes()) for path in paths]
    pack(store.uri("train"), ".tar", files, 7, store.storage)
    params = {"backbone": "resnet18", "weights": str(real_weights), "max_bank_vectors": 2000, "image_size": [96, 96]}
    records = []
    for workers in (1, 2, 4):
        values = {
            "kind": "fit",
            "source": {"uri": store.uri("train")},
            "detector": {"name": "patchcore", "params": params},
            "artifact": store.uri(f"artifact{workers}"),
            "storage": store.settings,
            "max_bank_bytes": 1 << 20,
            "calibration": {"method": "holdout"},
            "resources": {"num_workers": workers, "cpus_per_worker": 1},
        }
        job = write_job(tmp_path / f"{workers}.yaml", values)
        if workers == 1:
            message = run_here("fit", job)
        elif workers == 2:
            message = _killed_once(tmp_path, job, cluster)
        else:
            wait_for_slots(cluster, workers)
            message = run_on(cluster, "fit", job)
        by = f" by {workers} workers" if workers > 1 else ""
        assert f"on 188 images{by} in" in message and "Memory bank: " in message and "peak memory" in message
        assert "raylet" not in message
        records.append(read_record(store.uri(f"artifact{workers}"), store.storage))
        names = [file.uri for file in store.storage.list(store.uri(f"artifact{workers}"))]
        assert len(names) == 2, names  # only the record and the tensors are left
    assert [r.body["workers"] for r in records] == [1, 2, 4]
    assert records[0].body["images"] == {"fitted": 188, "held_out": 21, "labelled_anomalous_left_out": 0, "bad": 0}
    for record in records:
        same_fit(record, records[0])
        assert set(record.body["seconds"]) == set(record.body["peak_memory_bytes"]) == {"read", "fit", "calibrate"}


def _killed_once(folder: Path, job: str, cluster: str) -> str:
    """Fits while killing a worker; returns the command's standard output."""
    running = start(folder, "fit", job, "--address", cluster)
    started(running, "collect")
    os.kill(train_workers()[0], signal.SIGKILL)
    assert running.wait() == 0, running.text()
    return (running.folder / "stdout").read_text()
