"""Results are identical in one process, with one and three Ray workers, on two nodes, and after any kind of kill."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from raydetect.sinks.ledger import Ledger
from tests.whole_jobs.conftest import Line
from tests.whole_jobs.runs import (
    PATIENCE,
    Run,
    descendants,
    end,
    listening_addresses,
    open_heatmaps,
    rows_of,
    run_here,
    run_on,
    scoring_actors,
    start,
    two_nodes,
    wait_until,
    write_job,
)

LOOPBACK = {
    "0100007F",
    "0000000000000000FFFF00000100007F",
    "00000000000000000000000001000000",
}  # in the kernel's notation


def same_as_truth(line: Line, results: str, truth: str) -> None:
    """Checks that rows are equal in every column, none is lost or duplicated, and all heatmaps open."""
    uri, storage = line.store.uri(results), line.store.storage
    expected = rows_of(truth, storage)
    found = rows_of(uri, storage)
    assert len(found) == len(expected) == 240
    for a, b in zip(found, expected, strict=True):
        assert a == b
    assert open_heatmaps(uri, storage) == 240
    manifest = Ledger(uri, storage).manifest()
    assert manifest is not None and manifest["rows"] == 240 and manifest["statuses"] == {"ok": 240}


def _begun_or_ended(running: Run, ledger: Ledger) -> bool:
    return running.process.poll() is not None or bool(ledger.committed())


def begin(line: Line, results: str, tmp_path: Path, *arguments: str, workers: int = 2, **changes: Any) -> Run:
    """Starts a job and waits until some but not all shards are committed; anew if it has ended before that was seen."""
    ledger = Ledger(line.store.uri(results), line.store.storage)
    for attempt in range(3):
        job = line.job(results, workers=workers, **changes)
        running = start(tmp_path / f"{results}-{attempt}", "score", job, *arguments)
        wait_until(partial(_begun_or_ended, running, ledger), PATIENCE, "the first commit")
        if running.process.poll() is None and len(ledger.committed()) < 12 and scoring_actors(os.getpid()):
            return running
        assert running.wait() == 0, running.text()
        line.store.storage.delete_folder(line.store.uri(results))
    raise AssertionError(f"{results}: ended three times before some but not all shards were seen committed")


def test_three_workers_match_one_process_even_if_one_is_killed(line: Line, truth: str, tmp_path: Path) -> None:
    running = begin(line, "ray3", tmp_path, workers=3)
    victims = scoring_actors(running.process.pid)
    assert len(victims) == 3
    os.kill(victims[0], signal.SIGKILL)
    addresses = listening_addresses(descendants(running.process.pid))
    assert addresses and addresses <= LOOPBACK
    assert running.wait() == 0, running.text()
    same_as_truth(line, "ray3", truth)
    message = (running.folder / "stderr").read_text()
    placement = "Runs on a local Ray (3 workers); --local runs in this process.\n"
    assert "12 of 12 shards, 240 images" in message and placement in message
    assert "ray" not in message.replace(placement, "").lower().replace("raydetect", "")
    assert "Image AUROC over 240 labelled images" in (running.folder / "stdout").read_text()


def test_a_killed_run_resumes_on_two_nodes_and_losing_a_node_changes_nothing(
    line: Line, truth: str, tmp_path: Path
) -> None:
    """The first run starts its own Ray: without an address, a job does not join a cluster running on the machine."""
    with two_nodes() as (cluster, second):
        running = begin(line, "driver", tmp_path)
        assert scoring_actors(running.process.pid) == scoring_actors(os.getpid()) != []
        below = list(descendants(running.process.pid))
        running.kill()
        wait_until(lambda: not set(scoring_actors(1)) & set(below), 60, "the end of actors without a driver")
        end(below)  # Ray's agents would take another minute
        ledger = Ledger(line.store.uri("driver"), line.store.storage)
        done = ledger.committed()
        assert ledger.manifest() is None and 0 < len(done) < 12
        message = run_on(cluster.address, "score", line.job("driver"))
        assert f"{len(done)} of 12 shards are committed already" in message

        run_on(cluster.address, "score", line.job("nodes"))
        running = begin(line, "node", tmp_path, "--address", cluster.address)
        cluster.remove_node(second, allow_graceful=False)
        if running.wait(120) != 0:
            run_on(cluster.address, "score", line.job("node", workers=1))
    for results in ("driver", "nodes", "node"):
        same_as_truth(line, results, truth)


def test_tiles_in_a_region_match_one_process_even_if_a_worker_is_killed(line: Line, tmp_path: Path) -> None:
    fit = {
        "kind": "fit",
        "source": {"uri": line.store.uri("normal")},
        "detector": {
            "name": "patchcore",
            "params": {"backbone": "resnet18", "weights": "random", "image_size": [64, 64], "max_bank_vectors": 200},
        },
        "artifact": line.store.uri("tiled"),
        "storage": line.store.settings,
        "calibration": {"holdout_ratio": 0.25},
        "view": {"tile": {"overlap": 16}, "region": [[[0, 0], [1, 0], [1, 0.9], [0, 0.8]]]},
        "resources": {"cpus_per_worker": 1},
    }
    run_here("fit", write_job(line.folder / "fit-tiled.yaml", fit))
    run_here("score", line.job("tiles", workers=1, artifact=line.store.uri("tiled")))
    truth = line.store.uri("tiles")
    assert any(row["regions"] for row in rows_of(truth, line.store.storage))
    running = begin(line, "tiles-killed", tmp_path, artifact=line.store.uri("tiled"))
    os.kill(scoring_actors(running.process.pid)[0], signal.SIGKILL)
    assert running.wait() == 0, running.text()
    same_as_truth(line, "tiles-killed", truth)
