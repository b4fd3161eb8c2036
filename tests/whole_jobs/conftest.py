"""A small fitted artifact and an archive in the object store, shared by tests of whole jobs."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from raydetect.sinks.ledger import Ledger
from tests.builders.all_formats import REASONS, STATUSES, Laid, all_formats, conserved
from tests.builders.archives import mixed_files, normal_files, pack
from tests.objectstore import ObjectStore
from tests.whole_jobs.fork_server import running_fork_server
from tests.whole_jobs.runs import QUIET_NODE, end_started, run_here, wait_for_slots, write_job

SLOTS = 4
Facts = tuple[list[dict[str, Any]], dict[str, Any]]


@pytest.fixture(autouse=True)
def _kill_left_over_commands() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture(scope="session", autouse=True)
def _fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_fork_server(tmp_path_factory.mktemp("fork_server")):
        yield


@pytest.fixture
def cluster(_cluster: str) -> str:
    """The address of a cluster with four free CPUs, for jobs that do not start their own Ray."""
    wait_for_slots(_cluster, SLOTS)
    return _cluster


@pytest.fixture(scope="package")
def _cluster() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    node = {**QUIET_NODE, "num_cpus": SLOTS, "object_store_memory": 300 << 20}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=node)
    yield cluster.address
    cluster.shutdown()


@dataclass(frozen=True)
class Line:
    """Generated images of one production line in a bucket, and an artifact fitted on its normal images."""

    store: ObjectStore
    folder: Path

    def job(self, results: str, *, workers: int = 2, **changes: Any) -> str:
        """Writes a scoring job file whose sink is `results` in the bucket."""
        values = {
            "kind": "score",
            "source": {
                "uri": self.store.uri("mixed"),
                "pattern": "{category}/test/{defect}/{name}.png",
                "mask_pattern": "{category}/ground_truth/{defect}/{name}_mask.png",
            },
            "artifact": self.store.uri("artifact"),
            "sink": {"uri": self.store.uri(results), "heatmaps": "all"},
            "storage": self.store.settings,
            "flag": {"alpha": 0.1},
            "batch_size": 4,
            "chunk_images": 8,
            "resources": {"num_workers": workers, "cpus_per_worker": 1},
            **changes,
        }
        return write_job(self.folder / f"{results}.yaml", values)


@pytest.fixture(scope="session")
def line(running_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Twelve tar shards of 20 images each, and PatchCore fitted on 40 normal images."""
    store = replace(running_store, bucket="line")
    fs, _ = store.storage.filesystem(store.uri())
    fs.call_s3("create_bucket", Bucket=store.bucket)
    pack(store.uri("normal"), ".tar", normal_files(40), 2, store.storage)
    pack(store.uri("mixed"), ".tar", mixed_files(150, 30), 12, store.storage)
    line = Line(store, tmp_path_factory.mktemp("line"))
    fit = {
        "kind": "fit",
        "source": {"uri": store.uri("normal")},
        "detector": {
            "name": "patchcore",
            "params": {
                "backbone": "resnet18",
                "weights": "random",
                "image_size": [96, 96],
                "coreset_sampling_ratio": 0.05,
            },
        },
        "artifact": store.uri("artifact"),
        "storage": store.settings,
        "calibration": {"holdout_ratio": 0.25},
        "resources": {"cpus_per_worker": 1},
    }
    run_here("fit", write_job(line.folder / "fit.yaml", fit))
    return line


@pytest.fixture(scope="session")
def truth(line: Line) -> str:
    """URI of the results of an uninterrupted run in one process."""
    run_here("score", line.job("truth", workers=1))
    return line.store.uri("truth")


@dataclass(frozen=True)
class Whole:
    """An archive of every format in the line's bucket, and its results from one process."""

    line: Line
    laid: Laid
    expected: Facts = field(default_factory=lambda: ([], {}))

    def job(self, results: str, **changes: Any) -> str:
        """Writes a scoring job file whose sink is `results` in the bucket, with many small shards."""
        source = {"uri": self.laid.uri, "shard_images": 7, "split_bytes": 20_000}
        return self.line.job(results, source=source, chunk_images=5, max_bad_fraction=1, **changes)

    def facts(self, results: str) -> Facts:
        """Rows, checked by `conserved`, and their counts in the manifest."""
        uri, storage = self.line.store.uri(results), self.line.store.storage
        rows, manifest = conserved(uri, storage, self.laid), Ledger(uri, storage).manifest() or {}
        return rows, {name: manifest[name] for name in ("shards", "rows", "statuses", "left_out", "flagged")}


@pytest.fixture(scope="session")
def whole(line: Line) -> Whole:
    """Uploads and scores the archive; its results are `whole`."""
    archive = Whole(line, all_formats(7).upload(line.store, "everything"))
    run_here("score", archive.job("whole", workers=1))
    expected = archive.facts("whole")
    assert set(expected[1]["left_out"]) == REASONS and set(expected[1]["statuses"]) == STATUSES
    return replace(archive, expected=expected)
