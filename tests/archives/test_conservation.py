"""Whole jobs in one process account for every file: members are rows or left out, and URIs open what was scored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydetect.config import ScoreSpec, parse_job
from raydetect.local import jobs
from raydetect.planning.plan import plan_score
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from tests.builders.all_formats import REASONS, STATUSES, Laid, all_formats, conserved
from tests.builders.server import fit_small

SPLIT = {"split_bytes": 6000, "shard_images": 7}
PATTERN = {"pattern": "{category}/{name}.png", "mask_pattern": "{category}/{name}.mask.png"}

CUT = ("chunk", "heatmap_uri", "image_score", "p_value", "flagged")  # depend on how chunks are cut


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small PatchCore."""
    return fit_small(tmp_path_factory.mktemp("fitted"), "one")


def scored(laid: Laid, artifact: str, results: Path, **source: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and manifest of a job on the archive; the law holds."""
    values = {
        "kind": "score",
        "source": {"uri": laid.uri, **source},
        "artifact": artifact,
        "sink": {"uri": str(results), "heatmaps": "all"},
        "flag": {"alpha": 0.1},
        "batch_size": 4,
        "chunk_images": 5,
        "max_bad_fraction": 1,
    }
    spec = parse_job(values, "score")
    assert isinstance(spec, ScoreSpec)
    plan = plan_score(spec)
    jobs.score(plan, lambda *_: None)
    manifest = Ledger(plan.ledger.uri, Storage()).manifest()
    assert manifest is not None
    return conserved(plan.ledger.uri, Storage(), laid), manifest


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_file_is_a_row_or_left_out_and_parts_change_nothing(seed: int, artifact: str, tmp_path: Path) -> None:
    laid = all_formats(seed).write(tmp_path / "in [x] 100% #")
    whole, manifest = scored(laid, artifact, tmp_path / "whole")
    assert set(manifest["left_out"]) == REASONS and set(manifest["statuses"]) == STATUSES
    in_parts, split = scored(laid, artifact, tmp_path / "split", **SPLIT)
    assert split["shards"] > manifest["shards"]
    assert {reason: entry["count"] for reason, entry in split["left_out"].items()} == {
        reason: entry["count"] for reason, entry in manifest["left_out"].items()
    }
    assert [{**row, **dict.fromkeys(CUT)} for row in in_parts] == [{**row, **dict.fromkeys(CUT)} for row in whole]
    scores = [np.array([row["image_score"] for row in found], dtype=float) for found in (in_parts, whole)]
    np.testing.assert_allclose(*scores, rtol=1e-4)  # batches are cut elsewhere; NaN where there is no score


def test_what_a_pattern_leaves_out_is_counted_too(artifact: str, tmp_path: Path) -> None:
    laid = all_formats(4).write(tmp_path / "in")
    _, manifest = scored(laid, artifact, tmp_path / "out", **PATTERN)
    assert set(manifest["left_out"]) >= {*REASONS, "pattern"}
