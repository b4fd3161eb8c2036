"""An evaluation on Ray gives the same cells as in one process, even when resumed after a kill."""

import json
from pathlib import Path
from typing import Any

from tests.evaluation.test_evaluate import JOB, data_set
from tests.whole_jobs.runs import PATIENCE, run_here, run_on, start, wait_until, write_job


def cells(folder: Path) -> dict[str, Any]:
    """Results of all finished cells, by file name."""
    return {path.name: json.loads(path.read_text())["categories"] for path in (folder / "cells").glob("*.json")}


def test_cells_on_ray_equal_those_of_one_process_even_after_a_kill(cluster: str, tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    settings = {**JOB, "data": {"uri": str(tmp_path / "data"), "layout": "mvtec_ad"}, "output": str(tmp_path / "ray")}
    settings["resources"] = {"num_workers": 2, "cpus_per_worker": 1}
    job = write_job(tmp_path / "job.yaml", settings)
    started = start(tmp_path / "first", "evaluate", job, "--address", cluster)

    def some() -> bool:
        assert started.process.poll() is None, started.text()
        return bool(list((tmp_path / "ray" / "cells").glob("*.json")))

    wait_until(some, PATIENCE, "the first cell")
    started.kill()
    message = run_on(cluster, "evaluate", job)
    assert "cells are finished already" in message and "Judged 36 images in 4 cells." in message
    run_here("evaluate", job, "--set", f"output={tmp_path / 'local-out'}")
    assert cells(tmp_path / "ray") == cells(tmp_path / "local-out") and len(cells(tmp_path / "ray")) == 4
