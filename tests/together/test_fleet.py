"""A fleet on Ray gives what it gives in one process."""

from pathlib import Path
from typing import Any

from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from tests.made.fleet import fit_fleet, write_mixed
from tests.together.runs import rows_of, run, write_job


def test_a_fleet_on_ray_gives_what_one_process_gives(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    fit_fleet(root)
    write_mixed(root)
    found = []
    for name, words in (("local", ["--local"]), ("ray", [])):
        values: dict[str, Any] = {
            "kind": "score",
            "source": {"uri": f"{root}/mixed"},
            "artifact": f"{root}/fleet",
            "sink": {"uri": f"{root}/{name}", "heatmaps": "all"},
            "flag": {"alpha": 0.2},
            "chunk_images": 7,
            "batch_size": 2,
            "resources": {"num_workers": 2, "detectors_in_memory": 1 if name == "ray" else 8},
        }
        run(tmp_path / f"run-{name}", "score", write_job(tmp_path / f"{name}.yaml", values), *words)
        found.append(rows_of(f"{root}/{name}", Storage()))
        manifest = Ledger(f"{root}/{name}", Storage()).manifest()
        assert manifest is not None and manifest["statuses"] == {"ok": 30} and manifest["heatmaps"] == 30
    assert found[0] == found[1]
