"""An audit on Ray over object storage, killed on its way, equals one in a single process; its report is whole."""

import json
from pathlib import Path
from typing import Any

from raydetect.audit.nights import Nights
from raydetect.sinks.ledger import Ledger
from tests.together.conftest import Line
from tests.together.runs import PATIENCE, rows_of, run_here, start, wait_until, write_job

SHARDS = 6


def words(line: Line, folder: str) -> dict[str, Any]:
    uris = [line.store.uri(f"mixed/part-{i}.tar") for i in range(SHARDS)]
    return {
        "kind": "audit",
        "source": {"uri": uris, "pattern": "{category}/test/{defect}/{name}.png"},
        "artifact": line.store.uri("artifact"),
        "sink": {"uri": line.store.uri(folder)},
        "storage": line.store.words,
        "flag": {"alpha": 0.1},
        "night": "2026-11-22",
        "alarm_when": ["few: images < 10"],
        "batch_size": 4,
        "chunk_images": 8,
        "resources": {"num_workers": 2, "cpus_per_worker": 1},
        "pictures": 4,
    }


def test_a_killed_audit_on_ray_equals_one_in_one_process(line: Line, tmp_path: Path) -> None:
    run_here("audit", write_job(tmp_path / "here.yaml", words(line, "audits-here")))
    job = write_job(tmp_path / "ray.yaml", words(line, "audits-ray"))
    here, there = (Nights(line.store.uri(name), line.store.storage) for name in ("audits-here", "audits-ray"))
    running = start(tmp_path / "one", "audit", job)
    ledger = Ledger(there.results_uri(1), line.store.storage)

    def some() -> bool:
        assert running.process.poll() is None, running.text()
        return 0 < len(ledger.committed()) < SHARDS

    wait_until(some, PATIENCE, "the first commit")
    running.kill()
    again = start(tmp_path / "two", "audit", job)
    assert again.wait() == 0, again.text()
    assert f"Audit 2026-11-22: {20 * SHARDS} images in {SHARDS} new shards" in again.text()
    expected, found = here.read("summaries", 1), there.read("summaries", 1)
    assert json.dumps(found).replace("audits-ray", "audits-here") == json.dumps(expected)
    stored = [rows_of(nights.results_uri(1), line.store.storage) for nights in (there, here)]
    assert stored[0] == stored[1]
    page = line.store.storage.read(there.report_uri(1)).decode()
    assert page.count("data:image/jpeg") == 8 and "No image:" not in page
    assert str(line.store.words["secret"]) not in page
