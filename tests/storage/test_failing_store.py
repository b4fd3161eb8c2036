"""A store that fails at random: a job restarted until it finishes gives the same results as one without failures."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from raydetect.cli.main import main
from raydetect.storage import Storage, join_uri, relative_to
from tests.builders.all_formats import all_formats, conserved
from tests.builders.server import fit_small
from tests.objectstore import ObjectStore
from tests.objectstore.fault_proxy import SHORT_BODIES, RandomFaults, faulty

STARTS = 60
RUN_FIELDS = ("committed_unix", "seconds", "host")  # fields of a record that differ between runs


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes every fault on to the job; test_storage covers the retries of the libraries.

    One chunk is read and scored at a time, so that a job needs many starts.
    """
    monkeypatch.setattr("raydetect.local.jobs.READERS", 1)
    monkeypatch.setattr("raydetect.local.jobs.CHUNKS_IN_FLIGHT", 1)
    monkeypatch.setattr("raydetect.storage.files.S3_ATTEMPTS", 0)  # retries after the first attempt
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small PatchCore artifact."""
    return Path(fit_small(tmp_path_factory.mktemp("fitted"), "one"))


def started(folder: Path, store: ObjectStore, artifact: str, results: str) -> Result:
    """Starts the job on the archive `day` of a store."""
    job = folder / "score.yaml"
    values = {
        "kind": "score",
        "source": {"uri": store.uri("day"), "shard_images": 4, "split_bytes": 20_000},
        "artifact": artifact,
        "sink": {"uri": results, "heatmaps": "all"},
        "storage": store.settings,
        "flag": {"alpha": 0.1},
        "batch_size": 4,
        "chunk_images": 16,
        "max_bad_fraction": 1,
    }
    job.write_text(yaml.safe_dump(values))
    ended = CliRunner().invoke(main, ["score", str(job), "--local"])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended


def files_of(results: str, storage: Storage) -> dict[str, bytes]:
    """All files of a results directory except `run.json`, which names the store; records without `RUN_FIELDS`."""
    if not storage.exists(results):
        return {}
    found = {relative_to(file.uri, results): storage.read(file.uri) for file in storage.list(results)}
    return {name: _reproducible(name, data) for name, data in found.items() if name != "run.json"}


def _reproducible(name: str, data: bytes) -> bytes:
    if not name.startswith("ledger/"):
        return data
    record: dict[str, Any] = json.loads(data)
    for part in (record, *record["parts"]):
        for name in RUN_FIELDS:
            part.pop(name, None)
    return json.dumps(record).encode()


def until_done(
    folder: Path, store: ObjectStore, plan: RandomFaults, artifact: str, results: str, storage: Storage, counts: int = 3
) -> None:
    """Runs a job once without faults, then with faults until it finishes; committed files are correct after each start.

    Args:
        folder: folder for the job file.
        store: the store of the archive, accessed through a faulty proxy the second time.
        plan: the faults.
        artifact: artifact on a disk or in the store.
        results: results directory on a disk or in the store.
        storage: accesses the results without faults.
        counts: different numbers of committed shards after the starts, at least.
    """
    assert started(folder, store, artifact, results).exit_code == 0
    expected = files_of(results, storage)
    storage.delete_folder(results)
    committed: list[int] = []
    with faulty(store, plan) as broken:
        for _ in range(STARTS):
            ended = started(folder, broken, artifact, results)
            found = files_of(results, storage)
            records = {name for name in found if name.startswith("ledger/")}
            assert found.items() <= expected.items(), ended.output
            committed.append(len(records))
            if ended.exit_code == 0:
                break
            assert ended.exit_code == 1 and ended.stderr.splitlines()[-1].startswith("Error: s3://"), ended.output
    assert ended.exit_code == 0 and found == expected, f"{len(committed)} starts: {ended.output}"
    assert committed == sorted(committed) and len(set(committed)) >= counts and len(committed) > 4
    print(f"{len(committed)} starts, {dict(plan.injected)}, shards committed after each: {committed}")


@pytest.mark.parametrize("seed", [1, 4])
def test_a_source_that_fails_at_random_leaves_no_trace(
    object_store: ObjectStore, artifact: Path, tmp_path: Path, seed: int
) -> None:
    """Results are on a local disk, so their files are equal byte for byte."""
    laid = all_formats(10 + seed).upload(object_store, "day")
    plan = RandomFaults(seed=seed, kinds=("slow_down", "drop", *SHORT_BODIES))
    results = f"file://{tmp_path}/results"
    until_done(tmp_path, object_store, plan, str(artifact), results, Storage())
    assert set(plan.injected) >= {"slow_down", "drop", "truncate", "expired"}
    statuses = {row["status"] for row in conserved(results, object_store.storage, laid)}
    assert "unreadable" not in statuses


def test_a_store_of_archive_artifact_and_results_that_fails_at_random_leaves_no_trace(
    object_store: ObjectStore, artifact: Path, tmp_path: Path
) -> None:
    """Writes fail too, some of them after the store has executed them."""
    laid = all_formats(13).upload(object_store, "day")
    for path in artifact.rglob("*"):
        if path.is_file():
            uri = join_uri(object_store.uri("artifact"), str(path.relative_to(artifact)))
            object_store.storage.write(uri, path.read_bytes())
    plan = RandomFaults(seed=3, kinds=("slow_down", "drop", "truncate", "lost"), share=0.02, stretches=0.01, longest=8)
    results = object_store.uri("results")
    until_done(tmp_path, object_store, plan, object_store.uri("artifact"), results, object_store.storage, counts=2)
    assert set(plan.injected) >= {"slow_down", "drop", "truncate", "expired"}
    conserved(results, object_store.storage, laid)
