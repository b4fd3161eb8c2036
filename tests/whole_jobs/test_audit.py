"""An audit on Ray over object storage, with flags that depend on the whole night, equals one in a single process."""

import json
from pathlib import Path
from typing import Any

from raydetect.audit.nights import Nights
from tests.whole_jobs.conftest import Line
from tests.whole_jobs.runs import rows_of, run_here, run_on, write_job

SHARDS = 6


def audit_values(line: Line, folder: str) -> dict[str, Any]:
    uris = [line.store.uri(f"mixed/part-{i}.tar") for i in range(SHARDS)]
    return {
        "kind": "audit",
        "source": {"uri": uris, "pattern": "{category}/test/{defect}/{name}.png"},
        "artifact": line.store.uri("artifact"),
        "sink": {"uri": line.store.uri(folder)},
        "storage": line.store.settings,
        "flag": {"fdr": 0.3},
        "night": "2026-11-22",
        "alarm_when": ["few: images < 10"],
        "batch_size": 4,
        "chunk_images": 8,
        "resources": {"num_workers": 2, "cpus_per_worker": 1},
        "pictures": 4,
    }


def test_an_audit_on_ray_equals_one_in_one_process(line: Line, cluster: str, tmp_path: Path) -> None:
    """A kill on its way: tests/audit/test_audit.py; on Ray: test_same_rows.py, by the same ledger."""
    run_here("audit", write_job(tmp_path / "here.yaml", audit_values(line, "audits-here")))
    message = run_on(cluster, "audit", write_job(tmp_path / "ray.yaml", audit_values(line, "audits-ray")))
    here, there = (Nights(line.store.uri(name), line.store.storage) for name in ("audits-here", "audits-ray"))
    assert f"Audit 2026-11-22: {20 * SHARDS} images in {SHARDS} new shards" in message
    expected, found = here.read("summaries", 1), there.read("summaries", 1)
    assert json.dumps(found).replace("audits-ray", "audits-here") == json.dumps(expected)
    assert 0 < found["flagged"] < found["images"]
    stored = [rows_of(nights.results_uri(1), line.store.storage) for nights in (there, here)]
    assert stored[0] == stored[1] and any(row["regions"] for row in stored[0])
    page = line.store.storage.read(there.report_uri(1)).decode()
    assert page.count("data:image/jpeg") == 8 + page.count('class="zoom"') == 12 and "No image:" not in page
    assert str(line.store.settings["secret"]) not in page
